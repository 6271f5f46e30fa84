"""What a build of an engine is asked for, and which shapes: the range of every input that has dynamic axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

from deploynorm.errors import InputError
from deploynorm.inputs import Shape, TensorSpec, shape_text

Way = Literal["plugin", "native"]
"""plugin: our kernel. native: the operator's body in standard operators, which TensorRT fuses as it can."""

HARDWARE_COMPATIBILITY: Final = {"ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}
"""Which other GPUs an engine of TensorRT runs on: our names, and TensorRT's."""


class Range(NamedTuple):
    """The shapes of one input. An engine takes all from min to max, and is tuned for opt."""

    min: Shape
    opt: Shape
    max: Shape

    def holds(self, shape: Shape) -> bool:
        low, _, high = self
        return len(low) == len(shape) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


Profile = Mapping[str, Range]
"""An optimization profile: the range of each input."""

Shapes = Mapping[str, Shape] | Sequence[Mapping[str, Shape]]
"""A shape by input; several of these for as many profiles."""


@dataclass(frozen=True)
class Settings:
    """What a build was asked for, less the model."""

    profiles: Sequence[Profile]
    targets: tuple[str, ...]
    named_targets: bool
    tf32: bool
    plugins: Sequence[Path] | None
    embed_plugin: bool
    timing_cache: bytes | None
    workspace: int | None
    version_compatible: bool
    hardware_compatible: str | None
    optimization_level: int | None


def profiles(specs: Sequence[TensorSpec], *, minimum: Shapes, optimum: Shapes, maximum: Shapes) -> tuple[Profile, ...]:
    """The optimization profiles of an engine; see `ranges` for what may be left out of each.

    Raises:
        InputError: As `ranges` has it; or one of the three is given for another number of profiles than the others,
            or two profiles are the same.
    """
    given = {"min": minimum, "opt": optimum, "max": maximum}
    listed = {option: [shapes] if isinstance(shapes, Mapping) else [*shapes] for option, shapes in given.items()}
    count = max(1, *map(len, listed.values()))
    for option, each in listed.items():
        if each in ([], [{}]):
            listed[option] = [{}] * count
        elif len(each) != count:
            fix = "give it for each profile, or for none"
            problem = "is given for another number of profiles"
            raise InputError(f"--{option}-shapes", problem, got=len(each), expected=count, fix=fix)
    found: list[Profile] = []
    for low, best, high in zip(*listed.values(), strict=True):
        profile = ranges(specs, minimum=low, optimum=best, maximum=high)
        if profile in found:
            raise InputError("build", "two optimization profiles are the same", fix="leave one out")
        found.append(profile)
    return tuple(found)


def ranges(
    specs: Sequence[TensorSpec],
    *,
    minimum: Mapping[str, Shape],
    optimum: Mapping[str, Shape],
    maximum: Mapping[str, Shape],
) -> dict[str, Range]:
    """The range of each input, in order.

    Where one of the three is not given: opt is max, else min; max is opt; min is opt with a dynamic batch of 1.

    Args:
        specs: Inputs of the model.
        minimum, optimum, maximum: The smallest shapes by input, those that are most used, and the largest; "" stands
            for the only input.

    Raises:
        InputError: An input with dynamic axes has no range, or its range does not fit or is upside down; two sizes
            for one name; or a shape for an input that is not there.
    """
    given = {"min": minimum, "opt": optimum, "max": maximum}
    names = [spec.name for spec in specs]
    for option, shapes in given.items():
        for name in shapes:
            if name not in names and not (name == "" and len(names) == 1):
                problem = f"no input is called {name!r}" if name else "a shape without a name, but several inputs"
                raise InputError(f"--{option}-shapes", problem, got=", ".join(map(repr, shapes)), expected=names)
    found: dict[str, Range] = {}
    sizes: dict[tuple[str, str], int] = {}
    for spec in specs:
        asked = {option: shapes.get(spec.name, shapes.get("")) for option, shapes in given.items()}
        for option, shape in asked.items():
            if shape is not None and not spec.fits(shape):
                problem, expected = f"does not fit input {spec.name}", shape_text(spec.shape)
                raise InputError(f"--{option}-shapes", problem, got=shape_text(shape), expected=expected)
        found[spec.name] = _range(spec, *asked.values())
        for option, shape in found[spec.name]._asdict().items():
            for axis, size in enumerate(shape):
                known = sizes.setdefault((option, spec.symbol(axis)), size)
                if known != size:
                    problem, got = f"two sizes for {spec.shape[axis]!r}", f"{known} and {size} of input {spec.name}"
                    expected = "one size for every axis of that name"
                    raise InputError(f"--{option}-shapes", problem, got=got, expected=expected)
        low, best, high = found[spec.name]
        if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            problem = "its shapes are not in order"
            got = f"min {shape_text(low)}, opt {shape_text(best)}, max {shape_text(high)}"
            raise InputError(f"input {spec.name}", problem, got=got, expected="min <= opt <= max on every axis")
    return found


def _range(spec: TensorSpec, low: Shape | None, best: Shape | None, high: Shape | None) -> Range:
    if all(isinstance(size, int) for size in spec.shape):
        fixed = tuple(size for size in spec.shape if isinstance(size, int))
        return Range(low or fixed, best or fixed, high or fixed)
    best = best or high or low
    if best is None:
        example = "x".join(str(size) if isinstance(size, int) else "8" for size in spec.shape)
        problem = "some of its axes are dynamic, and no range was given for it"
        fix = f"--min-shapes, --opt-shapes and --max-shapes {spec.name}:{example}; one of them is enough"
        raise InputError(f"input {spec.name}", problem, got=shape_text(spec.shape), fix=fix)
    batch_of_one = (1, *best[1:]) if isinstance(spec.shape[0], str) else best
    return Range(low or batch_of_one, best, high or best)
