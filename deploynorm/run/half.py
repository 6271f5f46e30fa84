"""Half precision as a GPU computes it, on any CPU.

ONNX Runtime has no half arithmetic on a CPU: it computes such a graph in float32 from end to end, where nothing
overflows and nothing is rounded in between. Here each operator computes in float32, as the tensor cores of a GPU add
up, and then each of its outputs is rounded to the type that the graph gives it. A value past the largest number of the
type is an infinity from there on, wherever in the graph it arises.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass, ShapeInferencePass

from deploynorm.contract import MIN_OPSET
from deploynorm.dtypes import ONNX_HALF, numpy_dtype
from deploynorm.errors import BackendError, DeployNormError, ModelError
from deploynorm.files import scratch_folder
from deploynorm.lowering import attach_bodies
from deploynorm.onnx_file import OnnxFile, OnnxSource, save
from deploynorm.quiet import quiet
from deploynorm.run.onnxruntime import OnnxRuntimeRunner

_CONVERTERS = ("Cast", "CastLike", "Constant")
"""Operators that give a half value without computing one."""
_TYPE_ATTRIBUTES = ("dtype", "output_dtype", "output_datatype")
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


class HalfRunner(OnnxRuntimeRunner):
    """Runs a half graph in ONNX Runtime on the CPU, every tensor rounded to its type.

    Local functions are inlined, so that what happens within a function body is rounded too. FRN without a body runs as
    the kernels do: in float32, rounded once.

    The arguments are those of OnnxRuntimeRunner. BackendError where onnxruntime removes the rounding, ModelError for a
    value of unknown type.
    """

    def __init__(self, model: OnnxSource, *, threads: int | None = None) -> None:
        file = OnnxFile.read(model)
        where, rounded = file.where, replace(file, proto=file.whole_proto()).to_ir()
        for name in file.half_types:
            _assert_rounding(name)
        try:
            round_outputs(rounded, where)
        except DeployNormError:
            raise
        except Exception as error:  # the passes of onnx_ir raise nearly anything for what a file may hold
            problem = f"not a graph whose values can be rounded: {error!s:.200}"
            raise ModelError(where, problem, fix="export it again") from error
        with scratch_folder() as folder:  # a file and not bytes, which end at 2 GB
            path = folder / "rounded.onnx"
            save(rounded, path)
            try:
                super().__init__(path, plugins=[], threads=threads, optimize=False)
            except DeployNormError as error:
                raise type(error)(where, error.problem, got=error.got, fix=error.fix) from error
        self._where = where
        self.name = f"half ({' and '.join(file.half_types) or 'nothing in half'}, each tensor rounded)"
        self.precision = file.half_type


def round_outputs(model: ir.Model, where: str = "round_outputs") -> None:
    """Makes each operator compute in float32 and rounds each of its half outputs to its type, in place.

    Given:  x (half) -> Mul -> y (half)
    Result: x (half) -> Cast -> Mul -> y (float32) -> Cast -> y (half)

    ONNX Runtime keeps a pair of casts that loses digits; `HalfRunner` makes sure of that once. ModelError if the type
    of a value is not known.
    """
    InlinePass()(model)
    attach_bodies(model, half=False)
    with quiet("onnx_ir"):  # which prints the traceback of what it cannot infer
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    widened: dict[tuple[ir.Graph, ir.Value], ir.Value] = {}
    for node in list(model.graph.all_nodes()):
        if node.op_type in _CONVERTERS or any(each.type in _GRAPHS for each in node.attributes.values()):
            continue
        assert isinstance(node.graph, ir.Graph)
        for position, value in enumerate(node.inputs):
            if value is not None and _is_half(value, where):
                if (node.graph, value) not in widened:
                    widened[node.graph, value] = _widen(model, node, value)
                node.replace_input_with(position, widened[node.graph, value])
        _use_float32(node)
        for value in node.outputs:
            if value.name and _is_half(value, where):
                _round(node, node.graph, value)
    RemoveUnusedNodesPass()(model)


def _is_half(value: ir.Value, where: str) -> bool:
    if value.type is None:
        producer = value.producer()
        got = None if producer is None else f"the output of {producer.domain or 'ai.onnx'}::{producer.op_type}"
        problem, fix = f"the type of value {value.name} is not known", "export it with its function bodies and types"
        raise ModelError(where, problem, got=got, fix=fix)
    return isinstance(value.type, ir.TensorType) and value.dtype in ONNX_HALF


def _widen(model: ir.Model, node: ir.Node, value: ir.Value) -> ir.Value:
    """The value in float32, computed here for a weight and by a cast before the node for others."""
    name = f"{value.name}_float32"
    stored = model.graph.initializers.get(str(value.name)) is value and not value.is_graph_input()
    if stored and value.const_value is not None:
        weight = ir.tensor(value.const_value.numpy().astype(np.float32), name=name)
        wide = ir.val(name, const_value=weight)
        model.graph.register_initializer(wide)
        return wide
    wide = ir.val(name, ir.DataType.FLOAT, value.shape)
    assert node.graph is not None
    node.graph.insert_before(node, _cast(value, wide))
    return wide


def _use_float32(node: ir.Node) -> None:
    """Changes attributes that ask for a half output to ask for a float32 one."""
    for name in _TYPE_ATTRIBUTES:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value in ONNX_HALF:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
    fill = node.attributes.get("value")
    if fill is not None and fill.type == ir.AttributeType.TENSOR and fill.value.dtype in ONNX_HALF:  # ConstantOfShape
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(fill.value.numpy().astype(np.float32)))


def _round(node: ir.Node, owner: ir.Graph, value: ir.Value) -> None:
    """Puts a cast behind the value, which takes its name and its place."""
    half = ir.val(value.name, value.dtype, value.shape)
    for position, output in enumerate(owner.outputs):
        if output is value:
            owner.outputs[position] = half
    ir.convenience.replace_all_uses_with(value, half)
    value.name, value.dtype = f"{half.name}_exact", ir.DataType.FLOAT
    owner.insert_after(node, _cast(value, half))


def _cast(source: ir.Value, target: ir.Value) -> ir.Node:
    assert target.dtype is not None
    return ir.node("Cast", [source], {"to": int(target.dtype)}, outputs=[target], name=f"{target.name}_cast")


@lru_cache
def _assert_rounding(name: str) -> None:
    """Raises BackendError unless this ONNX Runtime rounds at casts, and to infinity past the largest number."""
    element = onnx.helper.np_dtype_to_tensor_dtype(numpy_dtype(name))
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : {MIN_OPSET}]>
        rounding (float[N] x) => (float[N] y) {{
            square = Mul(x, x)
            half = Cast<to = {element}>(square)
            wide = Cast<to = {onnx.TensorProto.FLOAT}>(half)
            y = Sqrt(wide)
        }}"""
    )
    values = np.array([1.01, 300, 2e19], np.float32)
    with np.errstate(over="ignore"):
        want = np.sqrt((values * values).astype(numpy_dtype(name)).astype(np.float32))
    with OnnxRuntimeRunner(model.SerializeToString(), plugins=[], optimize=False) as runner:
        got = runner.infer({"x": values})["y"]
    if not np.array_equal(got, want):
        problem = f"this onnxruntime does not round to {name} where the graph says so"
        fix = "use another version of onnxruntime, or --backend reference"
        raise BackendError("HalfRunner", problem, got=got.tolist(), expected=want.tolist(), fix=fix)
