"""What a network returns, as tensors in tuples, lists and dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree


def as_plain(returned: Any) -> Any:
    """A network's result in forms that torch.export knows.

    1. A dataclass or a Mapping, as the results of transformers are, becomes a dict, without fields that are None.
    2. A number becomes a tensor of no axes.
    """
    if dataclasses.is_dataclass(returned) and not isinstance(returned, type):  # case 1
        returned = {field.name: getattr(returned, field.name) for field in dataclasses.fields(returned)}
        return {key: as_plain(value) for key, value in returned.items() if value is not None}
    if isinstance(returned, Mapping):
        return {key: as_plain(value) for key, value in returned.items() if value is not None}
    if isinstance(returned, list | tuple):
        items = [as_plain(item) for item in returned]
        return items if isinstance(returned, list) else tuple(items)
    return torch.tensor(returned) if isinstance(returned, int | float) else returned  # case 2


def tensors_of(returned: Any) -> list[Any]:
    """The tensors of a result in order, and whatever else is in it; None does not count."""
    return [leaf for leaf in _pytree.tree_leaves(as_plain(returned)) if leaf is not None]


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """Lets a network return its result `as_plain`."""
    handle = model.register_forward_hook(lambda module, inputs, returned: as_plain(returned))
    try:
        yield
    finally:
        handle.remove()
