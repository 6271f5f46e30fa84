"""Builds our layers from a recipe and the layer that it is for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deploynorm._adopt.numbers import Numbers, Tried, UnrecognizedError, numbers_of, shortest
from deploynorm._adopt.recipes import Part, Recipe
from deploynorm.layers import TLU, FRN1d, FRN2d, FRN3d, MABN1d, MABN2d, MABN3d
from deploynorm.trace import copied

FRN: dict[int, type[FRN1d | FRN2d | FRN3d]] = {3: FRN1d, 4: FRN2d, 5: FRN3d}
MABN: dict[int, type[MABN1d | MABN2d | MABN3d]] = {3: MABN1d, 4: MABN2d, 5: MABN3d}
"""By the rank of the input."""

_FLOOR = 1e-20
"""The constant part of a learned epsilon |eps| that has none: nothing in float32, and a layer's must be positive."""

Memo = dict[int, nn.Parameter]
"""Parameters of ours by the ids of those that they are made of: what layers share they go on sharing."""


class ChannelsLast(nn.Module):
    """A layer for (N, C, ...) between the transpositions from and to (N, ..., C)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result, channels last."""
        y: Tensor = self.layer(x.movedim(-1, 1))
        return y.movedim(1, -1)


class _Builder:
    """Ours for one layer: parameters of it stay parameters where they are one number for each channel."""

    def __init__(self, layer: nn.Module, recipe: Recipe, channels: int, rank: int, memo: Memo) -> None:
        self._layer, self._recipe, self._channels, self._rank, self._memo = layer, recipe, channels, rank, memo
        self._tensors = dict([*layer.named_parameters(), *layer.named_buffers()])
        first = next(x for x in self._tensors.values() if x.is_floating_point())
        self._like: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
        self._numbers: Numbers | None = None

    def build(self) -> nn.Module:
        parts = self._recipe.parts
        if self._recipe.kind == "frn":
            new = self._frn()
        elif self._recipe.kind == "tlu":
            new = TLU(self._channels, **self._like)
            new.tau = self._parameter("tau")
        else:
            new = self._mabn()
        new = ChannelsLast(new) if self._recipe.channels_last else new
        behind = [self._layer.get_submodule(name) for name in self._recipe.behind]
        tau = parts.get("tau")
        if self._recipe.kind == "frn" and tau is not None and not tau.tensor and tau.plus == 0:
            behind = [nn.ReLU(), *behind]
        behind = [each for each in behind if not isinstance(each, nn.Identity)]
        return (nn.Sequential(new, *behind) if behind else new).train(self._layer.training)

    def _frn(self) -> nn.Module:
        tau, eps = self._recipe.parts["tau"], self._recipe.parts["eps"]
        given = None if eps is None or not eps.tensor else self._tensors[eps.tensor]
        learned = None if given is None or not self._recipe.absolute or not given.requires_grad else given
        kind, tlu = FRN[self._rank], tau is None or bool(tau.tensor) or tau.plus not in (0, -float("inf"))
        if learned is None or eps is None:
            value = self._fixed("eps", eps)
            alike = bool((value == value[0]).all())
            frn = kind(self._channels, shortest(float(value[0])) if alike else value, tlu=tlu, **self._like)
        else:
            per = "layer" if learned.numel() == 1 else "channel"
            frn = kind(self._channels, eps.plus or _FLOOR, learned_eps=per, tlu=tlu, **self._like)  # type: ignore[arg-type]
            frn.eps_l = self._shared(learned, () if per == "layer" else (self._channels,))
        frn.weight, frn.bias = self._parameter("weight"), self._parameter("bias")
        if tlu:
            frn.tau = self._parameter("tau")
        return frn

    def _mabn(self) -> nn.Module:
        parts = self._recipe.parts
        affine = (parts["weight"], parts["bias"]) != (Part("", 1), Part("", 0))
        mabn = MABN[self._rank](self._channels, self._recipe.eps, affine=affine, **self._like)
        if affine:
            mabn.weight, mabn.bias = self._parameter("weight"), self._parameter("bias")
        mabn.running_var.copy_(self._fixed("running_var", parts["running_var"]))
        # As a checkpoint without histories: training begins with a warm-up, and goes on from running_var.
        mabn.num_batches_tracked.fill_(1)
        return mabn

    def _parameter(self, name: str) -> nn.Parameter:
        part = self._recipe.parts[name]
        given = self._tensors[part.tensor] if part is not None and part.tensor else None
        if isinstance(given, nn.Parameter) and given.numel() == self._channels:
            return self._shared(given, (self._channels,))
        value = self._fixed(name, part).to(**self._like)
        return nn.Parameter(value, requires_grad=False)

    def _shared(self, parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
        if isinstance(parameter, nn.Parameter) and parameter.shape == shape:
            return parameter
        if id(parameter) not in self._memo:
            made = nn.Parameter(parameter.detach().reshape(shape), parameter.requires_grad)
            self._memo[id(parameter)] = made
        return self._memo[id(parameter)]

    def _fixed(self, name: str, part: Part | None) -> Tensor:
        """The numbers as they are now, (C,)."""
        if part is None:
            if self._numbers is None:
                twin = copied(self._layer).cpu().requires_grad_(False)
                for child in self._recipe.behind:
                    setattr(twin, child, nn.Identity())
                tried = Tried(twin.double().eval(), self._channels, self._rank, self._recipe.channels_last)
                [found] = numbers_of([tried])
                if isinstance(found, UnrecognizedError):
                    raise found
                self._numbers = found
            field = {"weight": "scale", "bias": "shift"}.get(name, name)
            value = torch.tensor(getattr(self._numbers, field))
        elif part.tensor:
            value = self._tensors[part.tensor].detach().reshape(-1).expand(self._channels)
            if name == "eps":
                value = (value.abs() if self._recipe.absolute else value) + part.plus
        else:
            value = torch.full((self._channels,), part.plus, dtype=torch.float64)
        moved: Tensor = value.to(self._like["device"])
        return moved


def build(layer: nn.Module, recipe: Recipe, channels: int, rank: int, memo: Memo) -> nn.Module:
    """Our layer for a layer of this recipe, in its mode and on its device.

    Raises:
        InputError: Ours do not take its numbers, such as an epsilon of 0.
        UnrecognizedError: Numbers that are none of its tensors cannot be read off its trace.
    """
    return _Builder(layer, recipe, channels, rank, memo).build()
