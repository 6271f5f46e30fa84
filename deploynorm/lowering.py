"""The operators as ONNX knows them: schemas, function bodies, and the forms in which they are written into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxscript
from onnx.defs import OpSchema
from onnx_ir.passes.common import InlinePass

from deploynorm.contract import (
    ADD_OP_TYPE,
    DOMAIN,
    INPUTS,
    LOWERINGS,
    MIN_OPSET,
    NODE_ATTRIBUTES,
    OP_TYPE,
    OPERATORS,
    OUTPUT,
    PARAMETERS,
    RESIDUAL,
    TORCH_ADD_OP,
    TORCH_OP,
    VERSION,
)
from deploynorm.dtypes import ONNX_HALF
from deploynorm.errors import ModelError
from deploynorm.packages import load

_SCALED = OP_TYPE + "Scaled"


def register_schema() -> None:
    """Makes the operators known to onnx in this process: exporting needs it, checking and inference use it."""
    parameter = OpSchema.FormalParameter
    for op_type, inputs in OPERATORS.items():
        if onnx.defs.has(op_type, domain=DOMAIN):
            continue
        onnx.defs.register_schema(
            OpSchema(
                op_type,
                DOMAIN,
                VERSION,
                doc="Y = max(gamma * X * rsqrt(mean(X^2 over all axes >= 2) + eps) + beta [+ residual], tau)",
                inputs=[parameter(name, "P" if name in PARAMETERS else "T") for name in inputs],
                outputs=[parameter(OUTPUT, "T")],
                type_constraints=[
                    ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "X, residual, Y"),
                    ("P", ["tensor(float)", "tensor(double)"], "double where X is, else float"),
                ],
                attributes=[
                    OpSchema.Attribute(name, OpSchema.AttrType.STRING, required=False) for name in NODE_ATTRIBUTES
                ],
            )
        )


def translate(x: object, gamma: object, beta: object, tau: object, eps: object) -> object:
    """The ONNX node for a call of the torch operator; torch.onnx.export calls it with symbolic values."""
    opset = onnxscript.values.Opset(DOMAIN, VERSION)
    return getattr(opset, OP_TYPE)(x, gamma, beta, tau, eps, **NODE_ATTRIBUTES)


def translate_add(x: object, gamma: object, beta: object, tau: object, eps: object, residual: object) -> object:
    """The ONNX node for a call of the torch operator with a residual."""
    opset = onnxscript.values.Opset(DOMAIN, VERSION)
    return getattr(opset, ADD_OP_TYPE)(x, gamma, beta, tau, eps, residual, **NODE_ATTRIBUTES)


TRANSLATIONS: Final[Mapping[str, Callable[..., object]]] = {TORCH_OP: translate, TORCH_ADD_OP: translate_add}
"""By the operator's name under the torch.library namespace."""


def function_proto(
    opset: int, op_type: str = OP_TYPE, *, half: bool = False, maps: bool = False, columns: bool = False
) -> onnx.FunctionProto:
    """An operator's body in standard operators, which a runtime without our library runs instead.

    Args:
        opset: Of the model.
        op_type: A name in deploynorm.contract.OPERATORS.
        half: For float16 and bfloat16 X: casts to float32 first, where a square cannot overflow. A float32 or
            float64 body has no casts, because ONNX Runtime keeps the last one as a pass over the tensor.
        maps: For X of rank 4 alone, taken as it is. By default the body works on (N, C, L), L the product of the
            spatial sizes, and serves every rank; sizes are computed, so that zero-size inputs pass.
        columns: Works on (N, C, L, 1) in place of (N, C, L), which takes TensorRT more passes over memory. After a
            mean over (N, C, L), OpenVINO 2026.4 on a CPU adds the epsilons of channels to samples instead.
    """
    core = f"""
        spatial_axes = {_integers(2, 3) if maps or columns else _integers(2)}
        square = Mul ($x, $x)
        mean = ReduceMean <keepdims = 1> (square, spatial_axes)
        eps_column = Unsqueeze (eps, column_axes)
        positive = Add (mean, eps_column)
        root = Sqrt (positive)
        factor = Div (gamma_column, root)
        scaled = Mul ($x, factor)
        """
    return _function(op_type, opset, half, core, maps=maps, columns=columns)


