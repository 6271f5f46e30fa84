"""torch.export program -> ONNX, by torch's own exporter, FRN as one node each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch.export.graph_signature import ConstantArgument

from deploynorm._export import suppression
from deploynorm._export.tables import tables_once
from deploynorm.contract import DOMAIN
from deploynorm.dtypes import ONNX_HALF
from deploynorm.errors import ModelError
from deploynorm.layers.ops import kept_whole
from deploynorm.lowering import TRANSLATIONS, register_schema
from deploynorm.quiet import first_line, quiet
from deploynorm.trace.suppression import OPERATOR

BFLOAT16_OPSET = 22
"""The first whose convolutions and pools take bfloat16."""


_STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Metadata in which torch writes the paths of the user's own source files into each node."""


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` with which torch.onnx.export writes each FRN layer as one custom node.

        torch.onnx.export(network, example, dynamo=True, custom_translation_table=deploynorm.onnx_translations())

    Without it, torch.onnx.export writes the layers in standard operators, which every runtime takes. The nodes come
    without their bodies: they run where our library, plugin or extension is. `deploynorm.export` writes the bodies too.
    """
    register_schema()
    operators = getattr(torch.ops, DOMAIN)
    return {getattr(operators, name).default: translate for name, translate in TRANSLATIONS.items()}


def to_onnx(program: torch.export.ExportedProgram, opset: int) -> tuple[ir.Model, tuple[str, ...]]:
    """Translates a traced network; with the model come the names of the buffers and parameters that forward changes.

    Raises:
        ModelError: torch has no translation of an operator, or none in this opset; an operator does not take bfloat16,
            or a weight does not fit into the half type.
    """
    for output in program.graph_signature.output_specs:
        if isinstance(output.arg, ConstantArgument) and output.arg.value is not None:
            problem = "the network returns what is no tensor"
            raise ModelError("export", problem, got=repr(output.arg.value), fix="let forward return tensors alone")
    own = getattr(getattr(torch.ops, DOMAIN), OPERATOR).default
    table = {**onnx_translations(), own: suppression.translate}
    with quiet("torch.onnx", "onnxscript", "onnx_ir"), tables_once(), kept_whole():
        try:
            onnx_program = torch.onnx.export(
                program,
                (),
                opset_version=opset,
                custom_translation_table=table,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # the innermost one names the operator
                cause = cause.__cause__
            problem = f"torch.onnx.export cannot translate the network: {type(cause).__name__}: {first_line(cause)}"
            fix = "replace the operator it names, or export that part separately"
            raise ModelError("export", problem, fix=fix) from error
    assert onnx_program is not None
    written = onnx_program.model.opset_imports[""]
    if written != opset:
        # torch logs a failed conversion and goes on with another opset; a user who asked for one expects that one.
        problem = "torch.onnx.export could not convert the graph"
        got, expected = f"opset {written}", f"opset {opset}"
        raise ModelError("export", problem, got=got, expected=expected, fix="choose another --opset")
    _round_fused_weights(onnx_program.model)
    _refuse_bfloat16(onnx_program.model)
    for node in onnx_program.model.graph.all_nodes():
        node.metadata_props.pop(_STACK_TRACE, None)
    assert onnx_program.exported_program is not None  # without the operators that work in place, unlike `program`
    signature = onnx_program.exported_program.graph_signature
    changed = signature.buffers_to_mutate.values(), getattr(signature, "parameters_to_mutate", {}).values()
    return onnx_program.model, tuple(chain(*changed))


def _round_fused_weights(model: ir.Model) -> None:
    """Gives the weights of half convolutions and linear layers the type of their input.

    onnxscript, which torch optimizes its graphs with, multiplies a BatchNorm with float32 parameters into the half
    convolution before it, and leaves the product in float32. ModelError: it does not fit, or is not a constant.
    """
    changed = False
    for node in model.graph.all_nodes():
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or node.inputs[0] is None:
            continue
        dtype = node.inputs[0].dtype
        if dtype is None or dtype not in ONNX_HALF:
            continue
        for position, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT:
                continue
            weight = ir.convenience.get_const_tensor(value)
            if weight is None:
                problem = f"node {node.name}: its weight is computed in float32 where its input is {ONNX_HALF[dtype]}"
                fix = "fold the network first, or keep that layer in float32 (--keep-float32)"
                raise ModelError("export", problem, fix=fix)
            exact = weight.numpy()
            with np.errstate(over="ignore"):
                rounded = exact.astype(dtype.numpy())
            if not np.isfinite(rounded.astype(np.float32)).all():
                problem = f"its weight, multiplied by the norm behind it, does not fit into {ONNX_HALF[dtype]}"
                fix = "keep that layer and its norm in float32 (--keep-float32), or use bfloat16"
                raise ModelError(f"node {node.name}", problem, got=f"{np.abs(exact).max():.3g}", fix=fix)
            name = f"{value.name}_{ONNX_HALF[dtype]}"
            if name not in model.graph.initializers:
                model.graph.register_initializer(ir.val(name, const_value=ir.tensor(rounded, name=name)))
            node.replace_input_with(position, model.graph.initializers[name])
            changed = True
    if changed:
        RemoveUnusedNodesPass()(model)


def _refuse_bfloat16(model: ir.Model) -> None:
    """Raises ModelError for an operator that does not take bfloat16 in the model's opset.

    torch writes it nevertheless, and runtimes need not take it.
    """
    opset = model.opset_imports[""]
    for node in model.graph.all_nodes():
        if node.domain or not onnx.defs.has(node.op_type, opset):
            continue
        schema = onnx.defs.get_schema(node.op_type, opset)
        for formal, value in zip(schema.inputs, node.inputs, strict=False):
            if value is not None and value.dtype == ir.DataType.BFLOAT16 and "tensor(bfloat16)" not in formal.types:
                fix = f"pass --opset {BFLOAT16_OPSET} or later" if opset < BFLOAT16_OPSET else "use float16"
                raise ModelError(
                    "export", f"{node.op_type} has no bfloat16 in this opset", got=f"opset {opset}", fix=fix
                )
