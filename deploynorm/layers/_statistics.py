"""How MABN measures a batch, remembers it, and shares it between processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["held", "moving_average", "nearest", "over_all_ranks", "recomputing", "remember", "second_moment_sum"]


def second_moment_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of x**2 for each channel of x (N, C, ...), in dtype and without a copy of x in that type."""
    spatial = tuple(range(2, x.dim()))
    # Plane by plane and then over the batch: torch sums one long run of float32 squares to four digits only.
    norms = torch.linalg.vector_norm(x, 2, spatial, dtype=dtype) if spatial else x.to(dtype)
    return norms.square().sum(0)


def moving_average(values: Tensor, samples: Tensor, value: Tensor, count: Tensor, window: int, keep: Tensor) -> Tensor:
    """Appends one iteration's statistic to its history and averages the newest iterations.

    The average runs over the newest iterations that fit whole into `window` samples, the current one always
    among them, each weighted by its samples. With a constant batch size N that is the paper's simple moving
    average over window/N iterations.

    Args:
        values: (K, C), oldest first; changed in place.
        samples: (K,), the samples behind each row, 0 for a row not yet used; changed in place.
        value: (C,), the statistic of the current iteration.
        count: (), its samples.
        window: Samples to average over.
        keep: (), bool: False leaves the history as it was.
    """
    new_values = torch.cat([values[1:], value[None]])
    new_samples = torch.cat([samples[1:], count[None]])
    values.copy_(torch.where(keep, new_values, values))
    samples.copy_(torch.where(keep, new_samples, samples))
    newer = new_samples.flip(0).cumsum(0).flip(0)
    weights = torch.where(newer <= window, new_samples, 0.0)
    weights[-1] = count
    # A row that weighs nothing may still hold what 0 * inf would spread, so it is masked and not only scaled.
    total = (torch.where(weights[:, None] > 0, new_values, 0.0) * weights[:, None]).sum(0)
    return total / weights.sum().clamp(min=1)


def over_all_ranks(value: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The statistic and samples of one iteration over every process of the default group.

    A process without samples takes part with a count of 0: the others would wait for it for ever.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value, count
    packed = torch.cat([value * count, count[None]])
    dist.all_reduce(packed)
    return packed[:-1] / packed[-1].clamp(min=1), packed[-1]


def held(value: Tensor) -> Tensor:
    """value, as something that a compiled step keeps for its backward pass and never computes a second time.

    torch.compile may save a buffer in the place of what was computed from it, and compute that again in the
    backward pass, by when the step has changed the buffer (seen in torch 2.13). It does not do so past a
    reduction to less than a quarter, so there is one here.
    """
    if not torch.compiler.is_compiling():
        return value
    return value.expand(5, *value.shape).amax(0)


def recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass: activation checkpointing runs it a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def remember(steps: Tensor, *rows: Tensor) -> None:
    """Appends (rows, C) to steps (K, rows, C), oldest first, in place."""
    steps.copy_(torch.cat([steps[1:], torch.stack([row.expand(steps.shape[2]) for row in rows])[None]]))


def nearest(steps: Tensor, key: Tensor) -> Tensor:
    """The step (rows, C) whose first row is nearest to key (C,): the same one, if the same numbers made it.

    The nearest and not the equal one, because an index is found without making the host wait for the device.
    """
    distance = (steps[:, 0] - key).abs().nan_to_num(torch.inf).sum(1)
    return steps[distance.argmin()]
