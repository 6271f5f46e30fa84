"""A training step of MABN: what it measures of a batch, and what it commits of that to the layer's statistics.

The forward half is `step`: `measure` changes nothing, and `commit` writes what was measured. Between the two stands
which run of the forward pass this is, a first one or a second one for activation checkpointing (_recomputation.py).
The backward half is in `MABNFunction` and `average_psi`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deploynorm.errors import InputError
from deploynorm.layers import _statistics as statistics
from deploynorm.layers._precision import compute_dtype, per_channel
from deploynorm.layers._recomputation import Used, note, recalled, recomputing, settled

if TYPE_CHECKING:
    from deploynorm.layers.mabn import _MABN

FIX = "put the layer in evaluation mode or freeze it (freeze_mabn): then it is an affine map with all derivatives"


class Batch(NamedTuple):
    """What a forward pass finds of its batch, over all processes."""

    history: Tensor  # recent_x2 with the batch's row as its newest
    finite: Tensor  # (), bool: every second moment is finite
    used: Used  # what the batch is to be normalised by


def step(layer: _MABN, x: Tensor, may_run_again: bool) -> Used:
    """What x is normalised by; commits x to the layer's statistics, unless a first run of this pass has done so."""
    R = layer.running_var
    sums = statistics.second_moment_sum(x, torch.promote_types(x.dtype, R.dtype)).to(R.dtype)
    row = statistics.over_all_ranks(statistics.row(sums, x), layer.process_group)
    if recomputing():
        return recalled(row, layer.recent_passes, layer.passes)
    batch, first_run = measure(layer, row), None
    used = batch.used
    if torch.compiler.is_compiling():
        used, first_run = settled(row, used, layer.recent_passes, layer.passes)
    if may_run_again:
        note(row, used, layer.recent_passes, layer.passes, first_run)
    commit(layer, batch, first_run)
    return used


def measure(layer: _MABN, row: Tensor) -> Batch:
    """What follows from a batch's row and the statistics before it. Changes no statistic."""
    R = layer.running_var
    largest = row.amax()  # no value is negative, and the number of samples is among them
    finite = largest < torch.inf
    kept = finite & (largest > 0)
    iteration = layer.num_batches_tracked + kept
    window = (iteration > layer.warmup) * layer.moving_batch_size
    history = statistics.shifted(layer.recent_x2, row)
    # A batch that is left out is normalised by what evaluation uses.
    second_moment = torch.where(kept, statistics.average(history, window), R)
    r = ((second_moment + layer.eps) / (R + layer.eps)).sqrt_().clamp_(1 / layer.max_renorm, layer.max_renorm)
    r.masked_fill_(iteration <= max(layer.warmup, layer.renorm_start), 1)
    return Batch(history, finite, Used(second_moment, r, window, kept))


def commit(layer: _MABN, batch: Batch, first_run: Tensor | None) -> None:
    """Writes a measured batch to the layer's running average, history and counters, in place.

    first_run is (), bool, in compiled code, where False changes nothing; None is True.
    """
    R, tracked = layer.running_var, layer.num_batches_tracked
    kept, finite, second_moment = batch.used.kept, batch.finite, batch.used.second_moment
    if first_run is not None:
        kept, finite = kept & first_run, finite | ~first_run
        second_moment = torch.where(first_run, second_moment, R)
    # The first batch sets the average: started from 1 it would be far off for hundreds of steps.
    torch.where(tracked == 0, second_moment, R.lerp(second_moment, layer.momentum), out=R)
    torch.where(kept, batch.history, layer.recent_x2, out=layer.recent_x2)
    tracked.add_(kept)
    layer.skipped_batches.add_(~finite)


class MABNFunction(torch.autograd.Function):
    """y = weight * r * z + bias with z = x / chi, and the backward pass of Algorithm 1.

    The gradient of x is not that of the forward expression: the batch statistic psi = E[g * z] in it is replaced
    by its moving average, which is the point of the method (arXiv:2001.06838, eq. 16 and Algorithm 1).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        second_moment: Tensor,
        r: Tensor,
        window: Tensor,
        kept: Tensor,
        recent_gz: Tensor,
        layer: _MABN,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, second_moment, r, window, kept)
        # Not saved for backward, because backward changes it, also for a second use of the layer. Nor looked up in the
        # layer there: torch.func.functional_call has put the layer's own tensor back by then.
        ctx.recent_gz = recent_gz
        ctx.layer = layer
        ctx.bias_dtype = None if bias is None else bias.dtype
        scale = r if weight is None else weight.to(r.dtype) * r
        return statistics.normalized(x, second_moment, scale, bias, layer.eps)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            problem = "the gradient of a training step has no derivative"
            raise InputError(type(ctx.layer).__name__, problem, got="create_graph=True", fix=FIX)
        x, weight, second_moment, r, window, kept = ctx.saved_tensors
        layer: _MABN = ctx.layer
        dtype = compute_dtype(x.dtype)
        # One layout for both: sums over two layouts are slow, and the gradient goes on in the one that x came in.
        grad_y = grad_y.contiguous(memory_format=statistics.layout(x))
        inverse = torch.rsqrt(second_moment + layer.eps).to(dtype)
        z_grad_y, grad_bias = statistics.channel_sums(grad_y, x, inverse)
        r = r.to(dtype)
        scale = r if weight is None else weight.to(dtype) * r

        psi = average_psi(layer, scale * z_grad_y, x, ctx.recent_gz, window, kept).to(dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y * per_channel(scale * inverse, x)
            grad_x = grad_x.addcmul_(x, per_channel(psi * inverse.square(), x), value=-1).to(x.dtype)
        grad_weight = None if weight is None else (z_grad_y * r).to(weight.dtype)
        return grad_x, grad_weight, grad_bias.to(ctx.bias_dtype) if ctx.bias_dtype else None, *(None,) * 6


def average_psi(layer: _MABN, z_grad_z: Tensor, x: Tensor, history: Tensor, window: Tensor, kept: Tensor) -> Tensor:
    """The moving average of psi = E[g * z], and psi itself in the warm-up; adds this batch's to the history, in place.

    The history is kept in units of the loss over all processes, whose gradient is the mean of theirs, and before
    the loss scale: so it outlasts a change of either. The average is returned in the units of z_grad_z.
    """
    units = _units(layer, x.device)
    row = statistics.row((z_grad_z if units is None else z_grad_z / units).to(history.dtype), x)
    row = statistics.over_all_ranks(row, layer.process_group)
    # Where the forward pass left a batch out, its gradient is left out as well.
    kept = kept & (torch.linalg.vector_norm(row, torch.inf) < torch.inf)
    newest = statistics.shifted(history, row)
    torch.where(kept, newest, history, out=history)
    psi = torch.where(kept, statistics.average(newest, window), 0.0)
    return psi if units is None else psi * units


def _units(layer: _MABN, device: torch.device) -> int | Tensor | None:
    """The gradient of this process's scaled loss, in units of that of the loss over all processes; None for 1."""
    processes = statistics.processes(layer.process_group)
    if layer._loss_scale is not None:
        return layer._loss_scale.to(device, non_blocking=True) * processes
    return processes if processes > 1 else None
