"""The learning rate of each step, and the moving average of weights and statistics."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["averaged", "lr_factor"]

Tensors: TypeAlias = "list[Tensor] | tuple[Tensor, ...]"


def lr_factor(step: int, warmup: int, total: int) -> float:
    """Learning rate of a step as a fraction of its peak: a cosine from 0 to 1 over `warmup` steps, then one to 0."""
    if step < warmup:
        return 0.5 - 0.5 * math.cos(math.pi * (step + 1) / (warmup + 1))
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of the network over its steps: of parameters and running statistics alike.

    The statistics are averaged too because those of the newest weights do not fit the average of the weights. With
    the newest, BN was right on 10 to 65 % of the digits in epochs in which it now is on 66 to 97 % (decay 0.99).
    Counters are copied.
    """
    average_floats = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def average(averages: Tensors, values: Tensors, count: Tensor | int) -> None:
        if averages[0].is_floating_point():
            average_floats(averages, values, count)
        else:
            torch._foreach_copy_(averages, values)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
