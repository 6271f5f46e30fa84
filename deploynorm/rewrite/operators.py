"""What each operator of ONNX does with a formula: one rule an operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from deploynorm.rewrite.formula import Formula, UnknownError
from deploynorm.rewrite.values import ONE
from deploynorm.rewrite.walk import Rule, Walk

# --- arithmetic ------------------------------------------------------------------------------------------------------


def _mul(walk: Walk, node: ir.Node) -> Formula:
    for value, other in (node.inputs[:2], node.inputs[1::-1]):
        condition = None if value is None else walk.formulas.get(value)
        if condition is not None and condition.above is not None:  # y * (y > 0)
            return _chosen(walk, condition.above, other, np.float64(0))
    a, b, layout = walk.operands(node)
    return a.times(b, layout)


def _div(walk: Walk, node: ir.Node) -> Formula:
    a, b, layout = walk.operands(node)
    return a.times(b.powered(-1.0), layout)


def _add(walk: Walk, node: ir.Node) -> Formula:
    return _sum(walk, node, 1)


def _sub(walk: Walk, node: ir.Node) -> Formula:
    return _sum(walk, node, -1)


def _sum(walk: Walk, node: ir.Node, sign: int) -> Formula:
    a, b, layout = walk.operands(node)
    if sign < 0:
        b = b.scaled(np.float64(-1))
    for one, other in ((a, b), (b, a)):
        if one.fixed:
            return replace(other.shifted(one.scale), layout=layout)
    raise UnknownError("it adds two values that both depend on x")


def _neg(walk: Walk, node: ir.Node) -> Formula:
    return walk.formula(node, 0).scaled(np.float64(-1))


def _abs(walk: Walk, node: ir.Node) -> Formula:
    formula = walk.formula(node, 0)
    if formula.power == 1 and (formula.exponent or (formula.scale < 0).any()):
        raise UnknownError("it takes the absolute of what is not x")
    if formula.power != 1 and (formula.scale < 0).any():
        raise UnknownError("it takes the absolute of a number that may be negative")
    return replace(formula, absolute=formula.power == 1)


def _pow(walk: Walk, node: ir.Node) -> Formula:
    return walk.formula(node, 0).powered(walk.number(node.inputs[1]))


def _sqrt(walk: Walk, node: ir.Node) -> Formula:
    return walk.formula(node, 0).powered(0.5)


def _reciprocal(walk: Walk, node: ir.Node) -> Formula:
    return walk.formula(node, 0).powered(-1.0)


def _batch_normalization(walk: Walk, node: ir.Node) -> Formula:
    """A scale and a shift for each channel, by statistics that are constants."""
    x = walk.formula(node, 0)
    if walk.attribute(node, "training_mode", 0) or len(node.outputs) > 1:
        raise UnknownError("it may be in training")
    if len(x.layout) < 2 or x.layout[1] != (walk.channel,):
        raise UnknownError("its channels are on another axis")
    scale, bias, mean, variance = (walk.constant(value, ((walk.channel,),)).scale for value in node.inputs[1:5])
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return x.scaled(factor).shifted(bias - factor * mean)


# --- sums and means --------------------------------------------------------------------------------------------------


def _axes(walk: Walk, node: ir.Node, formula: Formula) -> Sequence[int]:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        raise UnknownError("it runs over all axes")
    return walk.numbers(node, 1)


def _reduce(walk: Walk, node: ir.Node) -> Formula:
    formula = walk.formula(node, 0)
    if node.op_type in ("ReduceL2", "ReduceSumSquare"):
        formula = formula.powered(2.0)
    keep = walk.attribute(node, "keepdims", 1) == 1
    total = walk.reduced(node, formula, _axes(walk, node, formula), node.op_type == "ReduceMean", keep)
    return total.powered(0.5) if node.op_type == "ReduceL2" else total


def _pool(walk: Walk, node: ir.Node) -> Formula:
    formula = walk.formula(node, 0)
    axes = range(2, len(formula.layout))
    if node.op_type == "AveragePool":
        kernel = node.attributes.get_ints("kernel_shape", [])
        assert kernel is not None
        sizes = [walk.size_of(formula.layout[axis]) for axis in axes]
        if [size.number for size in sizes if not size.names] != list(kernel):
            raise UnknownError("its window is not all of space")
        if any(node.attributes.get_ints("pads", []) or []) or node.attributes.get_string("auto_pad", "") in (
            "SAME_UPPER",
            "SAME_LOWER",
        ):
            raise UnknownError("it pads")
    return walk.reduced(node, formula, list(axes), True, True)


def _rms_normalization(walk: Walk, node: ir.Node) -> Formula:
    """x * (mean + epsilon)^-0.5 * scale in one node; of c * x, the mean is c^2 as large."""
    x = walk.formula(node, 0)
    rank, epsilon = len(x.layout), node.attributes.get_float("epsilon", 1e-5)
    axis = walk.attribute(node, "axis", -1) % rank
    if x.power != 1 or x.exponent or x.absolute:
        raise UnknownError("it normalizes what is not x")
    square = walk.reduced(node, x.powered(2.0), range(axis, rank), True, True)
    root = square.shifted(np.float64(epsilon or 0)).powered(-0.5)
    unit = x.times(root, x.layout)
    scale = walk.constant(node.inputs[1], x.layout)
    return unit.times(scale, x.layout)


# --- views -----------------------------------------------------------------------------------------------------------


def _same(walk: Walk, node: ir.Node) -> Formula:
    formula = None if node.inputs[0] is None else walk.formulas.get(node.inputs[0])
    if formula is None:
        raise UnknownError("it reads something else than x there")
    return formula


def _dropout(walk: Walk, node: ir.Node) -> Formula:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        raise UnknownError("it may be in training")
    return walk.formula(node, 0)


def _reshape(walk: Walk, node: ir.Node) -> Formula:
    formula = walk.formula(node, 0)
    return replace(formula, layout=walk.regrouped(formula.layout, walk.shape(node, formula.layout)))


def _flatten(walk: Walk, node: ir.Node) -> Formula:
    formula = walk.formula(node, 0)
    axis = walk.attribute(node, "axis", 1)
    axis = axis + len(formula.layout) if axis < 0 else axis
    parts = formula.layout[:axis], formula.layout[axis:]
    return replace(formula, layout=tuple(tuple(label for axes in part for label in axes) for part in parts))


def _squeeze(walk: Walk, node: ir.Node) -> Formula:
    formula = walk.formula(node, 0)
    rank = len(formula.layout)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        gone = {axis % rank for axis in walk.numbers(node, 1)}
    else:
        gone = {axis for axis, axes in enumerate(formula.layout) if walk.size_of(axes) == ONE}
        if any(walk.size_of(axes).names for axes in formula.layout):
            raise UnknownError("it drops whichever axes have one entry")
    if any(walk.size_of(formula.layout[axis]) != ONE for axis in gone):
        raise UnknownError("it drops an axis of x")
    return replace(formula, layout=tuple(axes for axis, axes in enumerate(formula.layout) if axis not in gone))


def _unsqueeze(walk: Walk, node: ir.Node) -> Formula:
    formula, axes = walk.formula(node, 0), walk.numbers(node, 1)
    rank = len(formula.layout) + len(axes)
    new = {axis % rank for axis in axes}
    old = iter(formula.layout)
    return replace(formula, layout=tuple(() if axis in new else next(old) for axis in range(rank)))


def _transpose(walk: Walk, node: ir.Node) -> Formula:
    formula = walk.formula(node, 0)
    rank = len(formula.layout)
    order = node.attributes.get_ints("perm", None) or range(rank - 1, -1, -1)
    if sorted(order) != list(range(rank)):
        raise UnknownError("it orders other axes than its input has")
    return replace(formula, layout=tuple(formula.layout[axis] for axis in order))


def _expand(walk: Walk, node: ir.Node) -> Formula:
    formula = walk.formula(node, 0)
    return replace(formula, layout=walk.expanded(node, formula))


# --- thresholds ------------------------------------------------------------------------------------------------------


def _relu(walk: Walk, node: ir.Node) -> Formula:
    return walk.formula(node, 0).bounded(np.float64(0))


def _max(walk: Walk, node: ir.Node) -> Formula:
    a, b, layout = walk.operands(node)
    for one, other in ((a, b), (b, a)):
        if one.fixed:
            return replace(other.bounded(one.scale), layout=layout)
    raise UnknownError("it is the maximum of two values that both depend on x")


def _clip(walk: Walk, node: ir.Node) -> Formula:
    formula = walk.formula(node, 0)
    if len(node.inputs) > 2 and node.inputs[2] is not None and walk.number(node.inputs[2]) < float("inf"):
        raise UnknownError("it has an upper bound too")
    return formula.bounded(np.float64(walk.number(node.inputs[1]))) if len(node.inputs) > 1 else formula


def _leaky_relu(walk: Walk, node: ir.Node) -> Formula:
    if node.attributes.get_float("alpha", 0.01) != 0:
        raise UnknownError("it has a slope below 0")
    return walk.formula(node, 0).bounded(np.float64(0))


def _prelu(walk: Walk, node: ir.Node) -> Formula:
    y, slope, layout = walk.operands(node)
    if not slope.fixed or np.any(slope.scale):
        raise UnknownError("it has a slope below 0")
    return replace(y.bounded(np.float64(0)), layout=layout)


def _compare(walk: Walk, node: ir.Node) -> Formula:
    a, b, layout = walk.operands(node)
    above = node.op_type.startswith("Greater")
    y, bound, value = (b, a, node.inputs[1]) if a.fixed else (a, b, node.inputs[0])
    if not bound.fixed or not y.finished or value is None:
        raise UnknownError("it compares what is not normalized yet")
    return replace(y, layout=layout, above=(value, bound.scale, above == (y is a)))


def _not(walk: Walk, node: ir.Node) -> Formula:
    formula = _same(walk, node)
    if formula.above is None:
        raise UnknownError("it reads no truth value")
    value, bound, above = formula.above
    return replace(formula, above=(value, bound, not above))


def _where(walk: Walk, node: ir.Node) -> Formula:
    condition = None if node.inputs[0] is None else walk.formulas.get(node.inputs[0])
    if condition is None or condition.above is None:
        raise UnknownError("its condition is not whether x lies above a bound")
    value, _, above = condition.above
    y, other = (node.inputs[1], node.inputs[2]) if above else (node.inputs[2], node.inputs[1])
    bound = walk.constant(other, walk.formulas[value].layout)
    if len(bound.layout) > len(walk.formulas[value].layout):
        raise UnknownError("it adds an axis")
    return _chosen(walk, (value, condition.above[1], True), y, bound.scale)


def _chosen(walk: Walk, above: tuple[ir.Value, Any, bool], y: ir.Value | None, bound: Any) -> Formula:
    """y where it is above a bound, and the bound elsewhere."""
    value, compared, is_above = above
    if y is not value or not is_above or not (np.asarray(compared) == np.asarray(bound)).all():
        raise UnknownError("it chooses between other values than x and its bound")
    return walk.formulas[value].bounded(bound)


RULES: Final[Mapping[str, Rule]] = {
    "Mul": _mul,
    "Div": _div,
    "Add": _add,
    "Sub": _sub,
    "Neg": _neg,
    "Abs": _abs,
    "Pow": _pow,
    "Sqrt": _sqrt,
    "Reciprocal": _reciprocal,
    "BatchNormalization": _batch_normalization,
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"), _reduce),
    **dict.fromkeys(("GlobalAveragePool", "AveragePool"), _pool),
    "RMSNormalization": _rms_normalization,
    **dict.fromkeys(("Identity", "Cast", "CastLike"), _same),
    "Dropout": _dropout,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Expand": _expand,
    "Relu": _relu,
    "Max": _max,
    "Clip": _clip,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual"), _compare),
    "Not": _not,
    "Where": _where,
}
"""By the operator's name; one that is not here ends the walk."""
REDUCTIONS: Final = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "GlobalAveragePool", "AveragePool")
"""Operators that may be the mean, or a part of it, besides RMSNormalization."""
