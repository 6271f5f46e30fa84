"""Filter response normalization in plain PyTorch: as a composition, and its two passes by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["backward", "cast", "composed", "compute_dtype", "dense", "forward", "per_channel"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of `dtype` tensors are taken: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype) that leaves no trace in an exported graph where there is nothing to convert."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """Views a (C,) or () parameter so that it broadcasts over x (N, C, ...), in x's compute type."""
    return cast(parameter, compute_dtype(x.dtype)).reshape((1, -1) + (1,) * (x.dim() - 2))


def composed(x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor | None, eps: float | Tensor) -> Tensor:
    """Forward pass whose derivatives, of any order and kind, are PyTorch's own. It keeps three tensors of x's size."""
    v = cast(x, compute_dtype(x.dtype))
    epsilon = per_channel(eps, x) if isinstance(eps, Tensor) else eps
    # gamma times the inverse root first: one multiplication fewer for every element of x.
    y = v * (per_channel(gamma, x) * torch.rsqrt(_mean_square(v) + epsilon)) + per_channel(beta, x)
    if tau is not None:
        # clamp, not maximum: maximum splits the gradient at a tie in two, where eq. 4 gives all of it to y.
        y = torch.clamp(y, min=per_channel(tau, x))
    return cast(y, x.dtype)


def forward(x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """y, and 1 / sqrt(mean(x**2) + eps) of each plane (N, C). All parameters are (C,), in x's compute type."""
    x = dense(x)
    v = cast(x, gamma.dtype)
    rstd = torch.rsqrt(_mean_square(v) + per_channel(eps, x))
    y = torch.addcmul(per_channel(beta, x), v, per_channel(gamma, x) * rstd)
    return cast(y.clamp_(min=per_channel(tau, x)), x.dtype), rstd.reshape(x.shape[:2])


def backward(
    dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gamma, beta, tau and eps; the formulas stand in plugins/kernels/frn.h."""
    x = dense(x)
    v, g = cast(x, gamma.dtype), cast(dy, gamma.dtype)
    spatial = tuple(range(2, x.dim()))
    root = rstd.reshape(*rstd.shape, *(1 for _ in spatial))
    scale = per_channel(gamma, x) * root
    below = torch.addcmul(per_channel(beta, x), v, scale) < per_channel(tau, x)
    kept = g.masked_fill(below, 0)
    product = root * _sum(kept * v, spatial)
    # root * x is of the size of 1; the powers of the root alone may be out of range.
    pull = scale * (root * (product / _positions(x)))
    dx = (kept * scale).addcmul_(v, pull, value=-1)
    if kept.stride() != x.stride():  # dy had another layout, and it leads
        dx = torch.empty_like(x, dtype=dx.dtype).copy_(dx)
    planes = product.reshape(rstd.shape)
    dbeta = _sum(kept, spatial).reshape(rstd.shape).sum(0)
    dtau = _sum(g.masked_fill(~below, 0), spatial).reshape(rstd.shape).sum(0)
    deps = (rstd * planes * rstd).sum(0) * gamma * -0.5
    return cast(dx, x.dtype), planes.sum(0), dbeta, dtau, deps


def dense(x: Tensor) -> Tensor:
    """x itself where its memory is one block in the order (N, C, ...) or (N, ..., C), else a copy that is."""
    return x if x.is_contiguous() or channels_last(x) else x.contiguous()


def channels_last(x: Tensor) -> bool:
    """Whether the memory of x (N, C, ...) is one block in the order (N, ..., C)."""
    return x.movedim(1, -1).is_contiguous()


def _positions(x: Tensor) -> int:
    """Values behind one mean; 1 and not 0 for maps of no size, where 0/0 would reach the parameters' gradients."""
    return max(math.prod(x.shape[2:]), 1)


def _sum(values: Tensor, spatial: tuple[int, ...]) -> Tensor:
    return values.sum(spatial, keepdim=True) if spatial else values  # sum(()) would be over every axis


def _mean_square(v: Tensor) -> Tensor:
    return _sum(v.square(), tuple(range(2, v.dim()))) / _positions(v)
