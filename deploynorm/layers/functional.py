"""The layers as pure tensor functions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deploynorm.layers import _native, ops
from deploynorm.layers._composed import composed, for_exporters, recorded, transformed
from deploynorm.layers._precision import cast, compute_dtype, per_channel

__all__ = ["center_weight", "compute_dtype", "filter_response_norm", "normalize_by_second_moment", "tlu"]


def filter_response_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tau: Tensor | None,
    eps: float | Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """FRN with its threshold: max(weight * x / sqrt(mean(x**2) + eps) + bias [+ residual], tau).

    The mean is over all axes >= 2.

    Args:
        x: (N, C, ...) floating point, any strides. With (N, C) every value is its own mean.
        weight, bias: gamma and beta, (C,).
        tau: Threshold (C,), or None for no TLU.
        eps: Effective epsilon, greater than 0: a number, or a tensor () or (C,).
        residual: A tensor of x's shape and dtype, which is added before the threshold; None for none.

    Returns:
        Tensor of x's shape and dtype, computed in float32 (float64 for float64 x) and rounded once, so that float16
        inputs of any size are safe. At a tie y == tau the gradient goes to y and none to tau (eq. 4); with a residual
        backward saves the output instead of the sum, and it goes to tau, as in `tlu`.

    Source: Singh & Krishnan, arXiv:1911.09737, eq. 1 to 3. Their eq. 7 lacks a factor 1/N; autograd has it.
    """
    # PyTorch must see inside the operator to transform it, or to fuse it where we have no kernel.
    inside = transformed() or (torch.compiler.is_compiling() and not _native.available(x.device))
    if torch.compiler.is_exporting():
        operands = _operands(x, weight, bias, tau, eps)
        y: Tensor = (
            ops.filter_response_norm(x, *operands)
            if residual is None
            else ops.filter_response_norm_add(x, *operands, residual)
        )
        return y
    if recorded():
        return for_exporters(x, weight, bias, tau, eps, residual)
    if inside:
        return composed(x, weight, bias, tau, eps, residual)
    return ops.frn(x, *_operands(x, weight, bias, tau, eps), residual)


def tlu(x: Tensor, tau: Tensor) -> Tensor:
    """Thresholded linear unit: max(x, tau) of x (N, C, ...), tau (C,), in x's dtype; a NaN in x stays NaN.

    Backward saves the output, which the next layer saves anyway, and not x. So at a tie the gradient goes to tau, where
    eq. 4 of arXiv:1911.09737 has it go to x: that of a ReLU is zero there too.
    """
    bound = cast(per_channel(tau, x), x.dtype)
    if torch.compiler.is_exporting() or recorded():
        return torch.clamp(x, min=bound)
    if transformed():
        return torch.where(x <= bound, bound, x)
    y: Tensor = _TLU.apply(x, bound)  # type: ignore[no-untyped-call]
    return y


class _TLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor) -> Tensor:
        y = torch.clamp(x, min=bound)
        ctx.save_for_backward(y, bound)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        y, bound = ctx.saved_tensors
        dx = ops.above(dy, y, bound)
        return dx, dy.sum_to_size(bound.shape) - dx.sum_to_size(bound.shape)


def normalize_by_second_moment(
    x: Tensor, second_moment: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """MABN in evaluation: weight * x / sqrt(second_moment + eps) + bias, per channel of x (N, C, ...), in x's dtype.

    second_moment is E[x^2], (C,), float32 or float64; weight and bias are (C,), or None for 1 and 0. It is batch
    normalization with mean zero, and runs as such: one pass over x, and every exporter and runtime knows the operator.

    Source: Yan et al., ICLR 2020, arXiv:2001.06838, Algorithm 1 (inference).
    """
    dtype = compute_dtype(x.dtype)
    second_moment = cast(second_moment, dtype)
    mean = torch.zeros_like(second_moment)
    weight = None if weight is None else cast(weight, dtype)
    bias = None if bias is None else cast(bias, dtype)
    return F.batch_norm(x, mean, second_moment, weight, bias, training=False, momentum=0.0, eps=eps)


def center_weight(weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """Weight centralisation: W - mean(W), the mean taken over the fan-in of each output filter, in W's dtype.

    Args:
        weight: (out, in/groups, ...), or (in, out/groups, ...) when transposed. The mean is taken in float32 at least.
        groups: Needed for a transposed convolution alone, whose fan-in is split over the first axis.
        transposed: Whether the weight is that of a transposed convolution.

    Source: Yan et al., arXiv:2001.06838, section 4.3; megvii-model/MABN, MABN.py, CenConv2d.
    """
    w = cast(weight, compute_dtype(weight.dtype))
    if transposed:
        grouped = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
        fan_in = (1, *range(3, grouped.dim()))
        centred = (grouped - grouped.mean(fan_in, keepdim=True)).reshape(w.shape)
    else:
        centred = w - w.mean(tuple(range(1, w.dim())), keepdim=True)
    return cast(centred, weight.dtype)


def _operands(
    x: Tensor, weight: Tensor, bias: Tensor, tau: Tensor | None, eps: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gamma, beta, tau and eps of contract.py: tensors (C,) in x's compute type."""
    dtype = compute_dtype(x.dtype)
    channels = weight.shape[0]
    if tau is None:
        tau = torch.full((channels,), -math.inf, dtype=dtype, device=x.device)
    if not isinstance(eps, Tensor):
        eps = torch.full((channels,), eps, dtype=dtype, device=x.device)
    if eps.dim() == 0:
        eps = eps.expand(channels)
    return cast(weight, dtype), cast(bias, dtype), cast(tau, dtype), cast(eps, dtype)
