"""nn.Module -> torch.export program: what fold reads and what export translates."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from deploynorm.errors import InputError, ModelError
from deploynorm.layers.adopt import adopt
from deploynorm.trace.sizes import Place, Sizes, axis_kind, find_sizes

DynamicKind = Literal["none", "batch", "spatial", "all"]
"""Which input axes may change: axis 0 is the batch, axes 2 and up are spatial."""

Dynamic = DynamicKind | Mapping[str, Mapping[int, str]]
"""A word, or for each input the axes that may change, with a name for each: {"x": {0: "N", 2: "H", 3: "W"}}."""


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy of the network on the CPU, in evaluation mode, with other projects' FRN layers taken over."""
    try:
        with quiet():
            twin = copy.deepcopy(model).cpu().requires_grad_(False)
    except Exception as error:
        problem = f"the network cannot be copied: {first_line(error)}"
        fix = "remove what does not deep-copy (hooks, open files, non-leaf tensors)"
        raise ModelError(type(model).__name__, problem, fix=fix) from error
    if isinstance(twin, fx.GraphModule):
        _refuse_training_graph(twin)
    return adopt(twin).eval()


def as_inputs(where: str, example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Positional inputs of forward as a tuple; a bare tensor is the only one.

    Raises:
        InputError: There is none, or one of them is not a tensor.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    fix = "pass the tensors that forward takes, in order: (x,) or x; torch.from_numpy makes one of an array"
    given: object = example_inputs
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise InputError(where, "example_inputs is no tuple of tensors", got=type(given).__name__, fix=fix)
    for position, example in enumerate(given):
        if not isinstance(example, Tensor):
            raise InputError(where, f"example input {position} is not a tensor", got=type(example).__name__, fix=fix)
    if not given:
        raise InputError(where, "there are no example inputs", fix=fix)
    return tuple(given)


def trace(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    dynamic: Dynamic | None = None,
    *,
    fixed: Collection[str] = (),
    sizes: Sizes | None = None,
) -> ExportedProgram:
    """Traces a network in evaluation mode with torch.export.

    Args:
        model: The network.
        example_inputs: Positional inputs of forward. Sizes above 1 on spatial axes that are to be dynamic.
        dynamic: As in `deploynorm.export`. With None an axis that the network branches on is dynamic in the trace,
            which then holds for some sizes only: see `narrowed_axes`.
        fixed: With None, the kinds of axes ("batch", "spatial") that stay as in the example all the same.
        sizes: What `find_sizes` found, where it was asked already.

    Raises:
        InputError: An example input is not a tensor, or `dynamic` names an input or axis that is not there.
        ModelError: torch.export cannot trace the network, or the network fixes an axis that must be dynamic.
    """
    examples = [example.detach().cpu() for example in as_inputs("trace", example_inputs)]
    if dynamic == "none":
        return _export(model, examples, (), Dim.AUTO)
    if sizes is None:
        sizes = find_sizes(model, examples)
    if dynamic is None:
        places = [place for place in sizes.places if axis_kind(place[1]) not in fixed]
        return _export(model, examples, places, Dim.AUTO)
    wanted = dynamic_places(model, examples, dynamic)
    if refused := wanted - sizes.places:
        kinds = sorted({axis_kind(axis) for _, axis in refused})
        raise _not_free(model, dynamic, f"it refuses another {' or '.join(kinds)} size")
    program = _export(model, examples, wanted, Dim.DYNAMIC)
    if narrowed := narrowed_axes(program):
        raise _not_free(model, dynamic, f"it branches on {'; '.join(narrowed)}")
    return program


def dynamic_places(model: nn.Module, examples: Sequence[Tensor], dynamic: Dynamic) -> set[Place]:
    """The axes that `dynamic` names, by position of the input.

    Raises:
        InputError: There is no such input or axis.
    """
    axes = {(i, axis) for i, example in enumerate(examples) for axis in range(example.dim())}
    if not isinstance(dynamic, Mapping):
        if dynamic not in get_args(DynamicKind):
            raise InputError("dynamic", "unknown word", got=repr(dynamic), expected=", ".join(get_args(DynamicKind)))
        kinds = {"all": ("batch", "spatial"), "none": ()}.get(dynamic, (dynamic,))
        return {place for place in axes if place[1] != 1 and axis_kind(place[1]) in kinds}
    names = argument_names(model, len(examples))
    wanted: set[Place] = set()
    for name, named in dynamic.items():
        given: object = named
        if not isinstance(given, Mapping) or not all(
            isinstance(axis, int) and isinstance(symbol, str) and symbol.isidentifier()
            for axis, symbol in given.items()
        ):
            raise InputError("dynamic", f"not axes of input {name!r} with their names", got=given, expected='{0: "N"}')
        if name not in names and not (name == "" and len(names) == 1):
            raise InputError("dynamic", f"the network has no input {name!r}", expected=", ".join(names))
        position = names.index(name) if name else 0
        wanted |= {(position, axis) for axis in named}
    if missing := sorted(wanted - axes):
        position, axis = missing[0]
        expected = f"0 to {examples[position].dim() - 1}"
        raise InputError("dynamic", f"input {names[position]} has no axis {axis}", expected=expected)
    return wanted


def argument_names(model: nn.Module, count: int | None = None) -> list[str]:
    """Names of the positional arguments of forward, or of the first of them; x, x_1 and so on for *args."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    count = max(1, len(named)) if count is None else count
    return [*named, "x", *(f"x_{position}" for position in range(1, count))][:count]


def narrowed_axes(program: ExportedProgram) -> dict[str, str]:
    """Dynamic axes of which a trace holds for some sizes only: the axis and these sizes -> "batch" or "spatial"."""
    narrowed: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in program.graph_signature.user_inputs:
            continue
        for axis, size in enumerate(getattr(node.meta["val"], "shape", ())):
            if not isinstance(size, torch.SymInt):
                continue
            if (bounds := program.range_constraints.get(size.node.expr)) is None:
                continue
            # A convolution narrows a spatial axis from below on its own; torch assumes 2 and up for any axis.
            low = int(bounds.lower) if axis == 0 and bounds.lower > 2 else None
            high = int(bounds.upper) if bounds.upper.is_finite and bounds.upper < 2**31 else None
            if low is not None or high is not None:
                span = f"{low if low is not None else 1} to {high if high is not None else 'any'}"
                narrowed[f"axis {axis} of {node.name}: {span}"] = axis_kind(axis)
    return narrowed


def doubled(examples: Sequence[Tensor], places: Collection[Place]) -> list[Tensor]:
    """The examples, those of batch 1 as a batch of 2 where it is to be dynamic: a trace takes a size of 1 for fixed."""
    return [
        torch.cat([example, example]) if (position, 0) in places and len(example) == 1 else example
        for position, example in enumerate(examples)
    ]


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keeps warnings and logs of torch, and of further loggers, from the user of export: what matters is raised."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch", *names))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop, to stand inside another message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _export(
    model: nn.Module, example_inputs: Sequence[Tensor], places: Collection[Place], kind: Any
) -> ExportedProgram:
    example_inputs = doubled(example_inputs, places)
    shapes = tuple(
        {axis: kind for axis in range(example.dim()) if (position, axis) in places}
        for position, example in enumerate(example_inputs)
    )
    code = getattr(type(model).forward, "__code__", None)
    takes_star_args = code is not None and code.co_flags & 0x04 and code.co_argcount == 1
    dynamic_shapes: Any = (shapes,) if takes_star_args else shapes
    where = f"trace of {type(model).__name__}"
    got = "inputs of shape " + ", ".join(str(tuple(example.shape)) for example in example_inputs)
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(model, tuple(example_inputs), dynamic_shapes=dynamic_shapes)
    except InputError as error:
        raise ModelError(where, f"the network refuses the example input: {error}", got=got) from error
    except Exception as error:
        if "Constraints violated" in str(error) or ("marked" in str(error) and "specialized" in str(error)):
            problem = f"axes that must be dynamic are fixed, or are always of one size with others: {first_line(error)}"
            fix = "name the axes of the same size in the other inputs too, or leave the choice out"
        else:
            problem = f"torch.export cannot trace the network: {type(error).__name__}: {first_line(error)}"
            fix = "check the input shape first; control flow that depends on values has to go (torch.cond, torch.where)"
        raise ModelError(where, problem, got=got, fix=fix) from error


def _not_free(model: nn.Module, dynamic: Dynamic, reason: str) -> ModelError:
    problem = f"the network fixes a size that dynamic={dynamic!r} requires to be dynamic: {reason}"
    fix = "leave the choice out, or name fewer axes (none, batch, spatial, all)"
    return ModelError(f"trace of {type(model).__name__}", problem, fix=fix)


def _refuse_training_graph(model: fx.GraphModule) -> None:
    """The module of a torch.export archive keeps the mode that it was traced in, whatever eval() says."""
    aten = torch.ops.aten
    training_argument = {aten.batch_norm.default: 5, aten.dropout.default: 2}
    for node in model.graph.nodes:
        position = training_argument.get(node.target)
        if position is not None and node.args[position]:
            problem = f"the archive was traced in training mode (node {node.name})"
            raise ModelError(type(model).__name__, problem, fix="call model.eval() before torch.export.export")
