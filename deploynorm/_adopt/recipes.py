"""Which tensor of a layer is which number of ours: found once for all layers of one class and arguments."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deploynorm._adopt.numbers import Array, Numbers, UnrecognizedError, numbers_of, same_numbers
from deploynorm.trace import copied

Kind = Literal["frn", "tlu", "mabn", "affine"]

_SMALLEST, _LARGEST = 0.5, 1.5
"""Of the values that a layer's tensors are given, to be told apart."""


class Part(NamedTuple):
    """One number for each channel: a tensor of the layer by its name, and what is added to it; "" without a tensor."""

    tensor: str
    plus: float = 0.0


class Recipe(NamedTuple):
    """What a layer computes, and where the numbers of ours come from.

    Attributes:
        kind: "frn" (with a threshold or without), "tlu", "mabn", or "affine": a scale, a shift and a threshold that are
            none of these, such as a frozen batch normalization.
        parts: Of ours, by the names of its parameters; None where a number is computed in another way.
        eps: Of "mabn".
        absolute: Whether it is |eps| that an "frn" adds.
        behind: The layer's own children that it calls behind that, in order.
        channels_last: Whether its input is (N, ..., C).
    """

    kind: Kind
    parts: Mapping[str, Part | None]
    channels_last: bool
    eps: float = 0.0
    absolute: bool = False
    behind: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        return None not in self.parts.values()


def tensors_per_channel(layer: nn.Module, channels: int) -> dict[str, Tensor]:
    """The layer's tensors of one number, or one for each channel."""
    named = itertools.chain(layer.named_parameters(), layer.named_buffers())
    return {name: x for name, x in named if x.is_floating_point() and x.numel() in (1, channels)}


def recipe_of(layer: nn.Module, channels: int, rank: int, *, channels_last: bool) -> Recipe:
    """The recipe of a layer; it does not depend on the values of its tensors.

    Raises:
        UnrecognizedError: It computes something else.
    """
    children = [name for name, _ in layer.named_children()]
    if children:
        try:
            return _recipe(layer, channels, rank, channels_last, children)
        except UnrecognizedError:
            pass
    return _recipe(layer, channels, rank, channels_last, ())


def _recipe(layer: nn.Module, channels: int, rank: int, channels_last: bool, without: Any) -> Recipe:
    twin = copied(layer)
    for name in without:
        setattr(twin, name, nn.Identity())
    twin = twin.double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tensors = tensors_per_channel(twin, channels)
    for x in tensors.values():
        x.uniform_(_SMALLEST, _LARGEST, generator=generator)
    values = {name: x.reshape(-1).expand(channels).numpy().copy() for name, x in tensors.items()}
    if not values:
        raise UnrecognizedError("it has no numbers for its channels")
    numbers = numbers_of(twin, channels, rank, channels_last=channels_last)
    found = _matched(numbers, values, {name for name, _ in twin.named_buffers()})
    eps = found.parts.get("eps")
    if eps is not None and eps.tensor:
        of = tensors[eps.tensor]
        for sign in (-1, 1):  # of small values what is added shows, and of negative ones whether |eps| is
            of.uniform_(1e-4, 2e-4, generator=generator).mul_(sign)
            with suppress(UnrecognizedError):  # the root of a negative number
                again = numbers_of(twin, channels, rank, channels_last=channels_last)
                assert again.eps is not None
                added = again.eps - of.abs().reshape(-1).expand(channels).numpy()
                if not np.allclose(added, added[0], rtol=1e-4, atol=1e-10):
                    eps = None
                else:
                    eps = Part(eps.tensor, 0.0 if abs(added[0]) < 1e-10 else float(f"{added[0]:.6g}"))
                found = found._replace(parts={**found.parts, "eps": eps}, absolute=sign < 0)
                break
    return found._replace(behind=tuple(without))


def _matched(numbers: Numbers, values: Mapping[str, Array], buffers: Collection[str]) -> Recipe:
    scale, shift, tau, eps, last = numbers
    scale_of, shift_of, tau_of = (_part(each, values) for each in (scale, shift, tau))
    known = [part for part in (scale_of, shift_of, tau_of) if part is not None]
    if len(known) == 3 and not any(part.tensor for part in known) and eps is None:
        raise UnrecognizedError("it has no numbers for its channels")
    if eps is not None:
        parts = {"weight": scale_of, "bias": shift_of, "tau": tau_of, "eps": _part(eps, values, shifted=True)}
        return Recipe("frn", parts, last)
    if scale_of == Part("", 1) and shift_of == Part("", 0) and tau_of is not None:
        return Recipe("tlu", {"tau": tau_of}, last)
    if shift_of is not None and np.isneginf(tau).all():
        for weight, moment, added in _second_moments(scale, values, buffers):
            return Recipe("mabn", {"weight": weight, "bias": shift_of, "running_var": moment}, last, added)
    return Recipe("affine", {"tau": tau_of}, last)


def _part(number: Array, values: Mapping[str, Array], *, shifted: bool = False) -> Part | None:
    """Which tensor the number is, or with `shifted` is but for what is added to it."""
    for name, value in values.items():
        if same_numbers(number, value):
            return Part(name)
    if (number == number[0]).all():
        return Part("", float(number[0]))
    if shifted:
        for name, value in values.items():
            if same_numbers(number, value + np.mean(number - value)):
                return Part(name)
    return None


def _second_moments(
    scale: Array, values: Mapping[str, Array], buffers: Collection[str]
) -> Iterator[tuple[Part, Part, float]]:
    """Each way to write the scale as weight * (running second moment + eps)^-0.5."""
    for moment, of in ((name, value) for name, value in values.items() if name in buffers):
        for weight, factor in (("", np.ones_like(scale)), *values.items()):
            if weight == moment:
                continue
            added = (factor / scale) ** 2 - of
            eps = float(np.mean(added))
            if 0 < eps < 1e-2 and np.allclose(added, eps, rtol=1e-4, atol=1e-9):
                yield Part(weight, 0.0 if weight else 1.0), Part(moment), float(f"{eps:.6g}")


def key_of(layer: nn.Module, channels: int, rank: int) -> tuple[object, ...]:
    """Equal for layers of one class and arguments, whatever their values and number of channels are."""

    def plain(value: object) -> object:
        if isinstance(value, (bool, float, str, type(None))):
            return value
        if isinstance(value, int):
            return "channels" if value == channels else value
        if isinstance(value, (tuple, list)):
            return tuple(map(plain, value))
        if isinstance(value, Tensor) and value.numel() <= 1:
            return tuple(value.reshape(-1).tolist())
        return id(value)

    found: list[object] = [rank]
    for name, module in layer.named_modules():
        own = {each: plain(value) for each, value in vars(module).items() if each[0] != "_" and each != "training"}
        tensors = {each: x.numel() == 1 for each, x in (*module._parameters.items(), *module._buffers.items()) if x is not None}
        found.append((name, type(module), tuple(own.items()), tuple(tensors.items())))
    return tuple(found)
