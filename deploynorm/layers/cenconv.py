"""Convolutions with weight centralisation, the other half of MABN."""

from __future__ import annotations

from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deploynorm.errors import InputError
from deploynorm.layers.functional import center_weight


class _CenConv(nn.modules.conv._ConvNd):
    """What the centred convolutions share; mixed in before a torch convolution, whose arguments they take."""

    def reset_parameters(self) -> None:
        if self.in_channels // self.groups * prod(self.kernel_size) == 1:
            problem = "a fan-in of 1 leaves nothing after centring: the weight would be zero for ever"
            got = f"1 input channel per group and kernel_size={self.kernel_size}"
            raise InputError(type(self).__name__, problem, got=got, fix="use the plain convolution here")
        super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the centred weight."""
        return self._conv_forward(input, center_weight(self.weight), self.bias)


class CenConv1d(_CenConv, nn.Conv1d):
    """1-D convolution with weight centralisation, over a (N, C, L) input; see CenConv2d."""


class CenConv2d(_CenConv, nn.Conv2d):
    """2-D convolution with weight centralisation: y = conv(x, W - mean(W)) + b.

    The other half of MABN, which subtracts no mean: a centred filter does not see
    a constant that is added to its input. The mean is over the fan-in of each
    output filter, in_channels/groups * kh * kw values, in float32 (float64 for
    float64). Training and evaluation compute the same.

    The stored weight is not centred, so that an optimiser moves it freely. So it
    is not the weight of a plain Conv2d that computes the same: `deploynorm.fold`
    writes that one.

    Args:
        Those of torch.nn.Conv2d, with its defaults: in_channels, out_channels,
        kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
        padding_mode="zeros", device, dtype.

    Shape:
        x (N, in_channels, H, W) -> y (N, out_channels, H', W'), as torch.nn.Conv2d.

    Parameters, which start as those of torch.nn.Conv2d:
        weight (out_channels, in_channels/groups, kh, kw): Decays as usual.
        bias (out_channels,): Should not decay (see `parameter_groups`).

    Raises:
        InputError: The fan-in is 1 (depthwise 1x1), where centring makes the
            weight zero.

    Source: Yan et al., ICLR 2020, arXiv:2001.06838, section 4.3;
        megvii-model/MABN@995e8f5, MABN.py, CenConv2d.
    """


class CenConv3d(_CenConv, nn.Conv3d):
    """3-D convolution with weight centralisation, over a (N, C, D, H, W) input; see CenConv2d."""


class CenConvTranspose2d(_CenConv, nn.ConvTranspose2d):
    """Transposed 2-D convolution with weight centralisation; see CenConv2d.

    Arguments and shapes are those of torch.nn.ConvTranspose2d. The weight is
    (in_channels, out_channels/groups, kh, kw), and the mean of an output filter is
    over the inputs of its group and the kernel.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution with the centred weight; output_size as for torch.nn.ConvTranspose2d."""
        sizes: Any = (self.stride, self.padding, self.kernel_size, 2, self.dilation)  # of other types than declared
        output_padding = self._output_padding(input, output_size, *sizes)
        weight = center_weight(self.weight, groups=self.groups, transposed=True)
        settings: Any = (self.stride, self.padding, output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(input, weight, self.bias, *settings)
