"""Layers that compute what published implementations do, with tensors of the same shapes: written from their formulas.

Facts of each (names and shapes of tensors, the epsilon, whether the threshold is fused) are in the class's docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def parameter(*shape: int, value: float = 1.0, grad: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, float(value)), requires_grad=grad)


class FusedFRN(nn.Module):
    """gamma, beta, tau (1, C, 1, ...); eps as given: a number, or a parameter of some shape; |eps| + floor."""

    def __init__(self, channels: int, rank: int = 4, *, eps: float | nn.Parameter = 1e-6, floor: float = 0.0) -> None:
        super().__init__()
        shape = (1, channels, *(1,) * (rank - 2))
        self.gamma, self.beta, self.tau = parameter(*shape), parameter(*shape, value=0), parameter(*shape, value=0)
        self.eps: Any = eps
        self.floor = floor

    def normalized(self, x: Tensor) -> Tensor:
        second = x.pow(2).mean(tuple(range(2, x.dim())), keepdim=True)
        eps = self.eps if isinstance(self.eps, float) else self.eps.abs() + self.floor
        return x * torch.rsqrt(second + eps)

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(self.gamma * self.normalized(x) + self.beta, self.tau)


class ReluFRN(FusedFRN):
    """MindSpore: the threshold as relu(y - tau) + tau."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gamma * self.normalized(x) + self.beta - self.tau) + self.tau


class SwitchedFRN(FusedFRN):
    """tattaka: the threshold only where it is switched on."""

    def __init__(self, channels: int, activated: bool) -> None:
        super().__init__(channels, eps=parameter(1, channels, 1, 1, value=1e-5), floor=1e-6)
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.activated else self.gamma * self.normalized(x) + self.beta


class DividedFRN(FusedFRN):
    """torch-uncertainty, and codes of Bayesian networks: x divided by a root."""

    def normalized(self, x: Tensor) -> Tensor:
        return x * 1 / torch.sqrt(x.square().mean(dim=list(range(2, x.dim())), keepdim=True) + self.eps)


