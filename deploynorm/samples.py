"""Inputs for comparing two forms of one network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deploynorm.errors import InputError
from deploynorm.inputs import Shape, TensorSpec, base_shapes, shape_text

__all__ = ["sample_inputs"]

Array = npt.NDArray[Any]

_LARGEST_STEP = 31
"""How far a sample may lie above the base size: no strided layer of a net with total stride 32 gains two pixels."""
_TOTAL_STRIDE = 32
_LARGEST_INTEGER = 8


def sample_inputs(
    specs: Sequence[TensorSpec], *, seed: int = 0, base: Mapping[str, Shape] | None = None
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Inputs of several shapes for comparing two forms of one network; equal seeds give equal inputs.

    The base shape comes first. Where the batch (axis 0) may change: batch 1, and one more than the base. Where
    spatial sizes (axes >= 2) may change: odd sizes, sizes that differ from one another, and the base plus 32; where
    the network is known to take certain sizes only (`TensorSpec.sizes`), the nearest of those, and axes that vary
    together in step. Sizes grow from the base, so that a net that strides takes them too.

    Args:
        specs: Inputs of the network, such as `Exported.inputs`.
        seed: Chooses sizes and values.
        base: Shape of an input by name, "" for the only one; by default the shape that it is known to take.

    Yields:
        A label such as "x 2x3x33x47", and an array for each input: standard normal, or integers 0 to 7.

    Raises:
        InputError: A shape is missing, belongs to no input, or does not fit; or a dtype that numpy does not know.
    """
    shapes = base_shapes(specs, base or {})
    units = _units(specs, shapes)
    seen: set[tuple[Shape, ...]] = set()
    for index, grown in enumerate(_variants(units, np.random.default_rng(seed))):
        sizes = {place: size for unit, steps in grown.items() for place, size in units[unit].after(steps).items()}
        varied = tuple(
            tuple(sizes.get((spec.name, axis), size) for axis, size in enumerate(shapes[spec.name])) for spec in specs
        )
        if varied in seen:
            continue
        seen.add(varied)
        label = ", ".join(
            f"{spec.name} {shape_text(shape).removeprefix('a ')}" for spec, shape in zip(specs, varied, strict=True)
        )
        rng = np.random.default_rng((seed, index))
        yield label, {spec.name: _values(spec, shape, rng) for spec, shape in zip(specs, varied, strict=True)}


@dataclass
class _Unit:
    """Axes that vary together: base and step of each, by input and axis."""

    members: dict[tuple[str, int], tuple[int, int]]

    @property
    def batch(self) -> bool:
        return all(axis == 0 for _, axis in self.members)

    @property
    def base(self) -> int:
        return next(iter(self.members.values()))[0]

    @property
    def step(self) -> int:
        return max(step for _, step in self.members.values())

    def after(self, steps: int) -> dict[tuple[str, int], int]:
        return {place: base + steps * step for place, (base, step) in self.members.items()}


def _units(specs: Sequence[TensorSpec], shapes: Mapping[str, Shape]) -> dict[str, _Unit]:
    """What varies on its own: axes of one name, or of one group where groups are known. Axis 1, the channels, stays."""
    units: dict[str, _Unit] = {}
    group_of: dict[str, str] = {}
    for spec in specs:
        known = dict(enumerate(spec.sizes))
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, str) or axis == 1:
                continue
            sizes, symbol = known.get(axis), spec.symbol(axis)
            group = group_of.setdefault(symbol, symbol if sizes is None else f"group {sizes.group}")
            unit = units.setdefault(group, _Unit({}))
            unit.members[spec.name, axis] = (shapes[spec.name][axis], 1 if sizes is None else sizes.step)
    return units


def _variants(units: Mapping[str, _Unit], rng: np.random.Generator) -> Iterator[dict[str, int]]:
    """How many steps each unit grows; no entry leaves it at its base."""
    batches = [unit for unit in units if units[unit].batch]
    spatial = sorted((unit for unit in units if not units[unit].batch), key=lambda unit: units[unit].base)
    yield {}
    if batches:
        yield {unit: 1 - units[unit].base for unit in batches}
        yield dict.fromkeys(batches, 1)
    if spatial:
        step = int(rng.integers(1, (_LARGEST_STEP + 1) // 2))
        # The nearest odd size at or past the step: strides and pools round it, which is where backends differ.
        yield {
            unit: ((units[unit].base + step) | 1) - units[unit].base
            if units[unit].step == 1
            else -(-step // units[unit].step)
            for unit in spatial
        }
        growths = rng.choice(np.arange(1, _LARGEST_STEP + 1), size=len(spatial), replace=len(spatial) > _LARGEST_STEP)
        # Larger sizes grow more, so that equal sizes part and unequal ones never meet.
        steps: dict[str, int] = {}
        for unit, growth in zip(spatial, sorted(growths), strict=True):
            steps[unit] = max(
                -(-int(growth) // units[unit].step), 1 + max(steps.values(), default=0) * (units[unit].step > 1)
            )
        yield steps
        # A U-net takes multiples of its total stride only, and refuses the others.
        yield {unit: -(-_TOTAL_STRIDE // units[unit].step) for unit in spatial}


def _values(spec: TensorSpec, shape: Shape, rng: np.random.Generator) -> Array:
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError as error:
        raise InputError(f"input {spec.name}", "a dtype that numpy does not know", got=spec.dtype) from error
    if dtype.kind in "OSU":
        raise InputError(f"input {spec.name}", "not a numeric dtype", got=spec.dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        return rng.integers(0, _LARGEST_INTEGER, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)
