"""The network of the files in tests/versions. It never changes: another one gets another name."""

from __future__ import annotations

from torch import nn

from deploynorm.layers import TLU, CenConv2d, FRN2d, MABN2d

__all__ = ["net"]


def net(classes: int = 3) -> nn.Module:
    """Every layer that a file may hold, in as few numbers as can be."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 1, bias=False),
        FRN2d(16, learned_eps="channel"),
        CenConv2d(16, 16, 1, bias=False),
        MABN2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        FRN2d(16, tlu=False),
        TLU(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )
