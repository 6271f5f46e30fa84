"""Filter response normalization as a composition of PyTorch operators, which autograd and torch.func differentiate.

_handwritten.py has the two passes written out instead, which is what training runs where no native kernel is built.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    epsilon = per_channel(eps, x) if isinstance(eps, Tensor) else eps
    # gamma times the inverse root first: one multiplication fewer for every element of x.
    y = v * (per_channel(gamma, x) * torch.rsqrt(mean_square(v) + epsilon)) + per_channel(beta, x)
    if residual is not None:
        y = y + residual
        if tau is not None:
            y = torch.where(y <= (bound := per_channel(tau, x)), bound, y)
    elif tau is not None:
        # clamp, not maximum: maximum splits the gradient at a tie in two, where eq. 4 gives all of it to y.
        y = torch.clamp(y, min=per_channel(tau, x))
    return cast(y, x.dtype)


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
