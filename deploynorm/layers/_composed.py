"""Filter response normalization as a composition of PyTorch operators, which autograd and torch.func differentiate.

_handwritten.py has the two passes written out instead, which is what training runs where no native kernel is built.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from deploynorm.layers._precision import cast, compute_dtype, per_channel


def composed(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    tau: Tensor | None,
    eps: float | Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """y = max(gamma * x / sqrt(mean(x**2) + eps) + beta [+ residual], tau), with derivatives of any order and kind.

    Autograd saves three tensors of x's size for it. At a tie y == tau the gradient goes to y; with a residual, to tau.
    """
    v = cast(x, compute_dtype(x.dtype))
    y = _scaled(v, mean_square(v), gamma, beta, eps)
    if residual is not None:
        y = y + residual
        if tau is not None:
            y = torch.where(y <= (bound := per_channel(tau, x)), bound, y)
    elif tau is not None:
        # clamp, not maximum: maximum splits the gradient at a tie in two, where eq. 4 gives all of it to y.
        y = torch.clamp(y, min=per_channel(tau, x))
    return cast(y, x.dtype)


def for_exporters(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    tau: Tensor | None,
    eps: float | Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """`composed` in the operators that exporters and runtimes know best: products, a mean over axes, a maximum.

    Sizes are not read, so that a trace holds for all of them. The parameters' gradients are NaN for maps without a
    position; at a tie y == tau the gradient is split.
    """
    v = cast(x, compute_dtype(x.dtype))
    # (N, C, L, 1) for (N, C, L): after a mean over (N, C, L), OpenVINO 2026.4 on a CPU adds the epsilons of channels to
    # samples instead.
    wide = v.unsqueeze(-1) if v.dim() == 3 else v
    spatial = tuple(range(2, wide.dim()))
    mean = (wide * wide).mean(spatial, keepdim=True) if spatial else wide * wide
    y = _scaled(wide, mean, gamma, beta, eps)
    y = y.squeeze(-1) if v.dim() == 3 else y
    if residual is not None:
        y = y + residual
    if tau is not None:
        y = torch.maximum(y, per_channel(tau, x))
    return cast(y, x.dtype)


def _scaled(v: Tensor, mean: Tensor, gamma: Tensor, beta: Tensor, eps: float | Tensor) -> Tensor:
    """gamma * v / sqrt(mean + eps) + beta."""
    epsilon = per_channel(eps, v) if isinstance(eps, Tensor) else eps
    # gamma times the inverse root first: one multiplication fewer for every element of v.
    return v * (per_channel(gamma, v) * torch.rsqrt(mean + epsilon)) + per_channel(beta, v)


def positions(x: Tensor) -> int:
    """Spatial positions that a mean is over; 1 and not 0 for maps of no size, where 0/0 would reach the gradients."""
    return max(math.prod(x.shape[2:]), 1)


def spatial_sum(values: Tensor) -> Tensor:
    """Sum of values (N, C, ...) over the spatial axes, which stay with size 1."""
    spatial = tuple(range(2, values.dim()))
    return values.sum(spatial, keepdim=True) if spatial else values  # sum(()) would be over every axis


def mean_square(v: Tensor) -> Tensor:
    """Mean of v**2 over the spatial axes of v (N, C, ...), which stay with size 1."""
    return spatial_sum(v.square()) / positions(v)


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is active: both require a function of PyTorch's operators."""
    if torch.compiler.is_compiling():
        return False
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def recorded() -> bool:
    """Whether torch.jit.trace records what is computed, for itself or for torch.onnx.export by TorchScript."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
