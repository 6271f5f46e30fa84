"""What a network returns, as tensors in tuples, lists and dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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


def alike(got: Sequence[Any], want: Sequence[Any], rtol: float) -> bool:
    """Whether two lists of `tensors_of` hold the same, but for errors of rtol times the largest value of an output."""
    return len(got) == len(want) and all(_alike(one, other, rtol) for one, other in zip(got, want, strict=True))


def _alike(got: Any, want: Any, rtol: float) -> bool:
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        return type(got) is type(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.is_floating_point():
        return torch.equal(got, want)
    finite = want[want.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(got, want, rtol=0, atol=rtol * largest, equal_nan=True)


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """Lets a network return its result `as_plain`."""
    handle = model.register_forward_hook(lambda module, inputs, returned: as_plain(returned))
    try:
        yield
    finally:
        handle.remove()
