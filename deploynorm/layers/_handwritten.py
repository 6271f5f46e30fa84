"""Filter response normalization with its forward and backward pass written out in PyTorch, as the native kernels do it.

Backward needs x and one scalar per (sample, channel). _composed.py leaves the derivatives to PyTorch instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deploynorm.layers._composed import mean_square, positions, spatial_sum
from deploynorm.layers._precision import cast, per_channel


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y, and rstd (N, C), 1 / sqrt(mean(x**2) + eps). All parameters are (C,), in x's compute type."""
    x = dense(x)
    v = cast(x, gamma.dtype)
    rstd = torch.rsqrt(mean_square(v) + per_channel(eps, x))
    y = torch.addcmul(per_channel(beta, x), v, per_channel(gamma, x) * rstd)
    if residual is not None:
        y.add_(residual)
    return cast(y.clamp_(min=per_channel(tau, x)), x.dtype), rstd.reshape(x.shape[:2])


def backward(
    dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gamma, beta, tau and eps; the formulas are in plugins/kernels/frn.h."""
    x = dense(x)
    v, g = cast(x, gamma.dtype), cast(dy, gamma.dtype)
    root = rstd.reshape(*rstd.shape, *(1 for _ in range(2, x.dim())))
    scale = per_channel(gamma, x) * root
    below = torch.addcmul(per_channel(beta, x), v, scale) < per_channel(tau, x)
    kept = g.masked_fill(below, 0)
    product = root * spatial_sum(kept * v)
    # root * x is of the size of 1; the powers of the root alone may be out of range.
    correction = scale * (root * (product / positions(x)))
    dx = (kept * scale).addcmul_(v, correction, value=-1)
    if kept.stride() != x.stride():  # dx has the layout of dy
        dx = torch.empty_like(x, dtype=dx.dtype).copy_(dx)
    products = product.reshape(rstd.shape)
    dbeta = spatial_sum(kept).reshape(rstd.shape).sum(0)
    dtau = spatial_sum(g.masked_fill(~below, 0)).reshape(rstd.shape).sum(0)
    deps = (rstd * products * rstd).sum(0) * gamma * -0.5
    return cast(dx, x.dtype), products.sum(0), dbeta, dtau, deps


def dense(x: Tensor) -> Tensor:
    """x itself where its memory is one block in the order (N, C, ...) or (N, ..., C), else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()
