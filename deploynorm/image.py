"""How an image becomes a network's input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploynorm.errors import BackendError, InputError

_LARGEST = 1e30
"""Of a mean or standard deviation: with it float32 still has the pixels."""
_MOST_VALUES = 2**28
"""Of one image: 1 GB in float32."""


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
        if not (isinstance(shape, tuple) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)):
            raise InputError("input.shape", "not the shape of an image", got=shape, expected="C, H, W, each at least 1")
        if math.prod(shape) > _MOST_VALUES:
            raise InputError("input.shape", "is too large", got=shape, expected=f"at most {_MOST_VALUES:,} values")
        fields: dict[str, tuple[Any, str]] = {"mean": (self.mean, "numbers"), "std": (self.std, "positive numbers")}
        for key, (values, kind) in fields.items():
            sound = isinstance(values, tuple) and len(values) == self.shape[0] and all(map(_is_number, values))
            if not sound or (key == "std" and min(values) <= 0):
                expected = f"{self.shape[0]} finite {kind}"
                raise InputError(f"input.{key}", "does not fit the channels", got=values, expected=expected)

    @classmethod
    def from_dict(cls, data: object) -> ImageSpec:
        """Reads {"shape": [C, H, W], "mean": [C numbers], "std": [C numbers]}; InputError names a key that is wrong."""
        keys = ("shape", "mean", "std")
        expected = f"the keys {', '.join(keys)}"
        if not isinstance(data, Mapping):
            raise InputError("input", "not a table", got=type(data).__name__, expected=expected)
        for key in (*keys, *data):
            if key not in keys or key not in data:
                raise InputError(f"input.{key}", "missing" if key in keys else "unknown key", expected=expected)
            if not isinstance(data[key], list | tuple):
                raise InputError(f"input.{key}", "not a list", got=repr(data[key]))
        fields: Any = (tuple(data[key]) for key in keys)
        return cls(*fields)

    def to_dict(self) -> dict[str, list[int] | list[float]]:
        """As plain lists, which from_dict reads back."""
        return {"shape": list(self.shape), "mean": list(self.mean), "std": list(self.std)}

    def read(self, path: Path | str) -> npt.NDArray[np.float32]:
        """Reads an image as this network requires it: grey for C = 1, RGB for C = 3, (pixels / 255 - mean) / std.

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
            expected = "1 (grey) or 3 (RGB)"
            raise InputError(where, "no colour space of that many channels", got=channels, expected=expected)
        try:
            from PIL import Image
        except ImportError as error:
            raise BackendError(where, "reading images needs Pillow", fix='pip install "pillow>=10"') from error
        try:
            with Image.open(path) as opened:
                mode = opened.mode
                deep = mode == "F" or mode.startswith("I")
                image = opened if deep else opened.convert("L" if channels == 1 else "RGB")
        except FileNotFoundError as error:
            raise InputError(where, "no such file") from error
        except Exception as error:  # decoders of broken files raise nearly anything
            raise InputError(where, "not an image that Pillow can read", fix="give a PNG or JPEG file") from error
        if deep:
            raise InputError(where, "not 8 bits a channel", got=f"mode {mode}", fix="convert it to 8 bits")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.float64).reshape(height, width, channels).transpose(2, 0, 1) / 255
        mean, std = (np.array(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        normalized: npt.NDArray[np.float32] = ((pixels - mean) / std).astype(np.float32)[np.newaxis]
        return normalized


def as_labels(data: object) -> tuple[str, ...] | None:
    """The class names in what JSON or a checkpoint holds; None for none. InputError unless they are a list of text."""
    if data is None:
        return None
    if not isinstance(data, list | tuple) or not all(isinstance(name, str) for name in data):
        raise InputError("labels", "not the names of classes", got=type(data).__name__, expected="a list of text")
    return tuple(data)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST
