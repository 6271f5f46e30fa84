"""What a graph tells of its values before it runs: constants, and sizes as products of the sizes of axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from deploynorm.residual import constant

Array = npt.NDArray[Any]

_LARGEST: Final = 2**28  # values of a constant that is computed here: more than any weight has
_DEEPEST: Final = 64
"""Operators between a constant and what it is made of: more is taken for not constant."""

_ELEMENTWISE: Final = {
    *("Abs", "Add", "Cast", "Clip", "Div", "Exp", "Identity", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal"),
    *("Softplus", "Sqrt", "Sub"),
}
_EVALUATED: Final = _ELEMENTWISE | {
    *("Concat", "Flatten", "Gather", "ReduceMean", "ReduceProd", "ReduceSum", "Reshape", "Slice", "Squeeze"),
    *("Transpose", "Unsqueeze"),
}
"""Operators whose result is no larger than their inputs are, or than these are broadcast together."""
_FILLED: Final = {"ConstantOfShape": 0, "Expand": 1}
"""Operators that make a tensor of any size, with the input that says which."""
_VIEWS: Final = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class Size:
    """A size or a product of sizes: a number, times sizes that only a run knows, by their names."""

    number: int
    names: tuple[str, ...] = ()

    def __mul__(self, other: Size) -> Size:
        return Size(self.number * other.number, tuple(sorted((*self.names, *other.names))))


ONE: Final = Size(1)


def product(sizes: Sequence[Size]) -> Size:
    return math.prod(sizes, start=ONE)


class Values:
    """Constants and sizes of one graph, each computed once. None is what is not known."""

    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._constants: dict[ir.Value, Array | None] = {}
        self._sizes: dict[ir.Value, tuple[Size, ...] | None] = {}
        self._learnt: dict[ir.Value, tuple[Size, ...]] = {}

    def learn(self, value: ir.Value, dims: tuple[Size, ...]) -> None:
        """Takes the sizes of a value's axes from who knows them better than the file, which may have other names."""
        self._learnt.setdefault(value, dims)

    def constant(self, value: ir.Value | None, depth: int = 0) -> Array | None:
        """The numbers of a value that depends on weights and fixed sizes alone, by ONNX's reference evaluator."""
        if value is None or depth > _DEEPEST:
            return None
        if value not in self._constants:
            self._constants[value] = None  # where it is its own ancestor
            self._constants[value] = self._computed(value, depth)
        return self._constants[value]

    def dims(self, value: ir.Value | None) -> tuple[Size, ...] | None:
        """The sizes of the value's axes; one without a name is a name of its own."""
        if value is None or value in self._learnt:
            return None if value is None else self._learnt[value]
        if value.shape is None:
            return None
        named = ((axis, size if isinstance(size, int) else size.value) for axis, size in enumerate(value.shape))
        return tuple(
            Size(size) if isinstance(size, int) else Size(1, (size or f"{value.name}[{axis}]",)) for axis, size in named
        )

    def sizes(self, value: ir.Value | None, depth: int = 0) -> tuple[Size, ...] | None:
        """The entries of a value that is computed from sizes, such as the shape that Reshape takes."""
        if value is None or depth > _DEEPEST:
            return None
        if value not in self._sizes:
            self._sizes[value] = None
            self._sizes[value] = self._counted(value, depth)
        return self._sizes[value]

    def _computed(self, value: ir.Value, depth: int) -> Array | None:
        node = value.producer()
        if node is None or node.op_type == "Constant":
            return _stored(value)
        if node.domain != "" or len(node.outputs) != 1:
            return None
        if value.dtype == ir.DataType.INT64 and value.shape is not None and len(value.shape) < 2:
            sizes = self._by_rule(node, depth)
            if sizes is not None and not any(size.names for size in sizes):
                numbers = np.array([size.number for size in sizes], np.int64)
                return numbers if len(value.shape) else numbers.reshape(())
        if node.op_type == "Identity":  # TorchScript's exporter has one for each weight that is equal to another
            return self.constant(node.inputs[0], depth + 1)
        if node.op_type == "CastLike":
            like = node.inputs[1].dtype if node.inputs[1] is not None else None
            array = self.constant(node.inputs[0], depth + 1)
            return None if array is None or like is None else array.astype(like.numpy())
        if node.op_type not in _EVALUATED and node.op_type not in _FILLED:
            return None
        inputs = []
        for each in node.inputs:
            array = None if each is None else self.constant(each, depth + 1)
            if each is not None and array is None:
                return None
            inputs.append(array)
        return self._run(node, inputs) if self._small(node, inputs) else None

    def _small(self, node: ir.Node, inputs: Sequence[Array | None]) -> bool:
        arrays = [array for array in inputs if array is not None]
        if any(array.size > _LARGEST for array in arrays):
            return False
        if node.op_type == "Gather" and math.prod(array.size for array in arrays) > _LARGEST:
            return False
        shapes: list[Any] = [array.shape for array in arrays]
        if node.op_type in _FILLED:
            target = inputs[_FILLED[node.op_type]]
            shapes = [*shapes[:-1], [] if target is None else target.ravel().tolist()]
        elif node.op_type not in _ELEMENTWISE:
            return True
        try:
            return math.prod(np.broadcast_shapes(*shapes)) <= _LARGEST
        except ValueError:
            return False

    def _run(self, node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
        names = [f"i{position}" if array is not None else "" for position, array in enumerate(inputs)]
        proto = ir.to_proto(node)
        del proto.input[:], proto.output[:]
        proto.input.extend(names)
        proto.output.append("o")
        feeds = {name: array for name, array in zip(names, inputs, strict=True) if array is not None}
        values = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None)
            for name, array in feeds.items()
        ]
        output = onnx.helper.make_empty_tensor_value_info("o")
        graph = onnx.helper.make_graph([proto], "constant", values, [output])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self._opset)])
        try:
            with np.errstate(all="ignore"):
                [result] = ReferenceEvaluator(model).run(None, feeds)
        except Exception:  # whatever is wrong with the node, its value is not known
            return None
        return np.asarray(result)

    def _extent(self, node: ir.Node) -> tuple[Size, ...] | None:
        """What a node Shape gives."""
        dims = self.dims(node.inputs[0])
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        return None if dims is None else dims[start:end]

    def _counted(self, value: ir.Value, depth: int) -> tuple[Size, ...] | None:
        array = self.constant(value, depth)
        if array is not None:
            if array.dtype.kind not in "iu" or array.size > _DEEPEST:
                return None
            return tuple(Size(int(number)) for number in array.ravel())
        node = value.producer()
        return None if node is None or node.domain != "" else self._by_rule(node, depth)

    def _by_rule(self, node: ir.Node, depth: int) -> tuple[Size, ...] | None:
        rule = self._rules.get(node.op_type)
        try:
            return None if rule is None else rule(self, node, depth + 1)
        except _UnknownError:
            return None

    def _need(self, node: ir.Node, position: int, depth: int) -> tuple[Size, ...]:
        sizes = self.sizes(node.inputs[position], depth) if position < len(node.inputs) else None
        if sizes is None:
            raise _UnknownError
        return sizes

    def _numbers(self, node: ir.Node, position: int, default: Sequence[int] | None = None) -> list[int]:
        if position >= len(node.inputs) or node.inputs[position] is None:
            if default is None:
                raise _UnknownError
            return list(default)
        array = self.constant(node.inputs[position])
        if array is None or array.dtype.kind not in "iu":
            raise _UnknownError
        return [int(number) for number in array.ravel()]

    def _shape(self, node: ir.Node, depth: int) -> tuple[Size, ...] | None:
        return self._extent(node)

    def _total(self, node: ir.Node, depth: int) -> tuple[Size, ...] | None:
        dims = self.dims(node.inputs[0])
        return None if dims is None else (product(dims),)

    def _view(self, node: ir.Node, depth: int) -> tuple[Size, ...]:
        return self._need(node, 0, depth)

    def _gather(self, node: ir.Node, depth: int) -> tuple[Size, ...] | None:
        data, places = self._need(node, 0, depth), self._numbers(node, 1)
        if node.attributes.get_int("axis", 0) != 0 or not all(-len(data) <= place < len(data) for place in places):
            return None
        return tuple(data[place] for place in places)

    def _slice(self, node: ir.Node, depth: int) -> tuple[Size, ...] | None:
        data, starts, ends = self._need(node, 0, depth), self._numbers(node, 1), self._numbers(node, 2)
        axes, steps = self._numbers(node, 3, [0]), self._numbers(node, 4, [1])
        if axes != [0] or steps != [1] or len(starts) != 1 or len(ends) != 1:
            return None
        return data[starts[0] : ends[0]]

    def _concat(self, node: ir.Node, depth: int) -> tuple[Size, ...]:
        return tuple(size for position in range(len(node.inputs)) for size in self._need(node, position, depth))

    def _multiply(self, node: ir.Node, depth: int) -> tuple[Size, ...] | None:
        a, b = self._need(node, 0, depth), self._need(node, 1, depth)
        if not (a and b) or (len(a) != len(b) and 1 not in (len(a), len(b))):
            return None
        length = max(len(a), len(b))
        return tuple(x * y for x, y in zip(a * (length // len(a)), b * (length // len(b)), strict=True))

    def _multiply_all(self, node: ir.Node, depth: int) -> tuple[Size, ...]:
        return (product(self._need(node, 0, depth)),)

    def _where(self, node: ir.Node, depth: int) -> tuple[Size, ...] | None:
        """TorchScript writes the shape for Expand as where(shape == -1, 1, shape)."""
        condition = node.inputs[0].producer() if node.inputs[0] is not None else None
        if condition is None or condition.op_type != "Equal":
            return None
        a, b = self._need(condition, 0, depth), self._need(condition, 1, depth)
        chosen, other = self._need(node, 1, depth), self._need(node, 2, depth)
        if not len(a) == len(b) == len(chosen) == len(other):
            return None
        found = []
        for left, right, yes, no in zip(a, b, chosen, other, strict=True):
            if left != right and (left.names or right.names) and min(left.number, right.number) >= 0:
                return None
            found.append(yes if left == right else no)
        return tuple(found)

    _rules: Final[dict[str, Callable[[Values, ir.Node, int], tuple[Size, ...] | None]]] = {
        "Shape": _shape,
        "Size": _total,
        **dict.fromkeys(_VIEWS, _view),
        "Gather": _gather,
        "Slice": _slice,
        "Concat": _concat,
        "Mul": _multiply,
        "ReduceProd": _multiply_all,
        "Where": _where,
    }


class _UnknownError(Exception):
    """A size that the graph does not tell."""


def _stored(value: ir.Value) -> Array | None:
    try:
        return constant(value)
    except (ValueError, OSError):  # a Constant without a value, or weights that cannot be read
        return None
