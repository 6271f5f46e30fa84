"""Where a network branches on the sizes of its inputs, so that a trace of it holds for some of them only."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from deploynorm.inputs import Shape
from deploynorm.quiet import quiet
from deploynorm.trace.copies import disposable_copy
from deploynorm.trace.examples import Examples
from deploynorm.trace.outputs import alike, tensors_of
from deploynorm.trace.sizes import Place, Sizes, axis_kind, axis_letter

_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_ONE_SIZE = re.compile(rf"{_SIZE.pattern} == \d+")
"""What torch assumes where Python asked for a size as a plain number: what it did with that cannot be known."""
_NUMBER = re.compile(r"\b\d{1,9}\b")
_RUNS = 12
"""Times that a trace is compared with its network at most. Most networks need two or three, on small inputs."""
_SHARES = (*(1.25**n for n in range(-18, 26)),)
"""Of the examples' sizes, rounded to what the network takes."""
_STEPS = range(-8, 17)
"""By which sizes change as well, for conditions on remainders."""
_ELEMENTS = 2**21
"""That the inputs of a run have together at most, or twice those of the examples."""
_RTOL = 1e-2
"""Of the largest value: of what another branch computes, and not of the rounding of a network in float16."""


def branches(program: ExportedProgram, model: nn.Module, examples: Examples, sizes: Sizes | None) -> dict[str, str]:
    """Conditions on sizes under which alone a trace computes what the network does -> "batch" or "spatial".

    torch assumes conditions whenever it compares sizes, most of them for no more than the strides of a tensor. So those
    that other sizes break are tried: the trace and the network run there, and a condition counts where they differ.

    Args:
        program: A trace of the network on the examples, in which axes are dynamic.
        model: The network.
        examples: Those that it was traced with.
        sizes: The sizes that the network takes, where they are known; else each dynamic axis may change alone.
    """
    dynamic = _dynamic_axes(program)
    groups = [{place: 1} for place in dynamic] if sizes is None else sizes.groups
    free = [{place: step for place, step in group.items() if place in dynamic} for group in groups]
    return _Comparison(program, model, examples).branches([group for group in free if group])


