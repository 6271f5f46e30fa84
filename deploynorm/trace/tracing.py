"""nn.Module -> torch.export program: what fold reads and what export translates."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from deploynorm.errors import InputError, ModelError
from deploynorm.layers.ops import kept_whole
from deploynorm.quiet import first_line, quiet
from deploynorm.trace.branches import branches
from deploynorm.trace.copies import disposable_copy, is_archive, refuse_training
from deploynorm.trace.examples import ExampleInputs, Examples, Forward
from deploynorm.trace.outputs import plain_outputs
from deploynorm.trace.sizes import Place, Sizes, axis_kind, find_sizes
from deploynorm.trace.suppression import suppression_as_operator

DynamicKind = Literal["none", "batch", "spatial", "all"]
"""Which input axes may change: axis 0 is the batch, axes 2 and up are spatial."""

Dynamic = DynamicKind | Mapping[str, Mapping[int, str]]
"""A word, or for each input the axes that may change, with a name for each: {"x": {0: "N", 2: "H", 3: "W"}}."""


_LruCache = type(lru_cache(len))


def trace(
    model: nn.Module,
    example_inputs: ExampleInputs | Examples,
    dynamic: Dynamic | None = None,
    *,
    fixed: Collection[str] = (),
    sizes: Sizes | None = None,
    deterministic: bool = True,
) -> ExportedProgram:
    """Traces a network in evaluation mode with torch.export.

    Args:
        model: The network.
        example_inputs: See `deploynorm.export`. Sizes above 1 on spatial axes that are to be dynamic.
        dynamic: As in `deploynorm.export`. With None an axis that the network branches on is dynamic in the trace,
            which then holds for some sizes only: see `narrowed_axes`.
        fixed: With None, the kinds of axes ("batch", "spatial") that stay as in the example all the same.
        sizes: What `find_sizes` found, where it was asked already.
        deterministic: Refuse a network that does not compute the same each time: see `refuse_training`.

    Raises:
        InputError: An example input is not a tensor, or `dynamic` names an input or axis that is not there.
        ModelError: torch.export cannot trace the network, or the network fixes an axis that must be dynamic, draws
            random numbers, or normalizes by the statistics of the batch.
    """
    examples = Examples.of("trace", model, example_inputs)
    examples = examples.replaced(example.detach().cpu() for example in examples)
    places: Collection[Place] = ()
    if dynamic != "none" and sizes is None:
        sizes = find_sizes(model, examples)
    if dynamic is None and sizes is not None:
        places = [place for place in sizes.places if axis_kind(place[1]) not in fixed]
    elif dynamic is not None and sizes is not None:
        places = dynamic_places(examples, dynamic)
        if refused := places - sizes.places:
            if any(axis == 1 for _, axis in refused):
                raise _not_free(model, dynamic, "axis 1 of an input is taken for its channels, which stay fixed")
            kinds = sorted({axis_kind(axis) for _, axis in refused})
            raise _not_free(model, dynamic, f"it refuses another {' or '.join(kinds)} size")
    program = _export(model, examples, places, Dim.AUTO if dynamic in (None, "none") else Dim.DYNAMIC)
    if deterministic:
        refuse_training(program.graph.nodes, f"trace of {type(model).__name__}", archive=is_archive(model))
    if dynamic not in (None, "none") and (
        narrowed := narrowed_axes(program) or branches(program, model, examples, sizes)
    ):
        raise _not_free(model, dynamic, f"it branches on {'; '.join(narrowed)}")
    return program


def dynamic_places(examples: Examples, dynamic: Dynamic) -> set[Place]:
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
    names = examples.names
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
        expected = f"0 to {examples.tensors[position].dim() - 1}"
        raise InputError("dynamic", f"input {names[position]} has no axis {axis}", expected=expected)
    return wanted


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


def doubled(examples: Examples, places: Collection[Place]) -> Examples:
    """The examples, those of batch 1 as a batch of 2 where it is to be dynamic: a trace takes a size of 1 for fixed."""
    return examples.replaced(
        torch.cat([example, example]) if (position, 0) in places and len(example) == 1 else example
        for position, example in enumerate(examples)
    )


def _export(model: nn.Module, examples: Examples, places: Collection[Place], kind: Any) -> ExportedProgram:
    examples = doubled(examples, places)
    shapes = [
        {axis: kind for axis in range(example.dim()) if (position, axis) in places}
        for position, example in enumerate(examples)
    ]
    positional, named = examples.arguments.split(examples.tensors)
    where, forward = f"trace of {type(model).__name__}", Forward(model)
    if places and (loose := forward.loose(examples.arguments)):
        problem = "torch.export takes no dynamic axes of a network with inputs in **kwargs"
        fix = "name them in the signature of forward, or pass dynamic='none' (--dynamic none)"
        raise ModelError(where, problem, got=", ".join(loose), fix=fix)
    dynamic_shapes = forward.bind(examples.arguments, shapes) if places else None
    got = "inputs of shape " + ", ".join(str(tuple(example.shape)) for example in examples)
    try:
        twin = disposable_copy(model)  # torch leaves its own tensors in attributes that forward sets
        # torch.fx prints the graph so far where values decide what is computed.
        with (
            torch.no_grad(),
            quiet(),
            redirect_stderr(io.StringIO()),
            plain_outputs(twin),
            _functions_forget(twin),
            suppression_as_operator(),
            kept_whole(),
        ):
            return torch.export.export(twin, positional, named, dynamic_shapes=dynamic_shapes)
    except InputError as error:
        raise ModelError(where, f"the network refuses the example input: {error}", got=got) from error
    except Exception as error:
        if "Constraints violated" in str(error) or ("marked" in str(error) and "specialized" in str(error)):
            problem = f"axes that must be dynamic are fixed, or are always of one size with others: {first_line(error)}"
            fix = "name the axes of the same size in the other inputs too, or leave the choice out"
        else:
            problem = f"torch.export cannot trace the network: {type(error).__name__}: {first_line(error)}"
            types = {x.dtype for x in (*model.parameters(), *examples) if x.is_floating_point()}
            if len(types) > 1:
                problem += "; the network and its inputs are of several types: "
                problem += ", ".join(sorted(str(each).removeprefix("torch.") for each in types))
            fix = "check the input shape first; control flow that depends on values has to go (torch.cond, torch.where)"
            if places:
                fix += "; what depends on sizes may pass with dynamic='none' (--dynamic none), which fixes them all"
        raise ModelError(where, problem, got=got, fix=fix) from error


@contextmanager
def _functions_forget(model: nn.Module) -> Iterator[None]:
    """Empties the lru_caches beside the classes of a network that a trace has filled, with tensors without values."""
    classes = {type(module) for module in model.modules()}
    places = classes | {sys.modules.get(each.__module__, each) for each in classes}
    caches = [each for place in places for each in vars(place).values() if isinstance(each, _LruCache)]
    before = [cache.cache_info().currsize for cache in caches]
    try:
        yield
    finally:
        for cache, size in zip(caches, before, strict=True):
            if cache.cache_info().currsize != size:
                cache.cache_clear()


def _not_free(model: nn.Module, dynamic: Dynamic, reason: str) -> ModelError:
    problem = f"the network fixes a size that dynamic={dynamic!r} requires to be dynamic: {reason}"
    fix = "leave the choice out, or name fewer axes (none, batch, spatial, all)"
    return ModelError(f"trace of {type(model).__name__}", problem, fix=fix)
