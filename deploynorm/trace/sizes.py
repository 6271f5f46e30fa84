"""Which sizes of its inputs a network takes, found by running a copy of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from deploynorm.inputs import AxisSizes, Shape
from deploynorm.trace.copies import disposable_copy
from deploynorm.trace.examples import ExampleInputs, Examples

Place = tuple[int, int]
"""An input by its position, and one of its axes."""

_COARSE = 32
"""Tried where a network refuses one pixel more: what a U-Net of total stride 32 takes."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that a network takes besides those of its examples."""

    shapes: tuple[Shape, ...]  # of the examples
    groups: tuple[Mapping[Place, int], ...]  # axes that vary together, each with its growth by one step
    reason: str = ""  # why axes were left out that the network itself would change

    @property
    def places(self) -> frozenset[Place]:
        """The axes that may change."""
        return frozenset(place for group in self.groups for place in group)

    @property
    def kinds(self) -> frozenset[str]:
        """Of "batch" and "spatial", those of which an axis may change."""
        return frozenset(axis_kind(axis) for _, axis in self.places)

    def of_input(self, position: int) -> tuple[AxisSizes | None, ...]:
        """What is known of each axis of an input."""
        shape = self.shapes[position]
        known = {
            axis: AxisSizes(shape[axis], step, str(index))
            for index, group in enumerate(self.groups)
            for (i, axis), step in group.items()
            if i == position
        }
        return tuple(map(known.get, range(len(shape))))

    def fixed(self, kinds: Collection[str], reason: str) -> Sizes:
        """The same without axes of these kinds."""
        groups = [{place: n for place, n in group.items() if axis_kind(place[1]) not in kinds} for group in self.groups]
        return replace(self, groups=tuple(group for group in groups if group), reason=reason)

    def notes(self, dynamic: Collection[Place], names: Sequence[str]) -> list[str]:
        """What limits the sizes of a file in which these axes are dynamic, and whose inputs have these names."""
        notes: list[str] = []
        in_step: dict[str, list[str]] = {}
        alike: dict[str, list[str]] = {}
        for whole in self.groups:
            group = {place: step for place, step in whole.items() if place in dynamic}
            if not any(axis for _, axis in group):
                continue
            letters = self._letters(group)
            if len(set(group.values())) > 1:
                steps = " and ".join(f"{names[i]} by {step}" for (i, _), step in group.items())
                in_step.setdefault(steps, []).append(_joined(letters))
                continue
            if len(letters) > 1:
                notes.append(f"{_joined(letters)} vary together")
            (position, axis), step = next(iter(group.items()))
            size = self.shapes[position][axis]
            if step > 1:
                rule = f"multiples of {step}" if size % step == 0 else f"{size} and multiples of {step} more or less"
                owner = f" of {names[position]}" if len(group) == 1 and len(self.shapes) > 1 else ""
                alike.setdefault(rule, []).append(_joined(letters) + owner)
        notes += [f"{_joined(letters)} vary in step: {steps}" for steps, letters in in_step.items()]
        notes += [f"{_joined(axes)}: {rule}" for rule, axes in alike.items()]
        spatial = [(i, axis) for i, shape in enumerate(self.shapes) for axis in range(2, len(shape))]
        if spatial and self.places.isdisjoint(spatial):
            varied = "only the batch was varied" if "batch" in self.kinds else "no size was varied"
            refused = f"the network refuses every other {_joined(self._letters(spatial))} that was tried"
            notes.append(f"{varied}, since {self.reason or refused}")
        return notes

    def _letters(self, places: Iterable[Place]) -> list[str]:
        return list(dict.fromkeys(axis_letter(len(self.shapes[i]), axis) for i, axis in places))


def axis_kind(axis: int) -> str:
    """Whether an axis is "batch" (axis 0) or "spatial"."""
    return "spatial" if axis else "batch"


def axis_letter(rank: int, axis: int) -> str:
    """The field's name for an axis: N, C, then L, H and W, or D, H and W."""
    spatial = {3: "L", 4: "HW", 5: "DHW"}.get(rank, "")
    return ("N", "C", *spatial)[axis] if axis < 2 + len(spatial) else f"axis_{axis}"


def find_sizes(model: nn.Module, examples: ExampleInputs | Examples) -> Sizes:
    """Runs a copy of the network with larger inputs, and reports what it takes.

    1. Everything larger at once, each axis by another amount, then by one: most networks whose map is not fixed.
    2. The batch of all inputs, or of those that have the first one's.
    3. Spatial axes: all, or each on its own, by 1 pixel or by 32, then by the smallest part of 32; where several
       inputs refuse to grow one by one, all by the same amount, or each by a part of its own size.
    4. Height and width together, and at last twice the size and parts of that.

    The network is in evaluation mode on the CPU; each time a fresh copy runs, since forward may change buffers, or keep
    what it made for one size.
    """
    search = _Search(model, Examples.of("find_sizes", model, examples))
    return Sizes(search.shapes, tuple(search.groups()))


