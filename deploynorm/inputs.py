"""What the pipeline knows about a network's inputs: names, shapes, types, and which sizes a dynamic axis takes."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploynorm.errors import InputError
from deploynorm.memory import check_fits

Shape = tuple[int, ...]

_LARGEST_SIZE = 2**14
SHAPE_EXAMPLE = "x:2x3x224x224, x:[2,3,224,224], or 2x3x224x224 for a network with one input"


@dataclass(frozen=True)
class AxisSizes:
    """The sizes that a dynamic axis takes, as far as they were tried: base (of the example), base + step, base + 2 step
    and so on. Axes of one group grow together, by equal numbers of steps.
    """

    base: int
    step: int
    group: str


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        shape: A number is a fixed size; a name is one that may change, and is the same wherever the name stands.
        dtype: NumPy's name of its type.
        sizes: For each axis what is known of its sizes; empty where nothing is.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    sizes: tuple[AxisSizes | None, ...] = field(default=(), compare=False, repr=False)

    @property
    def base(self) -> Shape | None:
        """A shape that the network is known to take; None where a dynamic axis has no known size."""
        known = [size and size.base for size in self.sizes] + [None] * len(self.shape)
        shape = [size if isinstance(size, int) else base for size, base in zip(self.shape, known, strict=False)]
        return None if None in shape else tuple(shape)  # type: ignore[arg-type]

    def fits(self, shape: Shape) -> bool:
        """Whether a shape has this rank and the sizes that are fixed."""
        return len(shape) == len(self.shape) and all(
            isinstance(want, str) or want == size for want, size in zip(self.shape, shape, strict=True)
        )

    def symbol(self, axis: int) -> str:
        """Name of a dynamic size; an axis without one ("" or "?") is independent of all others."""
        size = self.shape[axis]
        return size if isinstance(size, str) and size not in ("", "?") else f"{self.name}[{axis}]"


def parse_input_shapes(texts: Sequence[str]) -> dict[str, Shape]:
    """Shapes by name from `x:2x3x224x224` or `x:[2,3,224,224]`; "" is the only input, written without `x:`.

    Raises:
        InputError: Another form, a size below 1, a name twice, a shape without a name beside others, or one that no
            machine like this can hold.
    """
    shapes: dict[str, Shape] = {}
    for text in texts:
        name, _, sizes = (part.strip() for part in text.rpartition(":"))
        if sizes.startswith("[") and sizes.endswith("]"):
            sizes = sizes[1:-1]
        parts = [part.strip() for part in re.split("[xX,]", sizes)]
        # fullmatch of [0-9], not isdigit: int() also takes digits of other scripts.
        if not all(re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts) or (":" in text and not name):
            raise InputError("input shape", "not a shape", got=repr(text), expected=SHAPE_EXAMPLE)
        if name in shapes:
            raise InputError("input shape", f"given twice for {name or 'the only input'}", got=repr(text))
        shapes[name] = tuple(map(int, parts))
        check_fits("input shape", 8 * math.prod(shapes[name]), shape_text(shapes[name]))  # checks are in float64
    if "" in shapes and len(shapes) > 1:
        problem = "one shape has no name, but there are several"
        raise InputError("input shape", problem, got=list(texts), expected=SHAPE_EXAMPLE)
    return shapes


def parse_profile_shapes(texts: Sequence[str]) -> list[dict[str, Shape]]:
    """As parse_input_shapes, for each optimization profile of an engine: a name that comes again begins the next."""
    profiles: list[list[str]] = []
    times: Counter[str] = Counter()
    for text in texts:
        name = text.rpartition(":")[0].strip()
        if times[name] == len(profiles):
            profiles.append([])
        profiles[times[name]].append(text)
        times[name] += 1
    return [parse_input_shapes(each) for each in profiles]


def parse_named_file(text: str) -> tuple[str, str]:
    """Name of an input and its file, from `x=x.npy`; "" for a file without, such as one that is called x=x.npy."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and not Path(text).exists() else ("", text)


def parse_input_dtypes(texts: Sequence[str]) -> dict[str, str]:
    """Types by name from `label:int64`; "" is the only input, written without `label:`."""
    return {name.strip(): dtype.strip() for name, _, dtype in (text.rpartition(":") for text in texts)}


