"""Which tensor of a layer is which number of ours: found once for all layers of one class and arguments."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deploynorm._adopt.numbers import (
    Array,
    Numbers,
    Tried,
    UnrecognizedError,
    for_all_sizes,
    numbers_of,
    same_numbers,
    shortest,
)
from deploynorm.trace import copied

Kind = Literal["frn", "tlu", "mabn", "affine"]

_SMALLEST, _LARGEST = 1e-2, 2e-2
"""Of the values that a layer's tensors are given, to be told apart: so small that what is added to them, such as 1e-6,
shows, and so large that x and tanh(x) differ."""

OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that each module has; all others are its own arguments and state."""


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


class Question(NamedTuple):
    """A layer of which a recipe is wanted, and the axis of its channels."""

    layer: nn.Module
    channels: int
    rank: int
    channels_last: bool


def recipes_of(questions: Sequence[Question]) -> list[Recipe | UnrecognizedError]:
    """The recipe of each layer, which does not depend on the values of its tensors, or why there is none.

    A layer is asked without its children too: what is left may be a recipe that they follow.
    """
    found: list[Recipe | UnrecognizedError] = [UnrecognizedError("it has no numbers for its channels")] * len(questions)
    known: dict[int, Tried] = {}
    for sign in (-1, 1):  # of negative values it shows whether |eps| is added; the root of others would be none
        tries = [
            (place, _Try(question, children, sign))
            for place, question in enumerate(questions)
            if isinstance(found[place], UnrecognizedError)
            for children in dict.fromkeys((tuple(name for name, _ in question.layer.named_children()), ()))
        ]
        tries = [(place, each) for place, each in tries if each.values]
        numbers = numbers_of([each.tried for _, each in tries])
        for (place, each), of in zip(tries, numbers, strict=True):
            if isinstance(of, UnrecognizedError):
                before = found[place]
                if isinstance(before, UnrecognizedError) and not before.near:
                    found[place] = of
            elif isinstance(found[place], UnrecognizedError):
                with suppress(UnrecognizedError):
                    found[place] = each.recipe(of)
                    known[place] = each.tried
    for place, why in zip(known, for_all_sizes(list(known.values())), strict=True):
        if why:
            found[place] = UnrecognizedError(why, near=True)
    return found


class _Try:
    """A copy of a layer, without some of its children, with values in its tensors that tell one from the other."""

    def __init__(self, question: Question, without: tuple[str, ...], sign: int) -> None:
        twin = copied(question.layer)
        for name in without:
            setattr(twin, name, nn.Identity())
        twin = twin.double().eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        self._parameters = {name for name, _ in twin.named_parameters()}
        self._without, self._sign = without, sign
        self.values: dict[str, Array] = {}
        for name, x in tensors_per_channel(twin, question.channels).items():
            x.uniform_(_SMALLEST, _LARGEST, generator=generator)
            x.mul_(sign if name in self._parameters else 1)
            self.values[name] = x.reshape(-1).expand(question.channels).numpy().copy()
        self.tried = Tried(twin, *question[1:])

    def recipe(self, numbers: Numbers) -> Recipe:
        """The recipe by which the layer's tensors give these numbers; UnrecognizedError where none of them does."""
        scale, shift, tau, eps, last = numbers
        scale_of, shift_of, tau_of = (self._part(each) for each in (scale, shift, tau))
        known = [part for part in (scale_of, shift_of, tau_of) if part is not None]
        if len(known) == 3 and not any(part.tensor for part in known) and eps is None:
            raise UnrecognizedError("it has no numbers for its channels")
        if eps is not None:
            eps_of = self._eps(eps)
            parts = {"weight": scale_of, "bias": shift_of, "tau": tau_of, "eps": eps_of}
            absolute = self._sign < 0 and eps_of is not None and eps_of.tensor in self._parameters
            return Recipe("frn", parts, last, absolute=absolute, behind=self._without)
        if scale_of == Part("", 1) and shift_of == Part("", 0) and tau_of is not None:
            return Recipe("tlu", {"tau": tau_of}, last, behind=self._without)
        if shift_of is not None and np.isneginf(tau).all():
            buffers = self.values.keys() - self._parameters
            for weight, moment, added in _second_moments(scale, self.values, buffers):
                parts = {"weight": weight, "bias": shift_of, "running_var": moment}
                return Recipe("mabn", parts, last, added, behind=self._without)
        return Recipe("affine", {"tau": tau_of}, last, behind=self._without)

    def _part(self, number: Array) -> Part | None:
        """Which tensor the number is."""
        for name, value in self.values.items():
            if same_numbers(number, value):
                return Part(name)
        return Part("", shortest(number[0])) if (number == number[0]).all() else None

    def _eps(self, number: Array) -> Part | None:
        """Which tensor's absolute value it is, and what is added to it."""
        for name, value in self.values.items():
            added = number - abs(value)
            if np.allclose(added, added[0], rtol=1e-6, atol=1e-9) and added[0] > -1e-9:
                return Part(name, 0.0 if added[0] < 2e-9 else float(f"{added[0]:.6g}"))
        return Part("", shortest(number[0])) if (number == number[0]).all() else None


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
        own = {each: plain(value) for each, value in vars(module).items() if each not in OF_MODULES}
        named = (*module._parameters.items(), *module._buffers.items())
        tensors = {each: x.numel() == 1 for each, x in named if x is not None}
        found.append((name, type(module), tuple(own.items()), tuple(tensors.items())))
    return tuple(found)
