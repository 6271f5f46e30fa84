"""An ONNX graph in an opset before 18, for converters that read no later one.

torch.onnx writes opset 18 or later. Before that a reduction has its axes in an attribute, Shape gives all sizes, and
some operators have fewer types and attributes; nothing else that is written changed its meaning, but for RoiAlign.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploynorm.errors import ModelError
from deploynorm.residual import constant, new_initializer

_ANY: Final = object()
_LATER: Final[dict[str, Any]] = {
    "allowzero": _ANY,  # of which only inputs of size zero know
    "antialias": 0,
    "ceil_mode": 0,
    "keep_aspect_ratio_policy": "stretch",
    "layout": 0,
    "noop_with_empty_axes": 0,
    "num_outputs": _ANY,  # the number of outputs says it too
    "reduction": "none",
    "training_mode": 0,
}
"""Attributes that came after opset 13, and the value that leaves an operator what it was before."""
_OTHERWISE: Final = ("RoiAlign",)
"""Operators that mean something else without such an attribute."""


def to_older_opset(model: ir.Model, opset: int) -> None:
    """Rewrites a model of standard operators for an earlier opset, in place.

    Inputs of size zero need not pass: Reshape takes a zero for a size that stays.

    Args:
        model: In an opset of which `deploynorm.contract.MIN_OPSET` is one.
        opset: 13 or later.

    Raises:
        ModelError: An operator, or a type, an input or an attribute of it, is not in the opset.
    """
    had = model.opset_imports[""]
    for node in list(model.graph.all_nodes()):
        if node.domain:
            continue
        if not onnx.defs.has(node.op_type, opset):
            since = onnx.defs.get_schema(node.op_type, had).since_version
            raise _missing(node, opset, "the operator is not in the opset", f"pass --opset {since} or later")
        older = onnx.defs.get_schema(node.op_type, opset)
        if onnx.defs.get_schema(node.op_type, had).since_version == older.since_version:
            continue
        if node.op_type.startswith("Reduce") and "axes" in older.attributes:
            _axes_to_attribute(node, opset)
        if node.op_type == "Shape" and "start" not in older.attributes:
            _slice_behind(model.graph, node)
        _fit(node, older, opset)
    RemoveUnusedNodesPass()(model)
    model.opset_imports[""] = opset
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def _fit(node: ir.Node, older: onnx.defs.OpSchema, opset: int) -> None:
    """Takes off what the older schema does not know and does not need."""
    for name, attribute in list(node.attributes.items()):
        if name in older.attributes:
            continue
        if _LATER.get(name, attribute) not in (_ANY, attribute.value):
            raise _missing(node, opset, f"its attribute {name} is not in the opset")
        node.attributes.pop(name)
    if node.op_type in _OTHERWISE:
        raise _missing(node, opset, "it computes something else in the opset")
    if len(node.inputs) > older.max_input:
        raise _missing(node, opset, f"its input {len(node.inputs)} is not in the opset")
    for formal, value in zip(older.inputs, node.inputs, strict=False):
        if value is not None and isinstance(value.type, ir.TensorType):
            name = value.type.dtype.name.lower()
            if f"tensor({name})" not in formal.types:
                raise _missing(node, opset, f"it has no {name} in the opset")


def _axes_to_attribute(node: ir.Node, opset: int) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return
    axes = constant(node.inputs[1])
    if axes is None or not axes.size:
        raise _missing(node, opset, "its axes are not constant")
    node.attributes["axes"] = ir.AttrInt64s("axes", axes.tolist())
    node.resize_inputs(1)


def _slice_behind(graph: ir.Graph, node: ir.Node) -> None:
    """Shape <start, end> as a Slice of all sizes."""
    bounds = {"start": 0, "end": np.iinfo(np.int64).max}
    given = {name: node.attributes.pop(name).as_int() for name in bounds if name in node.attributes}
    if not given:
        return
    old = node.outputs[0]
    ends = [new_initializer(graph, f"{old.name}_{k}", np.array([v])) for k, v in (bounds | given).items()]
    assert isinstance(node.graph, ir.Graph)
    part = ir.val(old.name, old.dtype, old.shape)
    ir.convenience.replace_all_uses_with(old, part, replace_graph_outputs=True)
    old.name, old.shape = f"{old.name}_all", None
    node.graph.insert_after(node, ir.node("Slice", [old, *ends], outputs=[part], name=f"{part.name}_slice"))


def _missing(node: ir.Node, opset: int, problem: str, fix: str = "pass a later --opset") -> ModelError:
    return ModelError("export", f"node {node.name} ({node.op_type}): {problem}", got=f"opset {opset}", fix=fix)
