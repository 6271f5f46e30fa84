"""ResNets with moving average batch normalization, and with BN and GN for comparison, in one file.

Post-activation blocks (He et al., arXiv:1512.03385). With norm="mabn" every convolution is a CenConv2d and every
normalization a MABN2d, since MABN requires centred convolutions. Nothing else differs from norm="bn", so that the two
networks have the same graph after folding.

    from deploynorm.models.mabn_resnet import resnet20
    logits = resnet20(num_classes=10, in_channels=1, norm="mabn")(torch.randn(8, 1, 28, 28))  # (8, 10)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from deploynorm.errors import InputError
from deploynorm.layers import CenConv2d, MABN2d

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "resnet20", "resnet50"]

Norm = Literal["mabn", "bn", "gn"]


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int, norm: Norm) -> nn.Conv2d:
    """Convolution that keeps H and W at stride 1; no bias, because the normalization adds its own."""
    layer = CenConv2d if norm == "mabn" else nn.Conv2d
    return layer(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


def normalization(channels: int, norm: Norm) -> nn.Module:
    """The normalization layer that norm names; GN has 32 groups, or fewer so that each has two channels."""
    if norm == "mabn":
        return MABN2d(channels)
    if norm == "bn":
        return nn.BatchNorm2d(channels)
    if norm == "gn":
        return nn.GroupNorm(min(32, channels // 2), channels)
    raise InputError("mabn_resnet", "unknown norm", got=repr(norm), expected="'mabn', 'bn' or 'gn'")


def shortcut(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module:
    """Identity, or a strided 1x1 projection where the shape changes (option B of the ResNet paper)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(conv(in_channels, out_channels, 1, stride, norm), normalization(out_channels, norm))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in_channels, H, W) -> (N, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1, norm: Norm = "mabn") -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stride, norm)
        self.norm1 = normalization(width, norm)
        self.conv2 = conv(width, width, 3, 1, norm)
        self.norm2 = normalization(width, norm)
        self.shortcut = shortcut(in_channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which strides) and 1x1 convolution: (N, in_channels, H, W) -> (N, 4 * width, H/stride, W/stride)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1, norm: Norm = "mabn") -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = conv(in_channels, width, 1, 1, norm)
        self.norm1 = normalization(width, norm)
        self.conv2 = conv(width, width, 3, stride, norm)
        self.norm2 = normalization(width, norm)
        self.conv3 = conv(width, out_channels, 1, 1, norm)
        self.norm3 = normalization(out_channels, norm)
        self.shortcut = shortcut(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu(y + self.shortcut(x))


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
        norm: "mabn" with centred convolutions; "bn" or "gn" with plain ones.

    Raises:
        InputError: norm is none of the three.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        width: int,
        stem: Literal["small", "large"],
        num_classes: int,
        in_channels: int,
        norm: Norm = "mabn",
    ) -> None:
        super().__init__()
        large = stem == "large"
        self.stem = nn.Sequential(
            conv(in_channels, width, 7, 2, norm) if large else conv(in_channels, width, 3, 1, norm),
            normalization(width, norm),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity(),
        )
        channels = width
        stages = []
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width << stage, stride, norm))
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


def resnet20(num_classes: int = 10, in_channels: int = 3, norm: Norm = "mabn") -> ResNet:
    """ResNet-20 for small images: 3 stages of 3 basic blocks, 16, 32 and 64 channels."""
    return ResNet(BasicBlock, (3, 3, 3), 16, "small", num_classes, in_channels, norm)


def resnet50(num_classes: int = 1000, in_channels: int = 3, norm: Norm = "mabn") -> ResNet:
    """ResNet-50 for ImageNet: 3, 4, 6 and 3 bottlenecks, 256 to 2048 channels, stride in the 3x3."""
    return ResNet(Bottleneck, (3, 4, 6, 3), 64, "large", num_classes, in_channels, norm)