@dataclass
class _Comparison:
    program: ExportedProgram
    model: nn.Module
    examples: Examples

    def branches(self, groups: Sequence[Mapping[Place, int]]) -> dict[str, str]:
        names = self.examples.names
        axes = (place for group in groups for place in group)  # a dynamic one is never 1 for torch, without a condition
        texts = [
            *map(self._by_input, getattr(self.program, "_guards_code", ())),
            *(f"L['{names[i]}'].size()[{axis}] != 1" for i, axis in axes),
        ]
        conditions = {text: compile(text, "condition", "eval") for text in texts}
        numbers = {int(number) for text in texts for number in _NUMBER.findall(_SIZE.sub("", text))}
        tried = []
        for shapes in self._other_shapes(groups, numbers):
            sizes = {"L": dict(zip(self.examples.names, map(_Sized, shapes), strict=True)), "max": max, "min": min}
            tried.append((shapes, {text for text, code in conditions.items() if not _holds(code, sizes)}))
        found = {self._readable(text): self._kind(text) for text in texts if _ONE_SIZE.fullmatch(text)}
        settled: set[str] = set()
        refused = Counter[frozenset[str]]()
        order = _quickest
        for _ in range(0 if found else _RUNS):
            left = [(shapes, broken - settled) for shapes, broken in tried if broken - settled]
            if not left:
                break
            shapes, broken = min(left, key=lambda case: (refused[frozenset(case[1])], *order(case)))
            agree = self._agrees(shapes)
            if agree is False and len(broken) > 1 and order is _quickest:
                order = _clearest
                continue
            tried = [each for each in tried if each[0] is not shapes]
            if agree is None:
                refused[frozenset(broken)] += 1
            else:
                settled |= broken
            if agree is False:
                text = min(broken)
                found[self._readable(text)] = self._kind(text)
                tried = [each for each in tried if text not in each[1]]  # where it is broken, no other one shows
        return found

    def _other_shapes(self, groups: Sequence[Mapping[Place, int]], numbers: Iterable[int]) -> list[_Shapes]:
        """Shapes with one group of axes smaller or larger, the spatial ones, or all: few enough elements to run."""
        spatial = [group for group in groups if any(axis for _, axis in group)]
        limit = max(_ELEMENTS, 2 * sum(example.numel() for example in self.examples))
        found: set[_Shapes] = set()
        for some in [*([group] for group in groups), spatial, groups]:
            counts = [self._counts(group, numbers) for group in some]
            for each in zip(*counts, strict=True):
                growth = {place: n * step for n, group in zip(each, some, strict=True) for place, step in group.items()}
                found.add(self.examples.grown_shapes(growth))
        fit = [shapes for shapes in found if sum(map(prod, shapes)) <= limit]
        return [shapes for shapes in fit if all(size > 0 for shape in shapes for size in shape)]

    def _counts(self, group: Mapping[Place, int], numbers: Iterable[int]) -> list[int]:
        """By how many steps a group of axes grows: a few, to shares of its size, and to the numbers of conditions."""
        (position, axis), step = next(iter(group.items()))
        size = self.examples.tensors[position].shape[axis]
        near = [(number - size) // step + less for number in numbers for less in (-1, 0, 1)]
        return [*_STEPS, *((int(size * share) - size) // step for share in _SHARES), *near]

    def _agrees(self, shapes: _Shapes) -> bool | None:
        """Whether the trace computes what the network does there; None where the network refuses these sizes."""
        examples = self.examples
        for axis in range(max(map(len, shapes))):
            examples = examples.replaced(
                x.index_select(axis, torch.arange(shape[axis]) % x.shape[axis]) if axis < x.dim() else x
                for x, shape in zip(examples, shapes, strict=True)
            )
        # torch.fx prints the traceback of what fails in a trace.
        with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet(), redirect_stderr(io.StringIO()):
            try:
                want = tensors_of(examples.run(disposable_copy(self.model)))
            except Exception:  # of any type
                return None
            try:
                return alike(tensors_of(examples.run(disposable_copy(self._traced))), want, _RTOL)
            except Exception:
                return False

    @cached_property
    def _traced(self) -> nn.Module:
        traced = self.program.module(check_guards=False)
        traced._forward_pre_hooks.clear()  # which check the sizes as well
        return traced

    def _by_input(self, condition: str) -> str:
        """The condition with inputs by their names, where it takes them out of the lists and dicts of arguments."""
        for source, name in self.examples.arguments.sources().items():
            condition = condition.replace(source, f"L['{name}']")
        return condition

    def _readable(self, condition: str) -> str:
        ranks = {name: example.dim() for name, example in zip(self.examples.names, self.examples, strict=True)}

        def size(found: re.Match[str]) -> str:
            name, axis = found[1], int(found[2])
            return axis_letter(ranks.get(name, 0), axis) + (f" of {name}" if len(ranks) > 1 else "")

        return _SIZE.sub(size, condition)

    @staticmethod
    def _kind(condition: str) -> str:
        return axis_kind(max(int(axis) for _, axis in _SIZE.findall(condition)))


_Shapes = tuple[Shape, ...]
"""Of the inputs."""
_Case = tuple[_Shapes, set[str]]
"""Shapes, and the conditions that they break."""


def _clearest(case: _Case) -> tuple[int, ...]:
    """What to try first: what breaks the fewest conditions shows best which of them matters; then what is small."""
    shapes, broken = case
    return len(broken), sum(map(prod, shapes))


def _quickest(case: _Case) -> tuple[int, ...]:
    """The same, but at last and all at once what torch assumes of strides, that a size is not 1: it rarely matters."""
    count, size = _clearest(case)
    of_strides = all(text.endswith(" != 1") for text in case[1])
    return of_strides, -count if of_strides else count, size


class _Sized:
    """Answers a condition as a tensor of that shape does."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def size(self) -> tuple[int, ...]:
        return self._shape


def _holds(condition: Any, sizes: Mapping[str, object]) -> bool:
    try:
        return bool(eval(condition, {"__builtins__": {}}, sizes))  # of torch, made from the sizes' names and numbers
    except Exception:  # it asks for what is no size
        return True


def _dynamic_axes(program: ExportedProgram) -> list[Place]:
    inputs = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    return [
        (position, axis)
        for position, value in enumerate(inputs)
        for axis, size in enumerate(getattr(value, "shape", ()))
        if isinstance(size, torch.SymInt)
    ]
