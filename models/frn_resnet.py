"""ResNets with filter response normalization and thresholded linear units, in one file.

Post-activation blocks (He et al., arXiv:1512.03385) with every batch normalization replaced by FRN, and every ReLU by
a TLU, which is part of the FRN; the last FRN of a block adds the shortcut before its threshold.

    from deploynorm.models.frn_resnet import resnet20
    logits = resnet20(num_classes=10, in_channels=1)(torch.randn(8, 1, 28, 28))  # (8, 10)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from deploynorm.layers import FRN2d

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "resnet20", "resnet50"]

LearnedEps = Literal["layer", "channel"] | None
"""Whether FRN learns its epsilon; needed where feature maps shrink to 1x1 (arXiv:1911.09737, section 3.3)."""


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Convolution that keeps H and W at stride 1; no bias, because FRN adds its own."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


def shortcut(in_channels: int, out_channels: int, stride: int, learned_eps: LearnedEps) -> nn.Module:
    """Identity, or a strided 1x1 projection where the shape changes (option B of the ResNet paper)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    norm = FRN2d(out_channels, learned_eps=learned_eps, tlu=False)
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), norm)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in_channels, H, W) -> (N, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1, learned_eps: LearnedEps = None) -> None:
        super().__init__()
        frn = partial(FRN2d, learned_eps=learned_eps)
        self.conv1 = conv(in_channels, width, 3, stride)
        self.norm1 = frn(width)
        self.conv2 = conv(width, width, 3)
        self.norm2 = frn(width)
        self.shortcut = shortcut(in_channels, width, stride, learned_eps)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        z: Tensor = self.norm2(self.conv2(y), residual=self.shortcut(x))
        return z


class Bottleneck(nn.Module):
    """1x1, 3x3 (which strides) and 1x1 convolution: (N, in_channels, H, W) -> (N, 4 * width, H/stride, W/stride)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1, learned_eps: LearnedEps = None) -> None:
        super().__init__()
        frn = partial(FRN2d, learned_eps=learned_eps)
        out_channels = width * self.expansion
        self.conv1 = conv(in_channels, width, 1)
        self.norm1 = frn(width)
        self.conv2 = conv(width, width, 3, stride)
        self.norm2 = frn(width)
        self.conv3 = conv(width, out_channels, 1)
        self.norm3 = frn(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride, learned_eps)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(y))
        z: Tensor = self.norm3(self.conv3(y), residual=self.shortcut(x))
        return z


class ResNet(nn.Module):
    """Stem, stages that halve H and W from the second on, global average pool, linear classifier.

    Shape: (N, in_channels, H, W) -> (N, num_classes), for any H and W.

    Args:
        block: BasicBlock or Bottleneck.
        depths: Blocks of each stage.
        width: Channels of the stem and, before the block's expansion, of the first stage; doubled by each stage.
        stem: "small" is a 3x3 convolution (CIFAR), "large" a strided 7x7 one and a strided max-pool (ImageNet).
        num_classes: Length of the output.
        in_channels: Channels of the images.
        learned_eps: As in FRN2d, for every FRN of the net.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        width: int,
        stem: Literal["small", "large"],
        num_classes: int,
        in_channels: int,
        learned_eps: LearnedEps = None,
    ) -> None:
        super().__init__()
        large = stem == "large"
        self.stem = nn.Sequential(
            conv(in_channels, width, 7, stride=2) if large else conv(in_channels, width, 3),
            FRN2d(width, learned_eps=learned_eps),
            nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity(),
        )
        channels = width
        stages = []
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width << stage, stride, learned_eps))
                channels = (width << stage) * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def resnet20(num_classes: int = 10, in_channels: int = 3, learned_eps: LearnedEps = None) -> ResNet:
    """ResNet-20 for small images: 3 stages of 3 basic blocks, 16, 32 and 64 channels."""
    return ResNet(BasicBlock, (3, 3, 3), 16, "small", num_classes, in_channels, learned_eps)


def resnet50(num_classes: int = 1000, in_channels: int = 3, learned_eps: LearnedEps = None) -> ResNet:
    """ResNet-50 for ImageNet: 3, 4, 6 and 3 bottlenecks, 256 to 2048 channels, stride in the 3x3."""
    return ResNet(Bottleneck, (3, 4, 6, 3), 64, "large", num_classes, in_channels, learned_eps)
