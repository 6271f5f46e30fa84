"""Inputs for comparing two forms of one network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from deploynorm.errors import InputError
from deploynorm.inputs import Shape, TensorSpec, base_shapes, shape_text


def check_seed(where: str, seed: object) -> None:
    """Raises InputError for a seed that NumPy's generators do not take."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise InputError(where, "not a seed", got=repr(seed), expected="a whole number from 0")


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
        A label such as "x 2x3x33x47", or "label 2x5 int64" of what is no float, and an array for each input: standard
        normal, or integers 0 to 7.

    Raises:
        InputError: The seed is none; a shape is missing, belongs to no input, or does not fit; or a dtype that numpy
            does not know.
    """
    check_seed("sample_inputs", seed)
    shapes = base_shapes(specs, base or {})
    units = _units(specs, shapes)
    seen: set[tuple[Shape, ...]] = set()
    for index, grown in enumerate(_variants(units, np.random.default_rng(seed))):
        sizes = {(x.input, x.axis): x.base + steps * x.step for unit, steps in grown.items() for x in units[unit]}
        varied = {
            name: tuple(sizes.get((name, axis), size) for axis, size in enumerate(shape))
            for name, shape in shapes.items()
        }
        if tuple(varied.values()) in seen:
            continue
        seen.add(tuple(varied.values()))
        label = ", ".join(_label(spec, varied[spec.name]) for spec in specs)
        rng = np.random.default_rng((seed, index))
        yield label, {spec.name: _values(spec, varied[spec.name], rng) for spec in specs}


class _Axis(NamedTuple):
    """A dynamic axis of an input, with its base size and the step in which it grows."""

    input: str
    axis: int
    base: int
    step: int


def _units(specs: Sequence[TensorSpec], shapes: Mapping[str, Shape]) -> dict[str, list[_Axis]]:
    """What varies on its own: axes of one name, or of one group where groups are known. Axis 1, the channels, stays."""
    units: dict[str, list[_Axis]] = {}
    group_of: dict[str, str] = {}
    for spec in specs:
        known = dict(enumerate(spec.sizes))
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, str) or axis == 1:
                continue
            sizes, symbol = known.get(axis), spec.symbol(axis)
            group = group_of.setdefault(symbol, symbol if sizes is None else f"group {sizes.group}")
            step = 1 if sizes is None else sizes.step
            units.setdefault(group, []).append(_Axis(spec.name, axis, shapes[spec.name][axis], step))
    return units


def _variants(units: Mapping[str, Sequence[_Axis]], rng: np.random.Generator) -> Iterator[dict[str, int]]:
    """How many steps each unit grows; no entry leaves it at its base."""
    batches = [unit for unit in units if all(x.axis == 0 for x in units[unit])]
    base = {unit: axes[0].base for unit, axes in units.items()}
    stride = {unit: max(x.step for x in axes) for unit, axes in units.items()}
    spatial = sorted((unit for unit in units if unit not in batches), key=lambda unit: base[unit])
    yield {}
    if batches:
        yield {unit: 1 - base[unit] for unit in batches}
        yield dict.fromkeys(batches, 1)
    if spatial:
        step = int(rng.integers(1, (_LARGEST_STEP + 1) // 2))
        # The nearest odd size at or past the step: strides and pools round it, which is where backends differ.
        yield {
            unit: ((base[unit] + step) | 1) - base[unit] if stride[unit] == 1 else -(-step // stride[unit])
            for unit in spatial
        }
        growths = rng.choice(np.arange(1, _LARGEST_STEP + 1), size=len(spatial), replace=len(spatial) > _LARGEST_STEP)
        # Larger sizes grow more, so that equal sizes part and unequal ones never meet.
        steps: dict[str, int] = {}
        for unit, growth in zip(spatial, sorted(growths), strict=True):
            least = 1 + max(steps.values(), default=0) * (stride[unit] > 1)
            steps[unit] = max(-(-int(growth) // stride[unit]), least)
        yield steps
        # A U-net takes multiples of its total stride only, and refuses the others.
        yield {unit: -(-_TOTAL_STRIDE // stride[unit]) for unit in spatial}


def _label(spec: TensorSpec, shape: Shape) -> str:
    """The input with its shape and, where it is no float, its type, which the user may not have chosen."""
    dtype = "" if "float" in spec.dtype else f" {spec.dtype}"
    return f"{spec.name} {shape_text(shape).removeprefix('a ')}{dtype}"


def _values(spec: TensorSpec, shape: Shape, rng: np.random.Generator) -> Array:
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError as error:
        raise InputError(f"input {spec.name}", "a dtype that numpy does not know", got=spec.dtype) from error
    if dtype.kind in "OSU":
        raise InputError(f"input {spec.name}", "not a numeric dtype", got=spec.dtype)
    if dtype.kind in "biu":
        return rng.integers(0, 2 if dtype.kind == "b" else _LARGEST_INTEGER, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)
