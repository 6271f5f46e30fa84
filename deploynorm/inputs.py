"""What the pipeline knows about a network's inputs: shapes, image preprocessing, inputs for the parity check."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploynorm.errors import BackendError, InputError

__all__ = ["ImageSpec", "TensorSpec", "parse_input_shapes", "sample_inputs"]

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

_SHAPE_EXAMPLE = "x:2x3x224x224, x:[2,3,224,224], or 2x3x224x224 for a network with one input"
_LARGEST_STEP = 31
"""How far a sample may lie above the base size: no strided layer of a net with total stride 32 gains two pixels."""
_TOTAL_STRIDE = 32
_LARGEST_INTEGER = 8


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and numpy dtype name of one input or output; a str in the shape is a size that may change."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes a network's input.

    Args:
        shape: C, H, W.
        mean: Subtracted from each channel, whose pixels are scaled to 0..1.
        std: Each channel is then divided by it.

    Raises:
        InputError: Not three positive sizes, or not C finite numbers each; the message names the field.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        shape: object = self.shape
        if not (isinstance(shape, tuple) and len(shape) == 3 and all(_is_size(size) for size in shape)):
            raise InputError("input.shape", "not the shape of an image", got=shape, expected="C, H, W, each at least 1")
        fields: dict[str, Any] = {"mean": self.mean, "std": self.std}
        for key, values in fields.items():
            if not (
                isinstance(values, tuple)
                and len(values) == self.shape[0]
                and all(_is_number(value) for value in values)
                and (key == "mean" or min(values) > 0)
            ):
                kind = "positive numbers" if key == "std" else "numbers"
                raise InputError(
                    f"input.{key}", "does not fit the channels", got=values, expected=f"{self.shape[0]} finite {kind}"
                )

    @classmethod
    def from_dict(cls, data: object) -> ImageSpec:
        """Reads {"shape": [C, H, W], "mean": [C numbers], "std": [C numbers]}.

        Raises:
            InputError: A key is missing, unknown or holds a wrong value; the message names it.
        """
        keys = ("shape", "mean", "std")
        if not isinstance(data, Mapping):
            raise InputError("input", "not a table", got=type(data).__name__, expected="the keys " + ", ".join(keys))
        for key in keys:
            if key not in data:
                raise InputError(f"input.{key}", "missing", expected="the keys " + ", ".join(keys))
            if not isinstance(data[key], list | tuple):
                raise InputError(f"input.{key}", "not a list", got=repr(data[key]))
        unknown = [str(key) for key in data if key not in keys]
        if unknown:
            raise InputError(f"input.{unknown[0]}", "unknown key", expected=", ".join(keys))
        c_h_w: Any = tuple(data["shape"])
        return cls(c_h_w, tuple(data["mean"]), tuple(data["std"]))

    def to_dict(self) -> dict[str, list[int] | list[float]]:
        """As plain lists, which from_dict reads back."""
        return {"shape": list(self.shape), "mean": list(self.mean), "std": list(self.std)}

    def read(self, path: Path | str) -> npt.NDArray[np.float32]:
        """Reads an image as this network wants it: grey for C = 1, RGB for C = 3, (pixels / 255 - mean) / std.

        It is resized (bilinear) only where its size differs from H, W. An alpha channel is dropped.

        Returns:
            Array (1, C, H, W), float32.

        Raises:
            InputError: No such file, not an image, a depth other than 8 bits, or C other than 1 and 3.
            BackendError: Pillow is not installed.
        """
        channels, height, width = self.shape
        where = f"image {path}"
        if channels not in (1, 3):
            raise InputError(
                where, "no colour space of that many channels", got=channels, expected="1 (grey) or 3 (RGB)"
            )
        try:
            from PIL import Image
        except ImportError as error:
            raise BackendError(where, "reading images needs Pillow", fix='pip install "pillow>=10"') from error
        try:
            with Image.open(path) as opened:
                if opened.mode == "F" or opened.mode.startswith("I"):
                    raise InputError(
                        where, "not 8 bits a channel", got=f"mode {opened.mode}", fix="convert it to 8 bits"
                    )
                image = opened.convert("L" if channels == 1 else "RGB")
        except InputError:
            raise
        except FileNotFoundError as error:
            raise InputError(where, "no such file") from error
        except Exception as error:  # decoders of broken files raise nearly anything
            raise InputError(where, "not an image that Pillow can read", fix="give a PNG or JPEG file") from error
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.float64).reshape(height, width, channels).transpose(2, 0, 1) / 255
        mean, std = (np.array(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        normalized: npt.NDArray[np.float32] = ((pixels - mean) / std).astype(np.float32)[np.newaxis]
        return normalized


def parse_input_shapes(texts: Sequence[str]) -> dict[str, Shape]:
    """Reads `x:2x3x224x224`, `x:[2,3,224,224]` and, for a network with one input, the same without `x:`.

    Returns:
        Shape of each name; "" stands for the only input.

    Raises:
        InputError: Another form, a size below 1, a name twice, or a shape without a name beside others.
    """
    shapes: dict[str, Shape] = {}
    for text in texts:
        name, _, sizes = text.strip().rpartition(":")
        sizes = sizes.strip()
        if sizes.startswith("[") and sizes.endswith("]"):
            sizes = sizes[1:-1]
        parts = [part.strip() for part in re.split("[xX,]", sizes)]
        # fullmatch of [0-9], not isdigit: int() also takes digits of other scripts.
        if not all(re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts) or (":" in text and not name.strip()):
            raise InputError("input shape", "not a shape", got=repr(text), expected=_SHAPE_EXAMPLE)
        name = name.strip()
        if name in shapes:
            raise InputError("input shape", f"given twice for {name or 'the only input'}", got=repr(text))
        shapes[name] = tuple(int(part) for part in parts)
    if "" in shapes and len(shapes) > 1:
        raise InputError(
            "input shape", "one shape has no name, but there are several", got=list(texts), expected=_SHAPE_EXAMPLE
        )
    return shapes


def sample_inputs(
    specs: Sequence[TensorSpec], *, seed: int, base: Mapping[str, Shape]
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Inputs of several shapes for comparing two forms of one network; the same for the same seed.

    The base shape comes first. Where the batch (axis 0) may change: batch 1, and one more than the base. Where
    spatial sizes (axes >= 2) may change: odd sizes, sizes that differ from one another, and the base plus 32. Sizes
    grow from the base, so that a net that strides takes them too. A size of the same name is the same everywhere.

    Args:
        specs: Inputs of the network.
        seed: Chooses sizes and values.
        base: Shape of each input that has a size in name only; "" for the only input.

    Yields:
        A label such as "x 2x3x33x47", and an array for each input: standard normal, or integers 0 to 7.

    Raises:
        InputError: A shape is missing, belongs to no input, or does not fit; or a dtype that numpy does not know.
    """
    shapes = _base_shapes(specs, base)
    seen: set[tuple[Shape, ...]] = set()
    for index, sizes in enumerate(_variants(specs, shapes, np.random.default_rng(seed))):
        varied = tuple(
            tuple(sizes.get(_symbol(spec, axis), size) for axis, size in enumerate(shapes[spec.name])) for spec in specs
        )
        if varied in seen:
            continue
        seen.add(varied)
        label = ", ".join(
            f"{spec.name} {'x'.join(map(str, shape)) or 'scalar'}" for spec, shape in zip(specs, varied, strict=True)
        )
        rng = np.random.default_rng((seed, index))
        yield label, {spec.name: _values(spec, shape, rng) for spec, shape in zip(specs, varied, strict=True)}


