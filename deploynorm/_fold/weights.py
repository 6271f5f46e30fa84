"""The weight algebra of folding, in float64 and on tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor

from deploynorm.layers import functional

__all__ = ["batch_norm_as_affine", "center", "scale_and_shift"]


def center(weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """The weight that a CenConv layer convolves with: W - mean(W) over each filter's fan-in.

    Args:
        weight: (out, in/groups, ...), or (in, out/groups, ...) when transposed.
        groups: Of the convolution.
        transposed: Whether it is a transposed convolution.

    Returns:
        float64 tensor of the same shape.
    """
    return functional.center_weight(weight.double(), groups=groups, transposed=transposed)


def batch_norm_as_affine(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Batch normalization in evaluation as y = scale * x + shift, per channel.

        scale = weight / sqrt(running_var + eps);  shift = bias - scale * running_mean

    MABN is the case running_mean = 0. All tensors are (C,).

    Returns:
        scale and shift, (C,) float64.
    """
    scale = torch.rsqrt(running_var.double() + eps)
    if weight is not None:
        scale = scale * weight.double()
    shift = -scale * running_mean.double()
    if bias is not None:
        shift = shift + bias.double()
    return scale, shift


def scale_and_shift(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that computes scale * layer(x) + shift.

        W' = scale * W per output channel;  b' = scale * b + shift

    Args:
        weight: (out, in/groups, ...) of a convolution, (out, in) of a linear layer, or (in, out/groups, ...).
        bias: (out,), or None for 0.
        scale: (out,).
        shift: (out,).
        groups: Of the convolution.
        transposed: Whether it is a transposed convolution, whose output channels stand on the second axis, a group
            after another along the first.

    Returns:
        Weight of the same shape and bias (out,), float64.
    """
    w, scale, shift = weight.double(), scale.double(), shift.double()
    if transposed:
        grouped = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
        per_filter = scale.reshape(groups, 1, -1, *[1] * (w.dim() - 2))
        scaled = (grouped * per_filter).reshape(w.shape)
    else:
        scaled = w * scale.reshape(-1, *[1] * (w.dim() - 1))
    return scaled, shift if bias is None else scale * bias.double() + shift
