"""What a layer holds besides its code, so that a call that changes it can be seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def state(layer: nn.Module) -> list[Any]:
    """Tensors, other attributes and hooks of a layer and of what is in it, as values that a later call leaves alone."""
    return [_kept(layer.state_dict()), *(_kept(vars(module)) for module in layer.modules())]


def is_unchanged(before: Any, now: Any) -> bool:
    """Whether two states are equal: tensors to the last bit, and objects of unknown kinds the same ones."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(is_unchanged, before, now))
    if isinstance(before, Tensor):
        alike = isinstance(now, Tensor) and (now.dtype, now.shape) == (before.dtype, before.shape)
        return alike and torch.equal(_bits(before), _bits(now))
    if isinstance(before, (bool, int, float, str)):
        return type(before) is type(now) and repr(before) == repr(now)
    return before is now


def _kept(value: Any) -> Any:
    """A value that a change of the given one does not change."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return [_kept(each) for item in value.items() for each in item]
    return [_kept(each) for each in value] if isinstance(value, (list, tuple, set, frozenset)) else value


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8) if x.layout == torch.strided else x
