"""What every stage does with an ONNX model as onnx_ir holds it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir

__all__ = ["node_counts", "save", "size_bytes"]

_PROTOBUF_LIMIT = 2**31 - 2**20  # bytes of one file, less room for the graph itself


def node_counts(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator the graph has; a custom operator with its domain before it."""
    return Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.all_nodes())


def size_bytes(model: ir.Model) -> int:
    """Bytes of all weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)


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
