"""Names of a graph's inputs, outputs and dynamic axes: checked, and unlike those of all other values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
from torch.export import ExportedProgram
from torch.utils import _pytree

from deploynorm.errors import InputError
from deploynorm.trace import Dynamic, axis_letter


def as_names(option: str, names: str | Sequence[str] | None, count: int | None = None) -> tuple[str, ...] | None:
    """The names that a user gave, a bare string being the one name, or None where none were.

    Raises:
        InputError: No list; another number of names than `count`; one that is empty, no text, or given twice.
    """
    if names is None:
        return None
    if not isinstance(names, Iterable):
        raise InputError("export", f"{option} is no list of names", got=repr(names), expected="text, or a list of it")
    names = (names,) if isinstance(names, str) else tuple(names)
    given: tuple[object, ...] = names
    for name in given:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError("export", f"{option} has a name that is no text", got=repr(name))
    if twice := [name for position, name in enumerate(names) if name in names[:position]]:
        raise InputError("export", f"{option} has a name twice", got=repr(twice[0]))
    if count is not None and len(names) != count:
        got = f"{len(names)}: {', '.join(map(repr, names))}"
        raise InputError("export", f"{option} has another number of names", got=got, expected=f"{count}, as a list")
    return names


def as_patterns(keep_float32: Sequence[str]) -> tuple[str, ...]:
    """The names or patterns of layers that a user gave; InputError unless they are a list of text."""
    given: object = keep_float32
    names = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise InputError("keep_float32", "not names of layers", got=repr(given), expected="a list of text")
    return names


def by_argument(dynamic: Dynamic | None, input_names: Sequence[str], arguments: Sequence[str]) -> Dynamic | None:
    """Dynamic axes by the names of forward's arguments, where they were given by the names that the inputs get."""
    if not isinstance(dynamic, Mapping):
        return dynamic
    argument_of = dict(zip(input_names, arguments, strict=True))
    return {name if name in arguments else argument_of.get(name, name): axes for name, axes in dynamic.items()}


def default_output_names(program: ExportedProgram, count: int) -> list[str]:
    """The keys, of a network that returns dicts: "out", "aux_out" of one in another, "boxes_1" of the second in a list.

    A list of one dict has its keys. Of all else "output", or "output_0" and so on.
    """
    returned = program.call_spec.out_spec
    if returned is not None:
        leaves, _ = _pytree.tree_flatten_with_path(_pytree.tree_unflatten(range(returned.num_leaves), returned))
        only = returned.type in (list, tuple) and returned.num_children == 1
        paths = [path[only:] for path, _ in leaves]
        names = [_name(path) for path in paths]
        keyed = all(any(isinstance(step, _pytree.MappingKey) for step in path) for path in paths)
        if keyed and len(names) == len(set(names)) == count and all(x.strip() and x.isprintable() for x in names):
            return names
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _name(path: Sequence[object]) -> str:
    """The keys on the way to an output, then its places in lists."""
    keys = [str(step.key) for step in path if isinstance(step, _pytree.MappingKey)]
    return "_".join([*keys, *(str(step.idx) for step in path if isinstance(step, _pytree.SequenceKey))])


def name_inputs_and_outputs(model: ir.Model, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Names the graph's inputs and outputs, in place; any other value of such a name gets another.

    1. An output that is an input too, or another output, becomes a copy (Identity): ONNX has one name for a value.
    2. An output of the name of an input is called NAME_output.
    """
    graph = model.graph
    taken: set[ir.Value] = set(graph.inputs)
    for position, value in enumerate(graph.outputs):
        if value in taken or value.is_initializer():  # case 1
            copied = ir.val(None, value.dtype, value.shape)
            graph.append(ir.node("Identity", [value], outputs=[copied]))
            graph.outputs[position] = value = copied
        taken.add(value)
    outputs: list[str] = []
    for name in output_names:
        while name in input_names or name in outputs:  # case 2
            name += "_output"
        outputs.append(name)
    reserved = {*input_names, *outputs}
    names = {str(value.name) for value in _all_values(graph)} | reserved
    for value in _all_values(graph):
        if value.name in reserved:
            value.name = next(name for n in itertools.count(1) if (name := f"{value.name}_{n}") not in names)
            names.add(value.name)
    for value, name in zip((*graph.inputs, *graph.outputs), (*input_names, *outputs), strict=True):
        value.name = name


def name_axes(model: ir.Model, given: Mapping[tuple[int, int], str]) -> None:
    """Renames torch's symbols (s77) on every value, in place: as given by input and axis, else N, then L, H and W, or
    D, H and W.

    Raises:
        InputError: Two names for axes that are always of one size, or one name for two sizes.
    """
    names: dict[str, str] = {}
    places = [(i, axis) for i, value in enumerate(model.graph.inputs) for axis in range(len(value.shape or ()))]
    for i, axis in sorted(places, key=lambda place: place not in given):
        value = model.graph.inputs[i]
        size = value.shape[axis] if value.shape is not None else 0
        if isinstance(size, int) or size.value is None:
            continue
        name = given.get((i, axis))
        if size.value in names:
            if name not in (None, names[size.value]):
                got = f"{names[size.value]} and {name}"
                raise InputError("dynamic", "two names for axes that always have one size", got=got)
            continue
        if name in names.values():
            raise InputError("dynamic", "one name for axes of different sizes", got=name)
        letter = name or axis_letter(len(value.shape or ()), axis)
        names[size.value] = letter if letter not in names.values() else f"{letter}_{value.name}"
    if not names:
        return
    symbols = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in _all_values(model.graph):
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            size
            if isinstance(size, int) or size.value is None
            else ir.SymbolicDim(symbols.sub(lambda found: names[found.group()], size.value))
            for size in value.shape
        )


def _all_values(graph: ir.Graph) -> Iterable[ir.Value]:
    """Every value of a graph and of its subgraphs, each once."""
    values: dict[ir.Value, None] = {}
    for each in (graph, *graph.subgraphs()):
        outputs = (value for node in each for value in node.outputs)
        values |= dict.fromkeys((*each.inputs, *each.initializers.values(), *outputs))
    return values
