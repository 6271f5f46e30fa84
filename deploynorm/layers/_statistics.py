"""The second moments of a batch as MABN measures, averages and shares them between processes.

A row (C + 1) is one iteration: for each channel the sum over the samples of the mean over a sample's positions, and
last the number of samples. So rows of several processes or iterations add up to the row of all of them. A history
(K, C + 1) is K rows, newest first, and zeros where there is none yet.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from deploynorm.layers import functional
from deploynorm.layers._precision import cast, per_channel


def second_moment_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of x**2 for each channel of x (N, C, ...), in dtype and without a copy of x in that type."""
    slow = x.device.type == "cpu" and layout(x) != torch.contiguous_format and not torch.compiler.is_compiling()
    if x.dim() == 2 or slow:
        # The norm below is slow for channels-last memory on a CPU. In pieces that fit into the cache.
        channels = x.shape[1]
        positions = x.movedim(1, -1).reshape(-1, channels)
        pieces = torch.split(positions, max(_CACHED // channels, 1)) if slow else (positions,)
        return torch.stack([piece.to(dtype).square().sum(0) for piece in pieces]).sum(0)
    # The norm adds one square after the other, which in float32 loses digits where there are many: of a plane of
    # 4096x4096 with mean 100 it is off by 1e-2. So each row of a large plane is added up alone; `sum` adds in pairs.
    large = math.prod(x.shape[2:]) > _LONGEST_RUN
    axes = (-1,) if large else tuple(range(2, x.dim()))
    pieces = torch.split(x, _LONGEST_RUN, -1) if x.shape[-1] > _LONGEST_RUN else (x,)
    squares = [torch.linalg.vector_norm(piece, 2, axes, dtype=dtype).square() for piece in pieces]
    return torch.stack([each.sum((0, *range(2, each.dim()))) for each in squares]).sum(0)


_LONGEST_RUN = 16384
"""Numbers whose squares the norm adds up one after the other."""

_CACHED = 1 << 19
"""Numbers whose squares fit into a CPU's cache."""


def layout(x: Tensor) -> torch.memory_format:
    """The memory format of x: channels last or, for whatever is not that, contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def normalized(x: Tensor, second_moment: Tensor, scale: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """scale * x / sqrt(second_moment + eps) + bias, for each channel, in x's type."""
    if not torch.compiler.is_compiling():
        return functional.normalize_by_second_moment(x, second_moment, scale, bias, eps)
    # Not as batch normalization with mean 0: inductor replaces `x - 0` by x and gives x its mark, so that x is to be
    # recomputed under activation checkpointing, and compilation fails (torch 2.13).
    y = x * per_channel(scale * torch.rsqrt(second_moment + eps), x)
    return cast(y if bias is None else y + per_channel(bias, x), x.dtype)


def channel_sums(grad: Tensor, x: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of grad * x * inverse and of grad for each channel, in one pass over the two and in inverse's type.

    These are the gradients of batch normalization's weight and bias where the mean is 0 and 1/deviation is inverse.
    """
    if torch.compiler.is_compiling():  # which fuses this, and not a batch normalization with mean 0; see normalized
        positions = (0, *range(2, x.dim()))
        return (grad.to(inverse.dtype) * x).sum(positions) * inverse, grad.sum(positions, dtype=inverse.dtype)
    zero = torch.zeros_like(inverse)
    if x.numel() == 0:  # torch's kernel divides by zero then, which ends the process
        return zero, zero
    _, products, sums = torch.ops.aten.native_batch_norm_backward.default(
        grad, x, inverse, None, None, zero, inverse, True, 0.0, [False, True, True]
    )
    return products, sums


def row(sums: Tensor, x: Tensor) -> Tensor:
    """The row of an iteration with input x, whose values for each channel sum up to sums (C,)."""
    samples = x.shape[0] if x.numel() else 0
    return torch.cat([sums / max(math.prod(x.shape[2:]), 1), sums.new_full((1,), samples)])


def shifted(history: Tensor, row: Tensor) -> Tensor:
    """The history (K, C + 1) with a new row first, and without its oldest."""
    return torch.cat([row[None], history[:-1]])


def average(history: Tensor, window: Tensor) -> Tensor:
    """The average (C,) over the newest iterations of a history that fit whole into `window` samples.

    The current one is always among them, and each is weighted by its samples. With a constant batch size N that is
    the paper's simple moving average over window/N iterations. window is (); 0 for the current iteration alone.
    """
    # In integers: of floating point, CUDA has no cumulative sum that is the same in every run.
    recent = torch.cumsum(history[:, -1:], 0, dtype=torch.int64) <= window
    recent[:1].fill_(True)
    total = (history * recent).sum(0)
    return total[:-1] / total[-1]


def processes(group: dist.ProcessGroup | None) -> int:
    """The number of processes in a group, None being the default one; 1 where there is none."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def over_all_ranks(row: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The row of one iteration over every process of the group.

    A process without samples takes part with zeros: without it the others would wait for ever.
    """
    if processes(group) > 1:
        row = row.clone()
        dist.all_reduce(row, group=group)
    return row
