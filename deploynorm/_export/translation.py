"""torch.export program -> ONNX, by torch's own exporter, FRN as one node each."""

from __future__ import annotations

import onnx_ir as ir
import torch

from deploynorm.contract import DOMAIN, TORCH_OP
from deploynorm.errors import ModelError
from deploynorm.lowering import register_schema, translate
from deploynorm.trace import first_line, quiet

__all__ = ["to_onnx"]


def to_onnx(program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    """Translates a traced network.

    Raises:
        ModelError: torch has no translation of an operator, or none in this opset.
    """
    register_schema()
    table = {getattr(getattr(torch.ops, DOMAIN), TORCH_OP).default: translate}
    with quiet("torch.onnx", "onnxscript"):
        try:
            onnx_program = torch.onnx.export(
                program, (), opset_version=opset, custom_translation_table=table, dynamo=True, verbose=False
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
    return onnx_program.model
