"""Our own checkpoint: a dict of tensors and plain data that torch.load(weights_only=True) reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deploynorm.checkpoint._state import find_state_dict
from deploynorm.errors import InputError, ModelError
from deploynorm.image import ImageSpec

__all__ = ["Content", "is_own_format", "outline"]

_FORMAT = "deploynorm"
_REQUIRED = ("format", "factory", "kwargs", "state_dict")
_OPTIONAL = ("input", "labels", "training")
_PLAIN = "text, numbers, None, and lists and dicts of them"


def is_own_format(content: object) -> bool:
    """Whether what a file holds claims to be a deploynorm checkpoint."""
    return isinstance(content, Mapping) and isinstance(name := content.get("format"), str) and name == _FORMAT


@dataclass(frozen=True, eq=False)
class Content:
    """What a deploynorm checkpoint says about a network."""

    factory: str
    kwargs: Mapping[str, Any]
    state_dict: Mapping[str, Tensor]
    image: ImageSpec | None
    labels: tuple[str, ...] | None
    training: Mapping[str, Any] | None

    def pack(self, where: str) -> dict[str, Any]:
        """The dict that is written.

        Raises:
            InputError: kwargs, labels or training is not plain data.
        """
        content = {
            "format": _FORMAT,
            "factory": self.factory,
            "kwargs": dict(self.kwargs),
            "input": None if self.image is None else self.image.to_dict(),
            "labels": None if self.labels is None else list(self.labels),
            "state_dict": dict(self.state_dict),
        }
        if self.training is not None:
            content["training"] = dict(self.training)
        if (odd := _odd(content)) is not None:
            raise InputError(where, f"{odd[0]} is not plain data", got=odd[1], expected=_PLAIN)
        return content

    @classmethod
    def unpack(cls, content: Mapping[str, Any], where: str) -> Content:
        """Reads that dict.

        Raises:
            ModelError: A key is missing, unknown or holds another kind of value.
        """
        missing = [key for key in _REQUIRED if key not in content]
        unknown = [repr(key) for key in content if key not in _REQUIRED + _OPTIONAL]
        if missing or unknown:
            wrong = (("without", missing), ("with", unknown))
            raise ModelError(
                where,
                "not a whole deploynorm checkpoint",
                got="; ".join(f"{kind} {', '.join(keys)}" for kind, keys in wrong if keys),
                expected=f"{', '.join(_REQUIRED)}, and perhaps {', '.join(_OPTIONAL)}",
            )
        if (odd := _odd(content)) is not None:
            raise ModelError(where, f"its {odd[0]} is not plain data", got=odd[1], expected=_PLAIN)
        try:
            image = None if content.get("input") is None else ImageSpec.from_dict(content["input"])
        except InputError as error:
            raise ModelError(
                where, f"its {error.where} is wrong: {error.problem}", got=error.got, expected=error.expected
            ) from error
        state = find_state_dict({"state_dict": content["state_dict"]})
        if state is None:
            raise ModelError(
                where,
                "its state_dict is none",
                got=outline(content["state_dict"]),
                expected="tensors by their names",
            )
        labels = content.get("labels")
        return cls(
            content["factory"],
            content["kwargs"],
            state[0],
            image,
            None if labels is None else tuple(labels),
            content.get("training"),
        )


def outline(content: object) -> str:
    """What an object is, for a message: a dict with its first keys, or its type."""
    if not isinstance(content, Mapping):
        return type(content).__name__
    items = [f"{key!r} ({type(value).__name__})" for key, value in [*content.items()][:8]]
    return f"a dict of {len(content)}: {', '.join(items)}" if items else "an empty dict"


def _odd(content: Mapping[str, Any]) -> tuple[str, str] | None:
    """Name and type of the first value of kwargs, labels or training that is none of their kinds."""
    for key, kind in (("kwargs", dict), ("labels", list | tuple), ("training", dict)):
        value = content.get(key)
        if value is None and key != "kwargs":
            continue
        if not isinstance(value, kind):
            return key, type(value).__name__
        if (odd := _odd_inside(value, key, labels=key == "labels")) is not None:
            return odd
    return None


def _odd_inside(value: object, key: str, *, labels: bool = False) -> tuple[str, str] | None:
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        items = [(f"{key}.{name}", item) for name, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{key}[{index}]", item) for index, item in enumerate(value)]
    else:
        plain = value is None or isinstance(value, str | int | float)
        return None if plain else (key, type(value).__name__)
    if labels:
        return next(((name, type(item).__name__) for name, item in items if not isinstance(item, str)), None)
    return next((odd for name, item in items if (odd := _odd_inside(item, name)) is not None), None)