def lower(model: ir.Model, lowering: str, *, function: bool = True) -> None:
    """Writes the operators' nodes in one of the forms, in place.

    Args:
        model: A graph with `deploynorm` nodes, straight from translation.
        lowering: A name in deploynorm.contract.LOWERINGS.
        function: Whether a custom node's body goes with the model. Without it only TensorRT with our plugin and
            ONNX Runtime with our library can run the file; TensorRT 10.0 to 10.6 need it so.

    Raises:
        ModelError: Another local function has an operator's name (TensorRT looks functions up by name only); the
            lowering needs a newer opset; or rmsnorm is asked for in float64, or with an epsilon that is not constant.
    """
    for other in model.functions.values():
        if other.name in OPERATORS:
            problem = f"the model already has a local function named {other.name}"
            fix = "rename that function: TensorRT finds functions by name and would take the wrong body"
            raise ModelError("export", problem, got=f"{other.domain}::{other.name}", fix=fix)
    nodes = frn_nodes(model.graph)
    if not nodes:
        return
    row, opset = LOWERINGS[lowering], model.opset_imports[""]
    least = max(row.min_opset, MIN_OPSET)  # older ones are made of these
    if opset < least:
        problem, fix = f"{lowering} needs a newer opset", f"pass --opset {least}, or --lowering primitives"
        raise ModelError("export", problem, got=f"opset {opset}", expected=least, fix=fix)
    half = any(node.inputs[0].dtype in ONNX_HALF for node in nodes if node.inputs[0] is not None)
    load(row.writer)(model, nodes, half, function)


def write_custom(model: ir.Model, nodes: list[ir.Node], half: bool, function: bool) -> None:
    if function:
        attach_bodies(model, half=half)


def write_primitives(model: ir.Model, nodes: list[ir.Node], half: bool, function: bool) -> None:
    for node in nodes:
        x, maps = node.inputs[0], _on_maps(node)
        own = half if x is None or x.dtype is None else x.dtype in ONNX_HALF
        proto = function_proto(model.opset_imports[""], node.op_type, half=own, maps=maps, columns=not maps)
        proto.overload = node.overload = f"half={own}, maps={maps}"
        _attach(model, proto)
    _inline(model, nodes)


def attach_bodies(model: ir.Model, *, half: bool) -> None:
    """Gives the model the body of each of our operators that it holds; see function_proto.

    Where all nodes work on maps so does the body, for runtimes that mistake other ranks (ncnn) or computed shapes
    (TVM). In half, which these do not read, it works on (N, C, L): TensorRT computes that in 1 or 2 passes over memory,
    and maps in 3.
    """
    nodes = [node for graph in graphs_of(model) for node in frn_nodes(graph)]
    maps = not half and all(map(_on_maps, nodes))
    for op_type in dict.fromkeys(node.op_type for node in frn_nodes(model.graph)):
        _attach(model, function_proto(model.opset_imports[""], op_type, half=half, maps=maps))


def _on_maps(node: ir.Node) -> bool:
    x = node.inputs[0]
    return x is not None and x.shape is not None and len(x.shape) == 4


def _inline(model: ir.Model, nodes: list[ir.Node]) -> None:
    """Puts the bodies of the functions in the place of the nodes."""
    for node in nodes:
        for name in NODE_ATTRIBUTES:
            node.attributes.pop(name, None)
    InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)
    onnxscript.optimizer.optimize(model)


def graphs_of(model: ir.Model) -> list[ir.Graph | ir.Function]:
    """The graph and the local functions."""
    return [model.graph, *model.functions.values()]


def frn_nodes(graph: ir.Graph | ir.Function) -> list[ir.Node]:
    """The nodes of our operators in the graph, its subgraphs among them."""
    return [node for node in graph.all_nodes() if node.domain == DOMAIN and node.op_type in OPERATORS]


def write_rmsnorm(model: ir.Model, nodes: list[ir.Node], half: bool, function: bool) -> None:
    """RMSNormalization has one epsilon, an attribute. With one per channel, FRN(x; eps_c) = RMS(s_c * x; eps_0) with
    s_c = sqrt(eps_0 / eps_c): such a node carries s in place of eps.
    """
    opset = model.opset_imports[""]
    for node in nodes:
        if node.op_type == ADD_OP_TYPE:  # those of a constant threshold are split before
            problem = "rmsnorm has no residual, and the rank or the threshold of this one is not known"
            raise ModelError("export", f"node {node.name}: {problem}", fix="use primitives")
        x, eps = node.inputs[0], node.inputs[4]
        constant = None if eps is None else ir.convenience.get_const_tensor(eps)
        if constant is None:
            raise ModelError("export", f"node {node.name}: rmsnorm needs a constant epsilon", fix="use primitives")
        if x is not None and x.dtype == ir.DataType.DOUBLE:
            problem = "RMSNormalization computes in float32"
            raise ModelError("export", problem, got="a float64 network", fix="use primitives")
        values = constant.numpy().astype(np.float64)
        floor = float(values.min())
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", floor)
        if not (values == floor).all():
            node.op_type = _SCALED
            scale = np.sqrt(floor / values).astype(np.float32)
            value = ir.val(f"{node.name}_scale", const_value=ir.tensor(scale, name=f"{node.name}_scale"))
            model.graph.register_initializer(value)
            node.replace_input_with(4, value)
    normalize = """
        ones = Constant <value = float[1] {1}> ()
        unit = RMSNormalization <axis = -1, epsilon: float = @epsilon> (%s, ones)
        scaled = Mul (unit, gamma_column)
        """
    _attach(model, _function(OP_TYPE, opset, half, normalize % "$x", "<epsilon>"))
    rescale = """
        scale_column = Unsqueeze (eps, column_axes)
        even = Mul ($x, scale_column)
        """
    _attach(model, _function(_SCALED, opset, half, rescale + normalize % "even", "<epsilon>"))
    _inline(model, nodes)


def _function(
    name: str,
    opset: int,
    half: bool,
    core: str,
    attributes: str = "",
    *,
    maps: bool = False,
    columns: bool = False,
) -> onnx.FunctionProto:
    """A body around `core`, which computes `scaled` from `$x`, eps and `gamma_column`.

    $x and `scaled` are (N, C, L), and columns are (C, 1); or (N, C, L, 1) and (C, 1, 1); or (N, C, H, W) and
    (1, C, 1, 1).
    """
    inputs, lines = OPERATORS.get(name, INPUTS), []

    def arithmetic(tensor: str) -> str:
        """The tensor in the type and the shape of the arithmetic."""
        if half:
            lines.append(f"{tensor}_wide = Cast <to = 1> ({tensor})")
            tensor += "_wide"
        if not maps:
            lines.append(f"{tensor}_flat = Reshape <allowzero = 1> ({tensor}, flat_shape)")
            tensor += "_flat"
        return tensor

    if not maps:
        lines += [
            f"shape = Shape ({INPUTS[0]})",
            f"outer = Shape <end = 2> ({INPUTS[0]})",
            f"spatial = Shape <start = 2> ({INPUTS[0]})",
            "length = ReduceProd <keepdims = 1> (spatial)",
            *([f"one = {_integers(1)}"] if columns else []),
            f"flat_shape = Concat <axis = 0> (outer, length{', one' if columns else ''})",
        ]
    column_axes = (0, 2, 3) if maps else (1, 2) if columns else (1,)
    lines.append(f"column_axes = {_integers(*column_axes)}")
    lines += [f"{each}_column = Unsqueeze ({each}, column_axes)" for each in ("gamma", "beta", "tau")]
    lines += [core.replace("$x", arithmetic(INPUTS[0])), "shifted = Add (scaled, beta_column)"]
    if RESIDUAL in inputs:
        lines.append(f"total = Add (shifted, {arithmetic(RESIDUAL)})")
    steps = [f"Max ({'total' if RESIDUAL in inputs else 'shifted'}, tau_column)"]
    if not maps:
        steps.append("Reshape <allowzero = 1> (bounded, shape)")
    if half:
        steps.append(f"CastLike ({'bounded' if maps else 'whole'}, {INPUTS[0]})")
    names = [*("bounded", "whole")[: len(steps) - 1], OUTPUT]
    lines += [f"{value} = {step}" for value, step in zip(names, steps, strict=True)]
    text = f"""
    <opset_import: ["": {opset}], domain: "{DOMAIN}">
    {name} {attributes} ({", ".join(inputs)}) => ({OUTPUT}) {{
        {" ".join(lines)}
    }}
    """
    proto = onnx.parser.parse_function(text)
    for node in proto.node:  # TensorRT warns of nodes without a name, and pnnx reads none
        node.name = f"{name}_{node.output[0]}"
    return proto


def _integers(*values: int) -> str:
    """A list as a tensor, which more runtimes read than `value_ints`."""
    return f"Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


def _attach(model: ir.Model, proto: onnx.FunctionProto) -> None:
    function = ir.serde.deserialize_function(proto)
    model.functions[function.identifier()] = function
    model.opset_imports.setdefault(DOMAIN, VERSION)
