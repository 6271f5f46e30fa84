"""FRN and MABN layers that are not ours, found by what they compute: they stay loose operators, which is slow.

Only a line for the user comes of it. It asks what is normalised by what, whatever a layer and its tensors are called:

    x * mean(x^2 over space)^-0.5          loose_frn, in an ONNX graph
    x * buffer^-0.5, no other buffer       loose_mabn, in a trace, where a buffer still differs from a parameter
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import onnx_ir as ir

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram

_NAMED = 3  # layers that a note names

_VIEWS = {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_RESHAPED = {*_VIEWS, "Transpose"}
_EXPONENTS = {"Sqrt": 0.5, "Reciprocal": -1.0}
_SHIFTED = {"Add", "Clip", "Max"}  # an epsilon, however it is put
_OF_SQUARES = {"ReduceSumSquare": 1.0, "ReduceL2": 0.5}  # mean(x^2) to which power, of x itself
_REDUCTIONS = {**dict.fromkeys(("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"), 1.0), **_OF_SQUARES}
_SUMS = {"ReduceSum", *_OF_SQUARES}
_INTEGERS = (ir.AttributeType.INT, ir.AttributeType.INTS)
_MAX_RANK = 8


class Layer(NamedTuple):
    """A layer by its name in the network, or by that of a node, and its class where that is known."""

    name: str
    kind: str


def frn_note(layers: Iterable[Layer]) -> Iterator[str]:
    """The line of what to do about layers that `loose_frn` found; none for none."""
    yield from _note(layers, "filter response normalization (FRN) in loose operators, which is slow", "FRN2d")


def mabn_note(layers: Iterable[Layer]) -> Iterator[str]:
    """The line of what to do about layers that `loose_mabn` found; none for none."""
    yield from _note(layers, "a running second moment (MABN) that does not fold", "MABN2d")


def _note(layers: Iterable[Layer], found: str, ours: str) -> Iterator[str]:
    names = [f"{name or 'the network itself'}{f' ({kind})' if kind else ''}" for name, kind in dict.fromkeys(layers)]
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"{found}: {', '.join(names[:_NAMED])}{more}; before the export {replace_by(ours)}"


def replace_by(layer: str) -> str:
    """What to do about a layer, in favour of ours."""
    return f"replace it by deploynorm.layers.{layer}, with its parameters, where it computes that"


def loose_frn(graph: ir.Graph) -> list[Layer]:
    """The layers of a graph that compute x * mean(x^2 over space)^-0.5 in operators of ONNX."""
    return [_layer(node) for node in graph.all_nodes() if node.domain == "" and _is_frn(node)]


def _is_frn(node: ir.Node) -> bool:
    """Whether the node is the reduction of an FRN, from which all else is found."""
    x = _input(node, 0)
    if x is None or not node.outputs:
        return False
    if node.op_type == "RMSNormalization":
        return _rank(x) >= 4 and _attribute(node, "axis") in (2, 2 - _rank(x))
    if node.op_type not in _REDUCTIONS or (axes := _reduced(node, x)) is None:
        return False
    if node.op_type not in _OF_SQUARES:
        square = _behind(x).producer()
        if square is None or not _is_square(square) or (x := _input(square, 0)) is None:
            return False
        size = x.producer()
        if size is not None and size.op_type == "Abs" and (of := _input(size, 0)) is not None:
            x = of
    x = _scaled(x)
    return not _is_centred(x) and _divides(x, node, axes)


def _divides(x: ir.Value, reduction: ir.Node, axes: frozenset[int]) -> bool:
    """Whether x is multiplied by what a node reduces from its squares, when that is mean(x^2) to the power -0.5."""
    # A value, mean(x^2) to which power it is, over which axes, and whether a sum was divided by the count already.
    is_mean = reduction.op_type not in _SUMS
    waiting, seen = [(reduction.outputs[0], _REDUCTIONS[reduction.op_type], axes, is_mean)], set()
    while waiting:
        value, power, over, is_mean = waiting.pop()
        if (value, power, over, is_mean) in seen:
            continue
        seen.add((value, power, over, is_mean))
        for node, position in value.uses():
            others = [each for i, each in enumerate(node.inputs) if i != position and each is not None]
            fixed = all(map(_is_fixed, others))
            divided, reduced, exponent = is_mean, over, 0.0
            operator = node.op_type
            if operator in _EXPONENTS:
                exponent = _EXPONENTS[operator]
            elif operator == "Pow" and position == 0 and others:
                exponent = _number(others[0]) or 0
            elif operator in ("Mul", "Div") and len(others) == 1:
                exponent = -1 if operator == "Div" and position == 1 else 1
                is_x = _scaled(others[0]) is x
                if is_x and power * exponent == -0.5 and is_mean and _over_space(over, _rank(x)):
                    return True
                divided = True
                exponent *= fixed
            elif operator in ("ReduceMean", "ReduceSum"):
                exponent, reduced = 1, over | (_reduced(node, value) or frozenset())
            elif (operator in _RESHAPED and position == 0) or (operator in _SHIFTED and fixed):
                exponent = 1
            if exponent and node.outputs and node.domain == "":
                waiting.append((node.outputs[0], power * exponent, reduced, divided))
    return False


def _reduced(node: ir.Node, value: ir.Value) -> frozenset[int] | None:
    """The axes of a value that a node reduces, as those of the map that it is a view of; None where not known."""
    rank = _rank(value)
    if node.op_type == "GlobalAveragePool":
        return frozenset(range(2, max(rank, 4)))
    if node.op_type == "AveragePool":
        shape = node.outputs[0].shape
        return frozenset(range(2, rank)) if shape is not None and all(size == 1 for size in shape[2:]) else None
    attribute, given = _attribute(node, "axes"), _input(node, 1)
    axes = attribute if isinstance(attribute, Sequence) else [] if given is None else _numbers(given)
    before = _behind(value, _VIEWS)
    square = before.producer()
    if square is not None and _is_square(square) and (x := _input(square, 0)) is not None:
        before = _behind(x, _VIEWS)
    map_rank = _rank(before)
    if rank == 3 and map_rank >= 4 and set(axes) in ({2}, {-1}):  # of a view (N, C, H * W)
        return frozenset(range(2, map_rank))
    return frozenset(int(axis) + rank if axis < 0 else int(axis) for axis in axes) or None


def _over_space(axes: frozenset[int], rank: int) -> bool:
    """Whether these are all axes of (N, C, ...) or (N, ..., C) but N and C. Of (N, C, L) nobody can tell which is C."""
    if rank:
        return rank >= 4 and axes in (frozenset(range(2, rank)), frozenset(range(1, rank - 1)))
    return axes in map(frozenset, ({2, 3}, {2, 3, 4}, {1, 2}, {-1, -2}, {-1, -2, -3}))


def _is_square(node: ir.Node) -> bool:
    x, other = _input(node, 0), _input(node, 1)
    return other is not None and (
        (node.op_type == "Mul" and other is x) or (node.op_type, _number(other)) == ("Pow", 2)
    )


def _is_centred(x: ir.Value) -> bool:
    """Whether a mean was subtracted from it: an instance or layer normalization, written by hand."""
    node = x.producer()
    mean = None if node is None or node.op_type != "Sub" else _input(node, 1)
    mean_of = None if mean is None else _behind(mean).producer()
    return mean_of is not None and mean_of.op_type in _REDUCTIONS


def _behind(value: ir.Value, through: Collection[str] = _RESHAPED) -> ir.Value:
    """The value that this one is a view or a cast of."""
    while (node := value.producer()) is not None and node.op_type in through and (x := _input(node, 0)) is not None:
        value = x
    return value


def _scaled(value: ir.Value) -> ir.Value:
    """The value that this one is a view, a cast or a multiple of."""
    while (node := (value := _behind(value)).producer()) is not None and node.op_type == "Mul":
        free = [each for each in node.inputs if each is not None and not _is_fixed(each)]
        if len(free) != 1:
            break
        value = free[0]
    return value


def _is_fixed(value: ir.Value) -> bool:
    """Whether it depends on weights and sizes alone."""
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        node = each.producer()
        if each in seen or each.is_initializer() or each.const_value is not None:
            continue
        if node is None:
            return False
        seen.add(each)
        if node.op_type not in ("Constant", "Shape", "Size"):
            waiting += [parent for parent in node.inputs if parent is not None]
    return True


def _numbers(value: ir.Value) -> list[float]:
    """Of a constant of a few numbers; none where it is another, or its values are in a file of their own."""
    constant = ir.convenience.get_const_tensor(value)
    if constant is None or isinstance(constant, ir.ExternalTensor) or not 0 < constant.size <= _MAX_RANK:
        return []
    array = constant.numpy()
    return [float(number) for number in array.ravel()] if array.dtype.kind in "fiu" else []


def _number(value: ir.Value) -> float | None:
    numbers = _numbers(value)
    return numbers[0] if len(numbers) == 1 else None


def _attribute(node: ir.Node, name: str) -> object:
    attribute = node.attributes.get(name)
    return None if attribute is None or attribute.type not in _INTEGERS else attribute.value


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if position < len(node.inputs) else None


def _rank(value: ir.Value) -> int:
    """0 where it is not known."""
    return 0 if value.shape is None else len(value.shape)


def _layer(node: ir.Node) -> Layer:
    """The layer that a node is of, as torch notes it, else the node itself."""
    try:
        names, kinds = (
            json.loads(node.metadata_props[f"pkg.torch.onnx.{key}"].replace("'", '"'))
            for key in ("name_scopes", "class_hierarchy")
        )
        return Layer(names[-2], kinds[-2].rsplit(".", 1)[-1])
    except (KeyError, ValueError, IndexError, AttributeError, TypeError, RecursionError):
        return Layer(f"node {node.name or node.outputs[0].name}", "")


def loose_mabn(program: ExportedProgram) -> list[Layer]:
    """The layers of a trace that multiply an activation by a buffer to the power -0.5.

    One that reads a second buffer of as many values, a running mean, is a batch normalization of its own.
    """
    signature = program.graph_signature
    stored = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
    fixed = {node for node in program.graph.nodes if node.op == "placeholder" and node.name in stored}
    fixed |= {node for node in program.graph.nodes if node.op == "get_attr"}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
    buffers = [node for node in program.graph.nodes if node in fixed and node.name in signature.inputs_to_buffers]
    found = []
    for buffer in buffers:
        if (end := _normalized_by(buffer, fixed)) is not None:
            layer = _called(end)
            same = [each for each in buffers if each.meta["val"].numel() == buffer.meta["val"].numel()]
            if layer is not None and _read(layer, program.graph.nodes, fixed).intersection(same) == {buffer}:
                found.append(layer)
    return found


_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
_SAME = {"add", "clamp", "clamp_min", "expand", "maximum", "reshape", "to", "unsqueeze", "view", "_to_copy"}


def _normalized_by(buffer: fx.Node, fixed: set[fx.Node]) -> fx.Node | None:
    """The operator that multiplies an activation by the buffer, shifted by an epsilon, to the power -0.5."""
    from deploynorm.trace import operator_name  # an ONNX file is searched where torch is not installed

    waiting, seen = [(buffer, 1.0)], set()
    while waiting:
        node, power = waiting.pop()
        if (node, power) in seen:
            continue
        seen.add((node, power))
        for reader in node.users:
            name = operator_name(reader)
            step: float | None = None
            if name in _SAME:
                step = power
            elif name in _POWERS:
                step = power * _POWERS[name]
            elif name == "pow" and reader.args[0] is node and isinstance(reader.args[1], int | float):
                step = power * reader.args[1]
            elif name in ("mul", "div"):
                step = -power if name == "div" and reader.args[1] is node else power
                if reader not in fixed:
                    if step == -0.5:
                        return reader
                    continue
            if step is not None and reader in fixed:
                waiting.append((reader, step))
    return None


def _read(layer: Layer, nodes: Iterable[fx.Node], fixed: set[fx.Node]) -> set[fx.Node]:
    """The parameters, buffers and what is computed from them alone that a layer's operators read."""
    waiting = [x for node in nodes if _called(node) == layer for x in node.all_input_nodes]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in fixed and node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return seen


def _called(node: fx.Node) -> Layer | None:
    """The layer whose forward calls the operator."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return None
    path, kind = stack[-1]
    return Layer(path.split("@")[0], str(kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1])