class _Search:
    def __init__(self, model: nn.Module, examples: Examples) -> None:
        self._model = model
        self._examples = examples
        self.shapes = tuple(tuple(example.shape) for example in examples)

    def groups(self) -> Iterator[dict[Place, int]]:
        batch = {(i, 0): 1 for i, shape in enumerate(self.shapes) if shape}
        spatial = self._axes(range(len(self.shapes)))
        units = [{place: 1} for place in spatial]
        if batch and self._takes([batch, *units]):  # case 1
            yield from [batch, *units]
            return
        shared = {place: 1 for place in batch if self.shapes[place[0]][0] == self.shapes[0][0]}
        for group in [batch, shared] if shared != batch else [batch]:  # case 2
            if group and self._takes([group]):
                yield group
                break
        if spatial:
            yield from self._spatial()

    def _spatial(self) -> list[dict[Place, int]]:
        inputs = [i for i, shape in enumerate(self.shapes) if len(shape) > 2]
        found: list[dict[Place, int]] = []
        if len(inputs) > 1:
            for i in list(inputs):  # case 3, one input after the other
                if alone := self._by_step([{place: 1} for place in self._axes([i])]):
                    found += alone
                    inputs.remove(i)
        if inputs:
            found += self._in_step(inputs)
        return found

    def _in_step(self, inputs: Sequence[int]) -> list[dict[Place, int]]:
        """All inputs by the same amount, or each by a part of its size."""
        sizes: dict[str, dict[Place, int]] = {}
        for i, axis in self._axes(inputs):
            sizes.setdefault(axis_letter(len(self.shapes[i]), axis), {})[i, axis] = self.shapes[i][axis]
        equal = [dict.fromkeys(group, 1) for group in sizes.values()]
        in_proportion = [
            {place: size // math.gcd(*group.values()) for place, size in group.items()} for group in sizes.values()
        ]
        kinds = [equal] if equal == in_proportion else [equal, in_proportion]
        for units in kinds:
            if found := self._by_step(units):
                return found
            if len(units) > 1 and (alone := [group for unit in units for group in self._by_step([unit])]):
                return alone
        for units in kinds:  # case 4
            together = {place: step for unit in units for place, step in unit.items()}
            if found := self._by_step([together]):
                return found
        twice = (self.shapes[place[0]][place[1]] // step for unit in kinds[-1] for place, step in unit.items())
        return self._refined(kinds[-1], math.gcd(*twice))

    def _by_step(self, units: Sequence[Mapping[Place, int]]) -> list[dict[Place, int]]:
        if self._takes(units):
            return [dict(unit) for unit in units]
        return self._refined(units, _COARSE)

    def _refined(self, units: Sequence[Mapping[Place, int]], step: int) -> list[dict[Place, int]]:
        """The units, each with the smallest part of the step that it takes; none where the step itself is refused."""
        if not self._takes([_by(unit, step) for unit in units]):
            return []
        return [_by(unit, self._smallest(unit, step)) for unit in units]

    def _smallest(self, unit: Mapping[Place, int], step: int) -> int:
        for prime in _prime_factors(step):
            while step % prime == 0 and self._takes([_by(unit, step // prime)]):
                step //= prime
        return step

    def _axes(self, inputs: Sequence[int]) -> list[Place]:
        return [(i, axis) for i in inputs for axis in range(2, len(self.shapes[i]))]

    def _takes(self, units: Sequence[Mapping[Place, int]]) -> bool:
        """Whether it runs with each unit larger, by another number of steps, then by one; a single one by 1 and 2."""
        apart = range(1, len(units) + 1)
        return self._runs(units, apart) and self._runs(units, [1] * len(units) if len(units) > 1 else [2])

    def _runs(self, units: Sequence[Mapping[Place, int]], counts: Sequence[int]) -> bool:
        growth = {place: n * step for n, unit in zip(counts, units, strict=True) for place, step in unit.items()}
        shapes = self._examples.grown_shapes(growth)
        try:
            grown = [example.new_zeros(shape) for example, shape in zip(self._examples, shapes, strict=True)]
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._examples.replaced(grown).run(disposable_copy(self._model))
        except Exception:  # any refusal of a size is an answer here, whatever its type
            return False
        return True


def _by(unit: Mapping[Place, int], steps: int) -> dict[Place, int]:
    return {place: size * steps for place, size in unit.items()}


def _prime_factors(number: int) -> list[int]:
    return [n for n in range(2, number + 1) if number % n == 0 and all(n % d for d in range(2, math.isqrt(n) + 1))]


def _joined(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
