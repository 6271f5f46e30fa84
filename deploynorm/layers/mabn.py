"""Moving average batch normalization."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deploynorm.errors import InputError
from deploynorm.layers import _mabn_checkpoints as checkpoints
from deploynorm.layers import _statistics as statistics
from deploynorm.layers import functional
from deploynorm.layers._checks import check_input, check_positive
from deploynorm.layers._plain import compute_dtype, per_channel
from deploynorm.layers._precision import FullPrecisionBuffers
from deploynorm.layers._recomputation import Used, may_run_again, note, recalled, recomputing, settled

__all__ = ["MABN1d", "MABN2d", "MABN3d"]

_REMEMBERED_PASSES = 16
"""Forward passes of one layer that activation checkpointing can come back to: uses before the backward pass."""

_FIXED = "put the layer in evaluation mode or freeze it (freeze_mabn): then it is an affine map with all derivatives"


class _MABNFunction(torch.autograd.Function):
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
        # Not saved for backward, for it changes there, also for a second use of the layer. Nor looked up in the layer
        # then: torch.func.functional_call has put the layer's own tensor back.
        ctx.recent_gz = recent_gz
        ctx.layer = layer
        ctx.bias_dtype = None if bias is None else bias.dtype
        scale = r if weight is None else weight.to(r.dtype) * r
        return statistics.normalized(x, second_moment, scale, bias, layer.eps)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            problem = "the gradient of a training step has no derivative"
            raise InputError(type(ctx.layer).__name__, problem, got="create_graph=True", fix=_FIXED)
        x, weight, second_moment, r, window, kept = ctx.saved_tensors
        layer: _MABN = ctx.layer
        dtype = compute_dtype(x.dtype)
        # One layout for both: sums over two layouts are slow, and the gradient goes on in the one that x came in.
        grad_y = grad_y.contiguous(memory_format=statistics.layout(x))
        inverse = torch.rsqrt(second_moment + layer.eps).to(dtype)
        z_grad_y, grad_bias = statistics.channel_sums(grad_y, x, inverse)
        r = r.to(dtype)
        scale = r if weight is None else weight.to(dtype) * r

        psi = layer._average_psi(scale * z_grad_y, x, ctx.recent_gz, window, kept).to(dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y * per_channel(scale * inverse, x)
            grad_x = grad_x.addcmul_(x, per_channel(psi * inverse.square(), x), value=-1).to(x.dtype)
        grad_weight = None if weight is None else (z_grad_y * r).to(weight.dtype)
        return grad_x, grad_weight, grad_bias.to(ctx.bias_dtype) if ctx.bias_dtype else None, *(None,) * 6


def _unsaved(running_var: Tensor) -> dict[str, Tensor]:
    """The buffers of a layer that are not in its state_dict: what tells of batches, and what recognises them again."""
    channels = len(running_var)
    count = torch.zeros((), dtype=torch.int64, device=running_var.device)
    ring = running_var.new_zeros(_REMEMBERED_PASSES, 3 * channels + 3)
    return {"skipped_batches": count, "recent_passes": ring, "passes": count.clone()}


class _MABN(FullPrecisionBuffers):
    """What MABN1d, MABN2d and MABN3d share; they differ in the rank of their input alone."""

    _ranks: ClassVar[tuple[int, ...]]
    _version = 2

    running_var: Tensor
    num_batches_tracked: Tensor
    recent_x2: Tensor
    recent_gz: Tensor
    skipped_batches: Tensor
    recent_passes: Tensor
    passes: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.02,
        *,
        moving_batch_size: int = 32,
        warmup: int = 100,
        renorm_start: int = 1000,
        max_renorm: float = 5.0,
        affine: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_positive(name, "num_features", num_features)
        check_positive(name, "eps", eps)
        check_positive(name, "moving_batch_size", moving_batch_size)
        if not 0 <= momentum <= 1:
            raise InputError(name, "momentum is out of range", got=momentum, expected="0 to 1, in torch's sense")
        if not max_renorm >= 1:
            raise InputError(name, "max_renorm is out of range", got=max_renorm, expected="at least 1")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.moving_batch_size = moving_batch_size
        self.warmup = warmup
        self.renorm_start = renorm_start
        self.max_renorm = max_renorm
        self.affine = affine
        self.process_group = process_group
        self.frozen = False
        self._fixed_parameters: tuple[str, ...] = ()
        self._loss_scale: Tensor | None = None
        if affine:
            self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        full = compute_dtype(dtype or torch.get_default_dtype())

        def buffer(name: str, *shape: int, dtype: torch.dtype = full) -> None:
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype))

        buffer("running_var", num_features)
        buffer("num_batches_tracked", dtype=torch.int64)
        buffer("recent_x2", moving_batch_size, num_features + 1)
        buffer("recent_gz", moving_batch_size, num_features + 1)
        for unsaved, value in _unsaved(self.running_var).items():
            self.register_buffer(unsaved, value, persistent=False)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forgets every statistic: the next training step is the first, warm-up included."""
        self.running_var.fill_(1)
        for history in (self.recent_x2, self.recent_gz, self.recent_passes):
            history.zero_()
        for count in (self.num_batches_tracked, self.skipped_batches, self.passes):
            count.zero_()

    def reset_parameters(self) -> None:
        """Sets weight 1, bias 0 and forgets the statistics."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_input(type(self).__name__, x, self.num_features, self._ranks)
        if not self.training or self.frozen:
            return functional.normalize_by_second_moment(x, self.running_var, self.weight, self.bias, self.eps)
        if functional.transformed():
            problem = "it cannot train under a transform of torch.func or in forward mode"
            raise InputError(type(self).__name__, problem, fix=_FIXED)
        if x.numel() == 0:
            warnings.warn(
                f"{type(self).__name__}: an empty batch of shape {tuple(x.shape)} added nothing to the statistics",
                stacklevel=2,
            )
        again = may_run_again()
        with torch.no_grad():
            used = self._step(x, again)
        y: Tensor = _MABNFunction.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, *used, self.recent_gz, self
        )
        return y

    def _step(self, x: Tensor, again: bool) -> Used:
        """Measures the batch, and moves the statistics on unless it was measured before; again: it may come again."""
        R, tracked = self.running_var, self.num_batches_tracked
        row = statistics.row(statistics.second_moment_sum(x, torch.promote_types(x.dtype, R.dtype)).to(R.dtype), x)
        row = statistics.over_all_ranks(row, self.process_group)
        if recomputing():
            return recalled(row, self.recent_passes, self.passes)

        largest = row.amax()  # no value is negative, and the number of samples is among them
        finite = largest < torch.inf
        kept = finite & (largest > 0)
        iteration = tracked + kept
        window = (iteration > self.warmup) * self.moving_batch_size
        history = statistics.shifted(self.recent_x2, row)
        # A batch that is left out is normalised by what evaluation uses.
        second_moment = torch.where(kept, statistics.average(history, window), R)
        r = ((second_moment + self.eps) / (R + self.eps)).sqrt_().clamp_(1 / self.max_renorm, self.max_renorm)
        r.masked_fill_(iteration <= max(self.warmup, self.renorm_start), 1)
        used = Used(second_moment, r, window, kept)

        first_run = None
        if torch.compiler.is_compiling():
            used, first_run = settled(row, used, self.recent_passes, self.passes)
            kept, finite = kept & first_run, finite | ~first_run
            second_moment = torch.where(first_run, second_moment, R)
        if again:
            note(row, used, self.recent_passes, self.passes, first_run)

        # The first batch sets the average: started from 1 it would be far off for hundreds of steps.
        torch.where(tracked == 0, second_moment, R.lerp(second_moment, self.momentum), out=R)
        torch.where(kept, history, self.recent_x2, out=self.recent_x2)
        tracked.add_(kept)
        self.skipped_batches.add_(~finite)
        return used

    def _average_psi(self, z_grad_z: Tensor, x: Tensor, history: Tensor, window: Tensor, kept: Tensor) -> Tensor:
        """The moving average of psi = E[g * z]; psi itself in the warm-up.

        The history is kept in units of the loss over all processes, whose gradient is the mean of theirs, and before
        the loss scale: so it outlasts a change of either. The average is returned in the units of z_grad_z.
        """
        units = self._units(x.device)
        row = statistics.row((z_grad_z if units is None else z_grad_z / units).to(history.dtype), x)
        row = statistics.over_all_ranks(row, self.process_group)
        # Of a batch that the forward pass left out, the gradient is left out as well.
        kept = kept & (torch.linalg.vector_norm(row, torch.inf) < torch.inf)
        newest = statistics.shifted(history, row)
        torch.where(kept, newest, history, out=history)
        psi = torch.where(kept, statistics.average(newest, window), 0.0)
        return psi if units is None else psi * units

    def _units(self, device: torch.device) -> int | Tensor | None:
        """The gradient of this process's scaled loss, in units of that of the loss over all processes; None for 1."""
        processes = statistics.processes(self.process_group)
        if self._loss_scale is not None:
            return self._loss_scale.to(device, non_blocking=True) * processes
        return processes if processes > 1 else None

    def train(self, mode: bool = True) -> _MABN:
        # Told here and not in the step: reading the counter makes the host wait for the device.
        if not mode and self.training and not self.skipped_batches.is_meta:
            skipped = int(self.skipped_batches)
            if skipped:
                warnings.warn(
                    f"{type(self).__name__}: {skipped} batches with values that were not finite left the "
                    "statistics alone; lower the learning rate or the loss scale",
                    stacklevel=2,
                )
                self.skipped_batches.zero_()
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A process group and a scaler's tensor belong to this process.
        return {**self.__dict__, "process_group": None, "_loss_scale": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        upgraded = checkpoints.upgraded_pickle(state, _unsaved(state["_buffers"]["running_var"]))
        super().__setstate__(upgraded)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> _MABN:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.process_group, twin._loss_scale = self.process_group, self._loss_scale
        return twin

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        checkpoints.fit(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.passes.is_meta and not self.running_var.is_meta:  # loaded with assign=True
            self._buffers.update(_unsaved(self.running_var))

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"moving_batch_size={self.moving_batch_size}, warmup={self.warmup}, affine={self.affine}"
            + (", frozen=True" if self.frozen else "")
        )


class MABN1d(_MABN):
    """Moving average batch normalization over a (N, C) or (N, C, L) input.

    Normalises each channel by the root of its second moment, with no mean (weight centralisation, see CenConv2d,
    stands in for that), and replaces the two batch statistics by moving averages:

        chi2_B = E[x^2];  chi2 = mean of chi2_B over the window: the newest iterations, weighted by their samples,
        that fit whole into moving_batch_size samples, the current one always among them; chi2_B itself in the warm-up
        z = x / sqrt(chi2 + eps);  r = clip(sqrt(chi2 + eps) / sqrt(R + eps), 1/max_renorm, max_renorm)
        y = weight * r * z + bias;  R <- (1 - momentum) R + momentum chi2
        backward: g = dy * weight * r;  psi_B = E[g * z];  dx = (g - z * psi) / sqrt(chi2 + eps)

    psi is the mean of psi_B over the same kind of window, and r is a constant: 1 until renorm_start. In evaluation
    y = weight * x / sqrt(R + eps) + bias, which `deploynorm.fold` writes into the convolution before.

    R is the buffer `running_var`, named as in the authors' code; it is a second moment and not a variance.
    Statistics are float32 (float64 for float64) whatever the layer is cast to. A batch that is empty or not finite
    leaves them alone; the layer warns of it, for values that are not finite when it is next put in evaluation mode,
    because reading the counter earlier would make the host wait for the device.

    - torch.distributed: statistics, backward ones too, are those of all processes of the group. So each has to make the
      same forward and backward passes, if with empty batches. Any process's checkpoint is that of all.
    - GradScaler: call `track_loss_scale` once, or psi jumps with the scale.
    - Activation checkpointing, compiled too: a batch counts once. A layer may be used up to 16 times before backward.
    - Gradients: a backward pass moves psi, so one backward pass for each forward pass. There are no second
      derivatives, and no transforms of torch.func, in training; in evaluation and frozen there are.
    - Fine-tuning: `freeze_mabn`. Other data or few steps: `recalibrate`.
    - Resuming with another moving_batch_size keeps the newest iterations; with another batch size, all.

    Args:
        num_features: C.
        eps: Added to second moments.
        momentum: Weight of the new value in R, in torch's sense (the authors' 0.98 is 0.02 here).
        moving_batch_size: Samples that a moving average covers; any batch size goes with it. With a batch of 2,
            32 are 16 iterations; a batch of this size or larger is its own average.
        warmup: Iterations that use their own batch's statistics (the authors use 100).
        renorm_start: Iterations before r is used (the authors use 1000).
        max_renorm: Bound of r.
        affine: False leaves weight and bias out.
        process_group: Processes that share statistics; None for all. A group of one for none.

    Raises:
        InputError: Wrong rank, number of channels or dtype of the input; an argument out of its range.

    Source: Yan et al., ICLR 2020, arXiv:2001.06838, Algorithm 1; megvii-model/MABN@995e8f5, MABN.py. Differs
        from that code: the first batch sets R, the window follows the batch size, and none of the faults of
        in-place history (a layer used twice, one batch that is not finite) remain.
    """

    _ranks = (2, 3)


class MABN2d(_MABN):
    """Moving average batch normalization over a (N, C, H, W) input. Arguments, formulas and source as MABN1d."""

    _ranks = (4,)


class MABN3d(_MABN):
    """Moving average batch normalization over a (N, C, D, H, W) input. Arguments and source as MABN1d."""

    _ranks = (5,)
