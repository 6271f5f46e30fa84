"""The weight algebra of folding, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploynorm._fold.producers import Foldable
from deploynorm.layers.functional import center_weight


def centred_weight(layer: nn.Module) -> Tensor:
    """The weight that a CenConv layer convolves with: W - mean(W) over each filter's fan-in."""
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return center_weight(layer.weight.double(), groups=layer.groups, transposed=layer.transposed)


def batch_norm_as_affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Batch normalization in evaluation as y = scale * x + shift; both are (C,).

    scale = weight / sqrt(running_var + eps);  shift = bias - scale * running_mean
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight: Tensor | None = norm.weight
    bias: Tensor | None = norm.bias
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if weight is not None:
        scale = scale * weight.double()
    shift = -scale * norm.running_mean.double()
    return scale, shift if bias is None else shift + bias.double()


def scale_and_shift(
    layer: Foldable, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias of scale * layer(x) + shift, for a layer that has this weight and bias.

    W' = scale * W per output channel;  b' = scale * b + shift
    """
    if isinstance(layer, nn.Linear) or not layer.transposed:  # (out, ...)
        per_filter = scale.reshape(-1, *[1] * (weight.dim() - 1))
    else:  # (in, out / groups, ...), the inputs of one group after those of another
        per_filter = scale.reshape(layer.groups, -1).repeat_interleave(weight.shape[0] // layer.groups, 0)
        per_filter = per_filter.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    return per_filter * weight.double(), shift if bias is None else scale * bias.double() + shift