def parse_dynamic_axes(texts: Sequence[str]) -> Any:
    """The word "none", "batch", "spatial" or "all", or from `x:0=N,2=H` {"x": {0: "N", 2: "H"}}; None for no text.

    Raises:
        InputError: Another form, a word beside others, or an axis twice.
    """
    words = ("none", "batch", "spatial", "all")
    if len(texts) == 1 and texts[0] in words:
        return texts[0]
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        name, _, axes = text.rpartition(":")
        for part in axes.split(","):
            axis, equals, symbol = (each.strip() for each in part.partition("="))
            if not (equals and re.fullmatch("[0-9]{1,2}", axis) and symbol.isidentifier()):
                expected = f"{', '.join(words)}, or axes with their names: x:0=N,2=H,3=W"
                raise InputError("--dynamic", "neither a word nor axes", got=repr(text), expected=expected)
            if found.setdefault(name.strip(), {}).setdefault(int(axis), symbol) != symbol:
                raise InputError("--dynamic", f"two names for axis {axis}", got=repr(text))
    return found or None


def base_shapes(specs: Sequence[TensorSpec], given: Mapping[str, Shape]) -> dict[str, Shape]:
    """A whole shape for each input: the given one ("" for the only input), else the one that it is known to take.

    Raises:
        InputError: A shape is missing, belongs to no input, or does not fit; or two sizes for one name.
    """
    names = [spec.name for spec in specs]
    unknown = [name for name in given if name not in names and not (name == "" and len(names) == 1)]
    if unknown:
        problem = f"no input is called {unknown[0]!r}" if unknown[0] else "a shape without a name, but several inputs"
        raise InputError("input shape", problem, got=", ".join(map(repr, given)), expected=", ".join(names))
    shapes: dict[str, Shape] = {}
    sizes: dict[str, int] = {}
    for spec in specs:
        where = f"input {spec.name}"
        declared = shape_text(spec.shape)
        shape = given.get(spec.name, given.get("", spec.base))
        if shape is None:
            fix = f"give a shape (--input-shape): {SHAPE_EXAMPLE}"
            raise InputError(where, "some of its axes are dynamic", got=declared, fix=fix)
        if not spec.fits(shape):
            raise InputError(where, "the given shape does not fit", got=shape_text(shape), expected=declared)
        for axis, size in enumerate(shape):
            first = sizes.setdefault(spec.symbol(axis), size)
            if isinstance(spec.shape[axis], str) and first != size:
                expected = "one size for every axis of that name"
                problem = f"two sizes for {spec.shape[axis]!r}"
                raise InputError(where, problem, got=f"{first} and {size}", expected=expected)
        shapes[spec.name] = shape
    return shapes


_OF_VALUES = re.compile(r"\bu\d+\b")
"""A size that values of the network decide, as torch names it in a shape: u0, Min(300, u5)."""


def row_groups(inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> tuple[tuple[str, ...], ...]:
    """Names of the outputs with a number of rows that values decide; those that have one number of them together."""
    named = {size for spec in inputs for size in spec.shape}
    groups: dict[int | str, list[str]] = {}
    for spec in outputs:
        if spec.shape and set(_OF_VALUES.findall(str(spec.shape[0]))) - named:
            groups.setdefault(spec.shape[0], []).append(spec.name)
    return tuple(map(tuple, groups.values()))


def shape_text(shape: Sequence[int | str]) -> str:
    """As people type it: 2x3x224x224."""
    return "x".join(map(str, shape)) or "a scalar"


def sizes_to_dict(specs: Sequence[TensorSpec], notes: Sequence[str]) -> dict[str, Any]:
    """What is known of the sizes of a file's inputs, as it stands in the file and in its manifest:
    {"inputs": {name: [[base, step, group] or null for each axis]}, "notes": [sentences]}.
    """
    known = {spec.name: [axis and [axis.base, axis.step, axis.group] for axis in spec.sizes] for spec in specs}
    return {"inputs": known, "notes": list(notes)}


def _is_axis(entry: object) -> bool:
    """Whether it is base, step and group as `sizes_to_dict` writes them, of a size that a machine can hold."""
    if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str)):
        return False
    return all(type(number) is int and 1 <= number <= _LARGEST_SIZE for number in entry[:2])


def read_sizes(text: str | None) -> dict[str, Any]:
    """What a file's metadata has of `sizes_to_dict`; empty where that is missing or damaged."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def with_sizes(specs: Sequence[TensorSpec], found: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """The inputs of a file with what `sizes_to_dict` wrote of them; as they are where that is missing or damaged."""
    inputs = found.get("inputs")
    known: dict[str, tuple[AxisSizes | None, ...]] = {}
    for name, axes in inputs.items() if isinstance(inputs, Mapping) else ():
        if isinstance(axes, list) and all(axis is None or _is_axis(axis) for axis in axes):
            known[name] = tuple(axis and AxisSizes(*axis) for axis in axes)
    return tuple(replace(spec, sizes=known.get(spec.name, ())) for spec in specs)