def _variants(
    specs: Sequence[TensorSpec], shapes: Mapping[str, Shape], rng: np.random.Generator
) -> Iterator[dict[str, int]]:
    """Sizes by symbol, of the symbols that are to differ from the base; the base itself first."""
    batch: dict[str, int] = {}
    spatial: dict[str, int] = {}
    for spec in specs:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and axis != 1:
                (batch if axis == 0 else spatial)[_symbol(spec, axis)] = shapes[spec.name][axis]
    spatial = {symbol: size for symbol, size in spatial.items() if symbol not in batch}
    yield {}
    if batch:
        yield dict.fromkeys(batch, 1)
        yield {symbol: size + 1 for symbol, size in batch.items()}
    if spatial:
        step = int(rng.integers(1, (_LARGEST_STEP + 1) // 2))
        # The nearest odd size at or past the step: strides and pools round it, which is where backends differ.
        yield {symbol: (size + step) | 1 for symbol, size in spatial.items()}
        steps = rng.choice(np.arange(1, _LARGEST_STEP + 1), size=len(spatial), replace=len(spatial) > _LARGEST_STEP)
        steps.sort()
        order = sorted(spatial, key=lambda symbol: spatial[symbol])
        # Larger sizes get the larger steps, so that equal sizes part and unequal ones never meet.
        yield {symbol: spatial[symbol] + int(grown) for symbol, grown in zip(order, steps, strict=True)}
        # A U-net takes multiples of its total stride alone, and refuses the others.
        yield {symbol: size + _TOTAL_STRIDE for symbol, size in spatial.items()}


def _base_shapes(specs: Sequence[TensorSpec], base: Mapping[str, Shape]) -> dict[str, Shape]:
    names = [spec.name for spec in specs]
    unknown = [name for name in base if name not in names and not (name == "" and len(names) == 1)]
    if unknown:
        told = f"no input is called {unknown[0]!r}" if unknown[0] else "a shape without a name, but several inputs"
        raise InputError("input shape", told, got=", ".join(map(repr, base)), expected=", ".join(names))
    shapes: dict[str, Shape] = {}
    sizes: dict[str, int] = {}
    for spec in specs:
        where = f"input {spec.name}"
        shape = base.get(spec.name, base.get(""))
        if shape is None:
            shape = tuple(size for size in spec.shape if isinstance(size, int))
        if len(shape) < len(spec.shape) and spec.name not in base and "" not in base:
            raise InputError(
                where, "some of its sizes are free", got=_text(spec.shape), fix=f"give a shape: {_SHAPE_EXAMPLE}"
            )
        fits = len(shape) == len(spec.shape) and all(
            isinstance(want, str) or want == size for want, size in zip(spec.shape, shape, strict=True)
        )
        if not fits:
            raise InputError(where, "the given shape does not fit", got=_text(shape), expected=_text(spec.shape))
        for axis, size in enumerate(shape):
            if isinstance(spec.shape[axis], str) and sizes.setdefault(_symbol(spec, axis), size) != size:
                raise InputError(
                    where,
                    f"two sizes for {spec.shape[axis]!r}",
                    got=f"{sizes[_symbol(spec, axis)]} and {size}",
                    expected="one size for every axis of that name",
                )
        shapes[spec.name] = shape
    return shapes


def _symbol(spec: TensorSpec, axis: int) -> str:
    """Name of a free size; an axis that has none ("" or "?") is free of all others."""
    size = spec.shape[axis]
    return size if isinstance(size, str) and size not in ("", "?") else f"{spec.name}[{axis}]"


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


def _text(shape: Sequence[int | str]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
