"""One walk from a value x through the graph: what each operator makes of it, as a formula."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

import numpy as np
import onnx_ir as ir

from deploynorm.rewrite.formula import Formula, Layout, UnknownError, broadcast
from deploynorm.rewrite.values import ONE, Array, Size, Values, product

_FLOATS: Final = {ir.DataType.DOUBLE: 3, ir.DataType.FLOAT: 2, ir.DataType.FLOAT16: 1, ir.DataType.BFLOAT16: 0}
"""Types of the arithmetic, the finer with the larger number."""

_X: Final = Formula((), power=1)

Rule: TypeAlias = "Callable[[Walk, ir.Node], Formula]"
"""The formula of a node's output, at least one of whose inputs has one; or UnknownError."""


class Walk:
    """The formulas of all values that one value x leads to, operator by operator.

    Args:
        values: Constants and sizes of the graph.
        x: The value.
        space: Its axes that the mean is taken over: all but the first and that of the channels.
        order: The position of each node of the graph.
        rules: What each operator does with formulas, by its name.
        blocked: Nodes that are to be taken for unknown.
        start: What x itself is; by default just x.

    Attributes:
        formulas: What is known, by value, in the order of the graph.
        refused: Why nothing is known of a node that reads such a value.
    """

    def __init__(
        self,
        values: Values,
        x: ir.Value,
        space: frozenset[int],
        order: Mapping[ir.Node, int],
        rules: Mapping[str, Rule],
        blocked: Iterable[ir.Node] = (),
        start: Formula = _X,
    ) -> None:
        dims = values.dims(x)
        assert dims is not None
        self._values, self._sizes, self._space = values, dims, space
        [self.channel] = set(range(1, len(dims))) - space
        self.formulas = {x: replace(start, layout=tuple((axis,) for axis in range(len(dims))))}
        self.refused = dict.fromkeys(blocked, "it is not understood")
        waiting: list[tuple[int, ir.Node]] = []
        seen: set[ir.Node] = set(self.refused)
        ready = [x]
        while ready or waiting:
            for value in ready:
                for reader in value.consumers():
                    if reader not in seen and reader in order:
                        seen.add(reader)
                        heapq.heappush(waiting, (order[reader], reader))
            ready = []
            if not waiting:
                break
            _, node = heapq.heappop(waiting)
            rule = rules.get(node.op_type) if node.domain == "" else None
            try:
                if rule is None:
                    raise UnknownError(f"{node.op_type} is not understood")
                with np.errstate(all="ignore"):
                    formula = rule(self, node)
                if not formula.finite:
                    raise UnknownError("it computes with numbers that are not finite")
                if formula.above is None and precision(node.outputs[0]) < 0:
                    raise UnknownError("its result is no floating-point number")
            except UnknownError as error:
                self.refused[node] = str(error)
                continue
            ready = [node.outputs[0]]
            self.formulas[node.outputs[0]] = formula
            values.learn(node.outputs[0], tuple(self.size_of(axes) for axes in formula.layout))

    @property
    def channels(self) -> int | None:
        """How many there are; None where only a run knows."""
        size = self._sizes[self.channel]
        return None if size.names else size.number

    def size_of(self, axes: Sequence[int]) -> Size:
        return product([self._sizes[axis] for axis in axes])

    def formula(self, node: ir.Node, position: int) -> Formula:
        """Of an input that holds x."""
        value = node.inputs[position] if position < len(node.inputs) else None
        found = None if value is None else self.formulas.get(value)
        if found is None or found.above is not None:
            raise UnknownError("it reads something else than x there")
        return found

    def attribute(self, node: ir.Node, name: str, default: int) -> int:
        attribute = node.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type != ir.AttributeType.INT:
            raise UnknownError(f"its attribute {name} is no number")
        return attribute.as_int()

    def operands(self, node: ir.Node) -> tuple[Formula, Formula, Layout]:
        """Both inputs of an operator that broadcasts, one of which may be a constant, and the layout of the result."""
        if len(node.inputs) != 2:
            raise UnknownError("it has not two inputs")
        a, b = (None if value is None else self.formulas.get(value) for value in node.inputs)
        if (a and a.above) or (b and b.above):
            raise UnknownError("it reads a truth value")
        if a is None:
            assert b is not None
            a = self.constant(node.inputs[0], b.layout)
        elif b is None:
            b = self.constant(node.inputs[1], a.layout)
        return a, b, broadcast(a.layout, b.layout)

    def constant(self, value: ir.Value | None, layout: Layout) -> Formula:
        """A constant that is broadcast with a value of this layout: one number, or one for each channel."""
        array = self._values.constant(value)
        if array is not None:
            return self._per_channel(array, layout)
        sizes = self._values.sizes(value)
        if sizes is not None and len(sizes) == 1:
            return Formula((), np.float64(sizes[0].number), counts=Counter(sizes[0].names))
        if (filled := self._filled(value, layout)) is not None:
            return filled
        name = "nothing" if value is None else value.name
        raise UnknownError(f"it reads {name}, which is neither x nor constant")

    def _filled(self, value: ir.Value | None, layout: Layout) -> Formula | None:
        """One number, repeated to a shape that only a run knows, where that is the layout's own or broadcasts to it."""
        node = None if value is None else value.producer()
        if node is None or node.domain != "" or node.op_type not in ("Expand", "ConstantOfShape"):
            return None
        fill: Array | None
        if node.op_type == "Expand":
            fill, shape = self._values.constant(node.inputs[0]), self._values.sizes(node.inputs[1])
        else:
            tensor = node.attributes.get("value")
            fill = np.zeros(1, np.float32) if tensor is None else tensor.as_tensor().numpy()
            shape = self._values.sizes(node.inputs[0])
        if fill is None or fill.size != 1 or shape is None or len(shape) > len(layout):
            return None
        for size, axes in zip(reversed(shape), reversed(layout), strict=False):
            if size not in (ONE, self.size_of(axes)):
                return None
        return Formula((), np.float64(fill.reshape(())))

    def _per_channel(self, array: Array, layout: Layout) -> Formula:
        if array.dtype.kind not in "fiuV":  # V: bfloat16
            raise UnknownError("its constant is no number")
        array = array.astype(np.float64)
        full = ((),) * (array.ndim - len(layout)) + layout
        here = full[len(full) - array.ndim :]
        for axis, (count, axes) in enumerate(zip(array.shape, here, strict=True)):
            if count == 1:
                continue
            size = self.size_of(axes)
            if size.names or size.number != count:
                raise UnknownError("its constant is of another size than x")
            if axes != (self.channel,):
                if count == 0 or not (array == array.take([0], axis)).all():
                    raise UnknownError("its constant is not one number for each channel")
                array = array.take([0], axis)
        kept = tuple(axes if axes == (self.channel,) else () for axes in here)
        return Formula(kept, array.reshape(()) if array.size == 1 else array.reshape(-1))

    def labels(self, layout: Layout, axes: Iterable[int]) -> set[int]:
        """The axes of x that axes of a value run over."""
        rank = len(layout)
        found: set[int] = set()
        for axis in axes:
            if not -rank <= axis < rank:
                raise UnknownError("its axes are not those of its input")
            found.update(layout[axis])
        return found

    def numbers(self, node: ir.Node, position: int) -> list[int]:
        value = node.inputs[position] if position < len(node.inputs) else None
        array = self._values.constant(value)
        if array is None or array.dtype.kind not in "iu":
            raise UnknownError("its axes are not constant")
        return [int(number) for number in array.ravel()]

    def number(self, value: ir.Value | None) -> float:
        array = self._values.constant(value)
        if array is None or array.size != 1 or array.dtype.kind not in "fiu":
            raise UnknownError("it reads what is not one constant number")
        return float(array.reshape(()))

    def reduced(self, node: ir.Node, formula: Formula, axes: Sequence[int], mean: bool, keep: bool) -> Formula:
        """A sum or a mean of x^2 over axes of the value."""
        if formula.power != 2 or formula.exponent:
            raise UnknownError("it is the mean of what is no square")
        labels = self.labels(formula.layout, axes)
        if not labels:
            raise UnknownError("it runs over axes of one entry")
        if not labels <= self._space:
            raise UnknownError("it runs over more than the axes of space")
        places = {axis % len(formula.layout) for axis in axes}
        layout = tuple(
            () if axis in places else group for axis, group in enumerate(formula.layout) if keep or axis not in places
        )
        over = formula.reduced | labels
        whole = over == self._space
        scale, counts = formula.scale, Counter(formula.counts)
        for factor, these in ((-1 if mean else 0, labels), (1 if whole else 0, over)):
            size = self.size_of(sorted(these))
            scale = scale * float(size.number) ** factor if size.number else scale
            for name in size.names:
                counts[name] += factor
        return replace(
            formula,
            layout=layout,
            scale=scale,
            power=0 if whole else 2,
            exponent=1.0 if whole else 0.0,
            reduced=frozenset() if whole else over,
            counts={name: count for name, count in counts.items() if count},
            means=formula.means | {node},
        )

    def regrouped(self, layout: Layout, target: Sequence[Size]) -> Layout:
        """The layout of a view of this shape, of which one size may be -1."""
        labels = [label for axes in layout for label in axes]
        free = [place for place, size in enumerate(target) if size == Size(-1)]
        if len(free) > 1:
            raise UnknownError("it asks for a shape with two sizes that are free")
        head, tail = (target[: free[0]], target[free[0] + 1 :]) if free else (target, ())
        before = [self._taken(labels, size, 0) for size in head]
        behind = [self._taken(labels, size, -1) for size in reversed(tail)]
        between = [tuple(labels)] if free else []
        if not free and self.size_of(labels) != ONE:
            raise UnknownError("it asks for a shape that is none of x")
        return (*before, *between, *reversed(behind))

    def _taken(self, labels: list[int], size: Size, end: int) -> tuple[int, ...]:
        """Takes from an end of the labels as many as have this size together."""
        taken: list[int] = []
        if size == ONE:
            if labels and self._sizes[labels[end]] == ONE:
                taken.append(labels.pop(end))
            return tuple(taken)
        while self.size_of(taken) != size:
            if not labels:
                raise UnknownError("it asks for a shape that is none of x, or that is not known to be one")
            taken.append(labels.pop(end))
        return tuple(taken if end == 0 else reversed(taken))

    def shape(self, node: ir.Node, layout: Layout) -> list[Size]:
        """The shape that Reshape makes, with -1 where it is free."""
        sizes = self._values.sizes(node.inputs[1]) if len(node.inputs) > 1 else None
        if sizes is None:
            sizes = self._values.dims(node.outputs[0])
        if sizes is None:
            raise UnknownError("the shape that it makes is not known")
        copied = self.attribute(node, "allowzero", 0) == 0
        if copied and any(size == Size(0) and place >= len(layout) for place, size in enumerate(sizes)):
            raise UnknownError("it copies an axis that is not there")
        return [self.size_of(layout[place]) if copied and size == Size(0) else size for place, size in enumerate(sizes)]

    def expanded(self, node: ir.Node, formula: Formula) -> Layout:
        """The layout of an expanded value: along a new axis, which has the size of one of x, nothing changes."""
        target = self._values.sizes(node.inputs[1]) or self._values.dims(node.outputs[0])
        if target is None:
            raise UnknownError("the shape that it makes is not known")
        for layout in (each.layout for each in self.formulas.values() if each.power):
            padded = (ONE,) * (len(layout) - len(target)) + target
            if len(padded) != len(layout):
                continue
            if all(size in (ONE, self.size_of(axes)) for size, axes in zip(padded, layout, strict=True)):
                grown = tuple(() if size == ONE else axes for size, axes in zip(padded, layout, strict=True))
                try:
                    return broadcast(formula.layout, grown)
                except UnknownError:
                    continue
        raise UnknownError("it grows to a shape that is none of x")


def precision(value: ir.Value) -> int:
    """How fine the value's type is; -1 for one that is not known, or no floating-point number."""
    return _FLOATS.get(value.dtype, -1) if value.dtype is not None else -1
