"""The pass of `restore`: what another tool has taken from one of our files, from the file as it was."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploynorm.changes import Change
from deploynorm.contract import DOMAIN, INPUTS, METADATA_SIZES, MIN_OPSET, NODE_ATTRIBUTES, OPERATORS
from deploynorm.errors import ModelError
from deploynorm.inputs import read_sizes
from deploynorm.losses import renamed_operator
from deploynorm.lowering import frn_nodes, function_proto, graphs_of
from deploynorm.onnx_file import OnnxFile, OnnxSource, node_counts
from deploynorm.rewrite.intake import refuse_blocked, unchanged
from deploynorm.rewrite.result import RewriteResult
from deploynorm.rewrite.values import Values

_BACK: Final = "as in the original"
_WITH_FUNCTIONS: Final = 8
"""The first version of the format that has functions."""
_RELATIVE, _ABSOLUTE = 2.0**-8, 2e-7
"""Rounding of bfloat16, and of the small numbers of float16, which converters raise to 1e-7."""
_Array = npt.NDArray[Any]


def restore(model: ir.Model, original: OnnxSource, *, source_sha256: str | None = None) -> RewriteResult:
    """Puts back what tools drop without a word, from the file that they were given.

    1. Names of our operators (onnx.compose's prefix) -> ours.
    2. Function bodies that nodes have lost (onnx.version_converter) -> the original's; in another opset our own for
       that opset.
    3. Attributes of our nodes -> those of the contract.
    4. Metadata that is gone (onnx-graphsurgeon) -> the original's, the sizes under the names that the inputs have now.

    Refused: a function of others, in a file whose opset was changed; a body for an opset before 18.

    Args:
        model: What the tool wrote. It is left untouched.
        original: What it was given: a file of `deploynorm export` or `deploynorm rewrite`.
        source_sha256: Not used.

    Raises:
        ModelError: The original cannot be read, holds nothing of ours, or is another network; a file was rewritten for
            one machine.
    """
    file = OnnxFile.read(original)
    source = file.to_ir()
    for each in (model, source):
        refuse_blocked(each)
    if not frn_nodes(source.graph) and METADATA_SIZES not in source.metadata_props:
        fix = "name the file that the tool was given"
        raise ModelError(file.where, "holds nothing that deploynorm writes", fix=fix)
    work = model.clone()
    before = node_counts(work.graph.all_nodes())
    changes = list(_names(work, source))
    if not _is_of(work, source):
        fix = "name the file that the tool was given"
        raise ModelError(file.where, "is another network than the file to restore", fix=fix)
    changes += [change for step in (_functions, _attributes, _metadata) for change in step(work, source)]
    if not any(change.outcome == "rewritten" for change in changes):
        return unchanged(model, changes)
    return RewriteResult(work, tuple(changes), before, node_counts(work.graph.all_nodes()), file.files)


def _is_of(work: ir.Model, source: ir.Model) -> bool:
    """Whether each node of ours has the parameters of one in the source: a tool may reorder nodes, or leave some out.

    Where either has none, whether they have as many nodes, or weights of the same shapes.
    """
    nodes, left = _parameters(work), _parameters(source)
    if not nodes or not left:
        counts = [len(list(model.graph.all_nodes())) for model in (work, source)]
        return counts[0] == counts[1] or _weight_shapes(work) == _weight_shapes(source)
    for node in nodes:
        found = next((i for i, other in enumerate(left) if _are_alike(node, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _parameters(model: ir.Model) -> list[tuple[_Array | None, ...]]:
    """Of each node of ours, in the order of the contract; None for one that is not constant."""
    values = Values(model.opset_imports.get("", MIN_OPSET))
    return [tuple(map(values.constant, node.inputs[1 : len(INPUTS)])) for node in frn_nodes(model.graph)]


def _are_alike(one: tuple[_Array | None, ...], other: tuple[_Array | None, ...]) -> bool:
    """Whether all numbers that both have are equal, up to a conversion to half precision and back."""
    pairs = [(a, b) for a, b in zip(one, other, strict=False) if a is not None and b is not None]
    return all(a.size == b.size and np.allclose(_flat(a), _flat(b), _RELATIVE, _ABSOLUTE) for a, b in pairs)


def _flat(x: _Array) -> _Array:
    return x.astype(np.float64).reshape(-1)


def _weight_shapes(model: ir.Model) -> Counter[tuple[int, ...]]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return Counter(tuple(tensor.shape.numpy()) for tensor in tensors if tensor is not None)


def _names(work: ir.Model, source: ir.Model) -> Iterator[Change]:
    old = set()
    for node in [node for graph in graphs_of(work) for node in graph.all_nodes()]:
        name = renamed_operator(node.op_type) if node.domain == DOMAIN else None
        if name is not None:
            yield Change(str(node.outputs[0].name), node.op_type, "rewritten", became=name)
            old.add(node.op_identifier())
            node.op_type = name
    for key in old & set(work.functions):
        del work.functions[key]  # _functions brings that of the name


def _functions(work: ir.Model, source: ir.Model) -> Iterator[Change]:
    had, opset = source.opset_imports.get(""), work.opset_imports.get("", 0)
    called = {node.op_identifier() for graph in graphs_of(work) for node in graph.all_nodes()}
    for key, function in source.functions.items():
        if key not in called or key in work.functions:
            continue
        ours = (function.domain, function.name) in {(DOMAIN, name) for name in OPERATORS}
        if had != opset and (not ours or opset < MIN_OPSET):
            reason = f"its function is of opset {had}, and the file of {opset}"
            yield Change(function.name, "function", "unchanged", detail=reason)
            continue
        if had != opset:
            operators = {node.op_type for node in function}
            half, maps = "Cast" in operators, "Reshape" not in operators
            function = ir.serde.deserialize_function(function_proto(opset, function.name, half=half, maps=maps))
        work.functions[key] = function.clone()
        for domain, version in function.opset_imports.items():
            work.opset_imports.setdefault(domain, version)
        work.opset_imports.setdefault(function.domain, source.opset_imports.get(function.domain, 1))
        work.ir_version = max(work.ir_version, _WITH_FUNCTIONS)
        yield Change(function.name, "function", "rewritten", became=_BACK)


def _attributes(work: ir.Model, source: ir.Model) -> Iterator[Change]:
    own = {name for node in frn_nodes(source.graph) for name in node.attributes}
    for node in frn_nodes(work.graph):
        missing = [name for name in NODE_ATTRIBUTES if name in own and name not in node.attributes]
        for name in missing:
            node.attributes[name] = ir.AttrString(name, NODE_ATTRIBUTES[name])
        if missing:
            yield Change(str(node.outputs[0].name), f"attributes of {node.op_type}", "rewritten", became=_BACK)


def _metadata(work: ir.Model, source: ir.Model) -> Iterator[Change]:
    names = {old.name: new.name for old, new in zip(source.graph.inputs, work.graph.inputs, strict=False)}
    for key, value in source.metadata_props.items():
        wanted = _with_names(value, names) if key == METADATA_SIZES else value
        if key not in work.metadata_props or (work.metadata_props[key] == value != wanted):
            work.metadata_props[key] = wanted
            yield Change(key, "metadata", "rewritten", became=_BACK)


def _with_names(text: str, names: dict[str | None, str | None]) -> str:
    """The sizes of a file by the names that its inputs have now."""
    sizes = read_sizes(text)
    inputs = sizes.get("inputs")
    if not isinstance(inputs, dict) or all(old == new for old, new in names.items()):
        return text
    return json.dumps(sizes | {"inputs": {names.get(name, name): axes for name, axes in inputs.items()}})
