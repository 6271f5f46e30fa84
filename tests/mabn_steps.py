"""MABN's formulas as a literal loop, and training steps to compare a layer with it.

layer, data = new_layer(), batches(20, (3, 2), range(1, 5))
loop = Loop(layer)
for x, dy in data:
    assert_step_agrees(layer, loop, x, dy)

The backward pass of MABN is not the gradient of its forward pass and must not be: after the warm-up the two differ, and
the loop is the reference.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from tolerances import MABN_LOOP
from torch import nn

from deploynorm.layers import MABN2d
from deploynorm.layers.mabn import _MABN

Layer = TypeVar("Layer", bound=_MABN)
Array = np.ndarray[Any, Any]
C = 3
SHORT: dict[str, Any] = {"warmup": 5, "renorm_start": 8, "moving_batch_size": 8, "dtype": torch.float64}


class Loop:
    """The docstring of MABN2d, word by word, on plain lists of all past iterations."""

    def __init__(self, layer: _MABN) -> None:
        self.settings, self.eps = layer, layer.eps
        self.iteration = 0
        self.R = np.ones(C)
        self.past_chi2: list[tuple[int, Array]] = []
        self.past_psi: list[tuple[int, Array]] = []
        self.clipped = {"low": 0, "high": 0, "not": 0}

    def average(self, past: list[tuple[int, Array]]) -> Array:
        samples, total = 0, np.zeros(C)
        for n, statistic in reversed(past):
            if samples and samples + n > self.settings.moving_batch_size:
                break
            samples, total = samples + n, total + n * statistic
        return total / samples

    def step(self, x: Array, w: Array, b: Array, dy: Array) -> tuple[Array, Array, Array, Array]:
        """y, dx, dw and db; x is (N, C, length)."""
        self.iteration += 1
        self.past_chi2.append((len(x), (x**2).mean((0, 2))))
        warm = self.iteration <= self.settings.warmup
        chi2 = self.past_chi2[-1][1] if warm else self.average(self.past_chi2)
        ratio = np.sqrt(chi2 + self.eps) / np.sqrt(self.R + self.eps)
        r = np.ones(C)
        if self.iteration > max(self.settings.warmup, self.settings.renorm_start):
            bound = self.settings.max_renorm
            r = np.clip(ratio, 1 / bound, bound)
            self.clipped["low"] += int((ratio < 1 / bound).sum())
            self.clipped["high"] += int((ratio > bound).sum())
            self.clipped["not"] += int((r == ratio).sum())
        momentum = self.settings.momentum
        self.R = chi2 if self.iteration == 1 else (1 - momentum) * self.R + momentum * chi2

        root = np.sqrt(chi2 + self.eps)[None, :, None]
        w, b, r = (v[None, :, None] for v in (w, b, r))
        z = x / root
        y = w * r * z + b
        g = dy * w * r
        self.past_psi.append((len(x), (g * z).mean((0, 2))))
        psi = (self.past_psi[-1][1] if warm else self.average(self.past_psi))[None, :, None]
        dx = (g - z * psi) / root
        return y, dx, (dy * r * z).sum((0, 2)), dy.sum((0, 2))


def trained_affine(layer: Layer) -> Layer:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.7, -1.3, 1.1]))
        layer.bias.copy_(torch.tensor([0.2, 0.0, -0.4]))
    return layer


def new_layer(**settings: Any) -> MABN2d:
    """With the settings of SHORT where these do not say otherwise, and a weight and bias that are no longer initial."""
    return trained_affine(MABN2d(C, **{**SHORT, **settings}))


def run_step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y and the gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy))


def assert_step_agrees(layer: _MABN, loop: Loop, x: torch.Tensor, dy: torch.Tensor) -> None:
    def columns(t: torch.Tensor) -> Array:
        return t.detach().double().numpy().reshape(len(t), C, -1)

    got = run_step(layer, x, dy)
    expected = loop.step(columns(x), layer.weight.detach().numpy(), layer.bias.detach().numpy(), columns(dy))
    for name, a, b in zip(("y", "dx", "dw", "db"), got, expected, strict=True):
        np.testing.assert_allclose(a.numpy().reshape(b.shape), b, **MABN_LOOP.kwargs(), err_msg=name)
    np.testing.assert_allclose(layer.running_var.numpy(), loop.R, **MABN_LOOP.kwargs())


def batches(steps: int, spatial: tuple[int, ...], sizes: range, *, scaled: bool = True) -> Any:
    """Random batches and gradients, whose scale jumps by a factor of ten every fifty steps and back."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        n = int(torch.randint(sizes.start, sizes.stop, (), generator=generator))
        scale = 10.0 if scaled and step // 50 % 2 else 1.0
        x, dy = (torch.randn(n, C, *spatial, generator=generator, dtype=torch.float64) for _ in range(2))
        yield x * scale * torch.tensor([0.1, 1.0, 3.0]).reshape(C, *(1,) * len(spatial)), dy


def plain(x: torch.Tensor, layer: _MABN) -> torch.Tensor:
    """Mean-free batch normalization, for autograd to differentiate."""
    reduced = [0, *range(2, x.dim())]
    shape = (1, C, *(1,) * (x.dim() - 2))
    z = x * torch.rsqrt(x.square().mean(reduced, keepdim=True) + layer.eps)
    return layer.weight.reshape(shape) * z + layer.bias.reshape(shape)