class SeparateFRN(nn.Module):
    """yukkyo, fast-reid, kornia's HyNet, MX-Font: weight, bias (1, C, 1, 1), eps (1) a buffer or a parameter, |eps|."""

    def __init__(self, channels: int, *, learned: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = parameter(1, channels, 1, 1), parameter(1, channels, 1, 1, value=0)
        if learned:
            self.eps = parameter(1, value=eps)
        else:
            self.register_buffer("eps", torch.tensor([eps]))

    def forward(self, x: Tensor) -> Tensor:
        second = x.pow(2).mean(dim=[2, 3], keepdim=True)
        return self.weight * (x * torch.rsqrt(second + self.eps.abs())) + self.bias


class SeparateTLU(nn.Module):
    """Their threshold, a layer of its own; HyNet's begins at -1."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.tau = parameter(*shape, value=-1.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(x, self.tau)


class FlatFRN(nn.Module):
    """DeepFaceLab's: weight, bias, tau (C), eps (1) trainable, reshaped in each call."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias, self.tau = (
            parameter(channels),
            parameter(channels, value=0),
            parameter(channels, value=0),
        )
        self.eps = parameter(1, value=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        x = x * (1 / torch.sqrt((x * x).mean((2, 3), keepdim=True) + self.eps.abs()))
        return torch.maximum(x * self.weight.view(shape) + self.bias.view(shape), self.tau.view(shape))


class ListingFRN(nn.Module):
    """The paper's listing as TensorFlow has it: NHWC, tau, beta, gamma (1, 1, 1, C), eps learned, 1e-6 + |eps|."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tau, self.beta, self.gamma = (parameter(1, 1, 1, channels, value=value) for value in (0, 0, 1))
        self.eps = parameter(1, value=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean([1, 2], keepdim=True) + (1e-6 + self.eps.abs()))
        return torch.maximum(self.gamma * x + self.beta, self.tau)


class RootMABN(nn.Module):
    """The official MABN in evaluation: weight, bias (C), running_var (1, C, 1, 1), rings (16, C), iters int64."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = parameter(channels), parameter(channels, value=0), 1e-5
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("buffer_x2", torch.zeros(16, channels))
        self.register_buffer("buffer_gz", torch.zeros(16, channels))

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        shape = (1, len(self.weight), 1, 1)
        return self.weight.view(shape) * (x / (self.running_var + self.eps).sqrt()) + self.bias.view(shape)


class UnifiedNormalization(nn.Module):
    """Unified Normalization in evaluation, for tokens (N, L, C): MABN's with its running second moment (C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = parameter(channels), parameter(channels, value=0)
        self.register_buffer("running_phi", torch.ones(channels))
        self.register_buffer("ema_gz", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(self.running_phi + 1e-5) + self.bias


class RootCenConv(nn.Module):
    """The official CenConv2d: weight (out, in, k, k) minus its mean, one axis after the other."""

    def __init__(self, inputs: int, outputs: int, size: int, **options: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
        return F.conv2d(x, self.weight - mean, self.bias, **self.options)


class DerivedCenConv(nn.Conv2d):
    """CenConv as ports derive it from nn.Conv2d."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def _both(frn: nn.Module, channels: int, *rest: int) -> nn.Module:
    return nn.Sequential(frn, SeparateTLU(1, channels, *rest))


IMAGE, LINE, VOLUME, LAST = (2, 6, 8, 9), (2, 6, 9), (2, 6, 4, 5, 6), (2, 8, 9, 6)
C = 6
"""Channels of all of them."""

PUBLISHED: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    "gupta-abhay": (
        lambda: FusedFRN(C, eps=parameter(1, C, 1, 1, value=1e-6, grad=False)),
        IMAGE,
        "FRN2d",
        "weight bias tau",
    ),
    "gupta-abhay, eps learned": (
        lambda: FusedFRN(C, eps=parameter(1, C, 1, 1, value=1e-6)),
        IMAGE,
        "FRN2d",
        "weight bias tau eps_l",
    ),
    "yukkyo": (lambda: _both(SeparateFRN(C), C, 1, 1), IMAGE, "FRN2d TLU", "weight bias tau"),
    "fast-reid": (lambda: _both(SeparateFRN(C, learned=True), C, 1, 1), IMAGE, "FRN2d TLU", "weight bias eps_l tau"),
    "tattaka": (lambda: SwitchedFRN(C, True), IMAGE, "FRN2d", "weight bias tau eps_l"),
    "tattaka, not activated": (lambda: SwitchedFRN(C, False), IMAGE, "FRN2d", "weight bias eps_l"),
    "knjcode": (lambda: FusedFRN(C, eps=parameter(1, value=1e-6)), IMAGE, "FRN2d", "weight bias tau eps_l"),
    "MindSpore": (lambda: ReluFRN(C, eps=parameter(1, value=1e-6)), IMAGE, "FRN2d", "weight bias tau eps_l"),
    "kornia HyNet": (lambda: _both(SeparateFRN(C), C, 1, 1), IMAGE, "FRN2d TLU", "weight bias tau"),
    "MX-Font": (
        lambda: _both(SeparateFRN(C, learned=True, eps=1e-4), C, 1, 1),
        IMAGE,
        "FRN2d TLU",
        "weight bias eps_l tau",
    ),
    "the listing": (lambda: ListingFRN(C), LAST, "ChannelsLast", "weight bias tau eps_l"),
    "torch-uncertainty 1d": (lambda: DividedFRN(C, 3), LINE, "FRN1d", "weight bias tau"),
    "torch-uncertainty 2d": (lambda: DividedFRN(C, 4), IMAGE, "FRN2d", "weight bias tau"),
    "torch-uncertainty 3d": (lambda: DividedFRN(C, 5), VOLUME, "FRN3d", "weight bias tau"),
    "DeepFaceLab": (lambda: FlatFRN(C), IMAGE, "FRN2d", "weight bias tau eps_l"),
    "MABN": (lambda: RootMABN(C), IMAGE, "MABN2d", "weight bias"),
    "CenConv": (lambda: RootCenConv(C, 4, 3, padding=1, stride=2), IMAGE, "CenConv2d", "weight bias"),
    "CenConv, derived": (lambda: DerivedCenConv(C, 4, 3, groups=2), IMAGE, "CenConv2d", "weight bias"),
}
"""Source -> the layer, an input, the classes that it becomes, and their parameters that are trained."""  # fmt: skip
