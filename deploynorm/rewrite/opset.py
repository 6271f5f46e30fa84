"""Raising a graph to a later opset."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.version_converter

from deploynorm.contract import MIN_OPSET
from deploynorm.errors import ModelError
from deploynorm.quiet import first_line
from deploynorm.residual import new_initializer

_EARLIEST: Final = 11
"""The opset from which on `_SAME` holds."""

_IR_VERSION: Final = 8
"""The first that has the operators and functions of opset 18."""

_SAME: Final = {
    *("Abs", "Add", "ArgMax", "ArgMin", "Cast", "Ceil", "Clip", "Concat", "Constant", "DepthToSpace", "Div", "Equal"),
    *("Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gemm", "Greater"),
    *("GreaterOrEqual", "Identity", "If", "IsNaN", "LRN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Loop", "MatMul"),
    *("Max", "MaxPool", "Mean", "Min", "Mod", "Mul", "Neg", "NonZero", "PRelu", "Pad", "Pow", "Reciprocal", "Relu"),
    *("Reshape", "Scan", "Shape", "Sigmoid", "Sign", "Size", "Slice", "SpaceToDepth", "Sqrt", "Sub", "Sum", "Tanh"),
    *("Tile", "Transpose", "Where"),
}
"""Operators whose later versions until 18 add types, and attributes and inputs without which a node means what it did.

Source: onnx/defs, the schemas of each version."""

_AXES: Final = {
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"),
    *("ReduceSum", "ReduceSumSquare", "Squeeze", "Unsqueeze"),
}
"""Operators whose attribute `axes` became an input, and that mean what they did besides."""


def raise_opset(model: ir.Model, opset: int) -> None:
    """Raises the model to an opset, in place, where it has an earlier one.

    Only what has changed is rewritten, and the notes of nodes stay. Where an operator's change is more than axes that
    became an input, onnxscript and onnx convert the model, which inlines its functions too.

    Raises:
        ModelError: Neither can.
    """
    had = model.opset_imports.get("", opset)
    if had >= opset or (opset == MIN_OPSET and had >= _EARLIEST and _raise_by_axes(model, had)):
        return
    try:
        onnxscript.version_converter.convert_version(model, opset, fallback=True)
    except Exception as error:  # of a node that it does not know
        raise _not_raised(had, opset, first_line(error)) from error
    if model.opset_imports.get("") != opset:
        raise _not_raised(had, opset, "onnx does not know how")


def _not_raised(had: int, opset: int, why: str) -> ModelError:
    problem = f"its opset cannot be raised to {opset}: {why}"
    return ModelError("rewrite", problem, got=f"opset {had}", fix=f"export it with opset {opset} or later")


def _raise_by_axes(model: ir.Model, had: int) -> bool:
    """Raises to 18 a model in which nothing else has changed; else leaves it, and says so."""
    if model.functions:  # whose operators would be of another version
        return False
    changed: dict[str, bool] = {}
    moved: list[ir.Node] = []
    for node in model.graph.all_nodes():
        if node.domain != "":
            continue
        name = node.op_type
        if name not in changed:
            changed[name] = _has_changed(name, had)
        if not changed[name] or name in _SAME:
            continue
        if name in _AXES and len(node.inputs) == 1:
            moved.append(node)
        elif not _means_the_same(node, had):
            return False
    axes: dict[tuple[int, ...], ir.Value] = {}
    for node in moved:
        attribute = node.attributes.pop("axes", None)
        if attribute is not None:
            numbers = tuple(attribute.as_ints())
            if numbers not in axes:
                axes[numbers] = new_initializer(
                    model.graph, f"{node.outputs[0].name}_axes", np.array(numbers, np.int64)
                )
            node.resize_inputs(2)
            node.replace_input_with(1, axes[numbers])
    model.opset_imports[""] = MIN_OPSET
    model.ir_version = max(model.ir_version, _IR_VERSION)
    return True


def _has_changed(name: str, had: int) -> bool:
    try:
        before, after = (onnx.defs.get_schema(name, opset, "").since_version for opset in (had, MIN_OPSET))
    except onnx.defs.SchemaError:  # which neither has: the checker has its own words for it
        return True
    return bool(before != after)


def _means_the_same(node: ir.Node, had: int) -> bool:
    """Whether a node of an operator that has changed does not use what has."""
    if node.op_type == "BatchNormalization":
        return len(node.outputs) == 1
    if node.op_type == "Resize":
        return node.attributes.get_string("coordinate_transformation_mode", "") != "tf_half_pixel_for_nn"
    return node.op_type == "Split" and had >= 13 and len(node.inputs) == 2


def _read_too(node: ir.Node, value: ir.Value) -> None:
    """Puts a node that reads the value as its last input in the place of this one."""
    made = ir.Node(
        "",
        node.op_type,
        [*node.inputs, value],
        list(node.attributes.values()),
        name=node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    made.outputs[0].metadata_props.update(node.outputs[0].metadata_props)
    assert isinstance(node.graph, ir.Graph)
    # The new output takes the name, shape and type of the old one.
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [made], node.outputs, made.outputs)
