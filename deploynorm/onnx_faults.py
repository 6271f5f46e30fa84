"""What may be wrong with an ONNX file that protobuf reads: found once, so that no later stage meets it unprepared.

Only what makes a reader crash, wait for ever or leave the folder; whether the operators fit is for the runtimes to say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final

import onnx

_TYPES: Final = set(onnx.TensorProto.DataType.values())
_BITS: Final = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
"""Of the types that are packed."""
_DEEPEST_CALL: Final = 100
_MOST_NODES: Final = 10**6
"""Of the graph, and of what its local functions hold each time that they are called."""


def find_fault(proto: onnx.ModelProto) -> str | None:
    """What is wrong with a model, in a few words; None where nothing is."""
    for body in _bodies(proto):
        for value in _values(body):
            kind = value.type.tensor_type.elem_type
            if kind not in _TYPES:
                return f"value {value.name!r} has an element type that onnx {onnx.__version__} does not know ({kind})"
        for tensor in _tensors(body):
            if (problem := _fault_of(tensor)) is not None:
                return f"tensor {tensor.name!r} {problem}"
    functions = {(function.domain, function.name): function for function in proto.functions}
    size = _size(proto.graph, functions, {}, 0)
    if size > _MOST_NODES:
        deep = f"call one another more than {_DEEPEST_CALL} deep, or themselves"
        return f"its local functions {deep if size == math.inf else f'stand for more than {_MOST_NODES:,} nodes'}"
    return None


def external_files(proto: onnx.ModelProto) -> list[str]:
    """The files that weights lie in, as the model names them."""
    tensors = (tensor for body in _bodies(proto) for tensor in _tensors(body))
    return list(dict.fromkeys(_external(tensor).get("location", "") for tensor in tensors if _is_external(tensor)))


def _bodies(proto: onnx.ModelProto) -> Iterator[Any]:
    """The graph, the local functions, and the subgraphs of their nodes."""
    for top in (proto.graph, *proto.functions):
        yield from _with_subgraphs(top)


def _with_subgraphs(body: Any) -> Iterator[Any]:
    yield body
    for node in body.node:
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _with_subgraphs(graph)


def _values(body: Any) -> Iterator[onnx.ValueInfoProto]:
    if isinstance(body, onnx.GraphProto):
        yield from body.input
        yield from body.output
    yield from body.value_info


def _tensors(body: Any) -> Iterator[onnx.TensorProto]:
    if isinstance(body, onnx.GraphProto):
        yield from body.initializer
        for sparse in body.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in body.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t


def _fault_of(tensor: onnx.TensorProto) -> str | None:
    kind = tensor.data_type
    if kind not in _TYPES or kind == onnx.TensorProto.UNDEFINED:
        return f"has an element type that onnx {onnx.__version__} does not know ({kind})"
    if min(tensor.dims, default=0) < 0:
        return f"has a negative size: {list(tensor.dims)}"
    if _is_external(tensor):
        return _fault_of_external(_external(tensor))
    count = math.prod(tensor.dims)
    name = onnx.TensorProto.DataType.Name(kind)
    if tensor.HasField("raw_data"):
        bits = _BITS.get(name) or onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize * 8
        got, wanted = len(tensor.raw_data), -(-count * bits // 8)
    else:
        got = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(kind)))
        wanted = 2 * count if name.startswith("COMPLEX") else -(-count * _BITS.get(name, 8) // 8)
    return None if got == wanted else f"has not the values that its shape {list(tensor.dims)} takes"


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _fault_of_external(entries: Mapping[str, str]) -> str | None:
    where = entries.get("location", "")
    anchored = PurePosixPath(where).is_absolute() or PureWindowsPath(where).anchor
    if not where or anchored or ".." in re.split(r"[/\\]", where) or "\0" in where:
        return f"lies in a file that is not beside the model: {where!r}"
    for key in ("offset", "length"):
        if not (text := entries.get(key, "0")).isdecimal() or len(text) > 18:
            return f"has a {key} in its file that is no number of bytes: {text[:40]!r}"
    return None


def _size(
    body: Any, functions: Mapping[tuple[str, str], Any], known: dict[tuple[str, str], float], depth: int
) -> float:
    """How many nodes a graph or function has once each call is its function; infinite where calls go too deep."""
    if depth > _DEEPEST_CALL:
        return math.inf
    total: float = 0
    for node in (node for inner in _with_subgraphs(body) for node in inner.node):
        key = (node.domain, node.op_type)
        if key in functions and key not in known:
            known[key] = _size(functions[key], functions, known, depth + 1)
        total += 1 + known.get(key, 0)
    return total
