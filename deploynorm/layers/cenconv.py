"""Convolutions with weight centralisation, the other half of MABN."""

from __future__ import annotations

from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deploynorm.errors import InputError
from deploynorm.layers.functional import center_weight

__all__ = ["CenConv1d", "CenConv2d", "CenConv3d", "CenConvTranspose2d"]


def _refuse_fan_in_one(layer: nn.Module, channels_per_group: int, kernel_size: tuple[int, ...]) -> None:
    if channels_per_group * prod(kernel_size) == 1:
        raise InputError(
            type(layer).__name__,
            "a fan-in of 1 leaves nothing after centring: the weight would be zero for ever",
            got=f"1 input channel per group and kernel_size={kernel_size}",
            fix="use the plain convolution here",
        )


class _CenConv(nn.modules.conv._ConvNd):
    """Mixed in before a torch convolution: the same layer, computed with its weight centred."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse_fan_in_one(self, self.in_channels // self.groups, self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, center_weight(self.weight), self.bias)


class CenConv1d(_CenConv, nn.Conv1d):
    """1-D convolution with weight centralisation; arguments and shapes of torch.nn.Conv1d. See CenConv2d."""


class CenConv2d(_CenConv, nn.Conv2d):
    """2-D convolution with weight centralisation: y = conv(x, W - mean(W)) + b.

    The mean is over the fan-in of each output filter, in float32. The stored weight is not centred, so that an
    optimiser moves it freely; `deploynorm.fold` writes the centred weight into a plain Conv2d.
    Arguments and shapes are those of torch.nn.Conv2d.

    Raises:
        InputError: The fan-in is 1 (depthwise 1x1), where centring makes the weight zero.

    Source: Yan et al., ICLR 2020, arXiv:2001.06838, section 4.3.
    """


class CenConv3d(_CenConv, nn.Conv3d):
    """3-D convolution with weight centralisation; arguments and shapes of torch.nn.Conv3d. See CenConv2d."""


class CenConvTranspose2d(nn.ConvTranspose2d):
    """Transposed 2-D convolution with weight centralisation; see CenConv2d.

    The weight is (in, out/groups, kh, kw); the mean of an output filter runs over the inputs of its group and
    the kernel. Arguments and shapes are those of torch.nn.ConvTranspose2d.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse_fan_in_one(self, self.in_channels // self.groups, self.kernel_size)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return F.conv_transpose2d(
            input,
            center_weight(self.weight, groups=self.groups, transposed=True),
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.groups,
            self.dilation,
        )
