"""What every stage does with an ONNX model as onnx_ir holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import onnx_ir as ir

__all__ = ["HALF", "half_type", "half_types", "node_counts", "save", "size_bytes"]

HALF: Final[Mapping[ir.DataType, str]] = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
"""The half types, the coarser last."""

_PROTOBUF_LIMIT = 2**31 - 2**20  # bytes of one file, less room for the graph itself


def node_counts(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator the graph has; a custom operator with its domain before it."""
    return Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.all_nodes())


def size_bytes(model: ir.Model) -> int:
    """Bytes of all weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)


def half_types(model: ir.Model) -> tuple[str, ...]:
    """The half types that the graph holds, the coarser last."""
    values = (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())
    inner = (value for node in model.graph.all_nodes() for value in node.outputs)
    found = {value.dtype for value in (*values, *inner)}
    return tuple(name for dtype, name in HALF.items() if dtype in found)


def half_type(path: Path | str) -> str | None:
    """The coarsest half type that a file holds; None of one without, or that cannot be read."""
    try:
        return next(reversed(half_types(ir.load(path))), None)
    except Exception:  # who runs the file says what is wrong with it
        return None


def save(model: ir.Model, path: Path | str, *, external_data: bool | None = None) -> None:
    """Writes the model, with its weights beside it in `<name>.data` where asked for or needed (2 GB).

    Args:
        model: It is left as it is.
        path: The .onnx file; an existing one is overwritten.
        external_data: None decides by size.
    """
    path = Path(path)
    if external_data is None:
        external_data = size_bytes(model) > _PROTOBUF_LIMIT
    ir.save(model, path, external_data=f"{path.name}.data" if external_data else None)
