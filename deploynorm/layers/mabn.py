"""Moving average batch normalization."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deploynorm.errors import InputError
from deploynorm.layers import _mabn_checkpoints as checkpoints
from deploynorm.layers import functional
from deploynorm.layers._checks import check_count, check_dtype, check_input, check_positive, check_range
from deploynorm.layers._composed import transformed
from deploynorm.layers._mabn_training import FIX, MABNFunction, step
from deploynorm.layers._precision import FullPrecisionBuffers, compute_dtype
from deploynorm.layers._recomputation import may_run_again

_REMEMBERED_PASSES = 16
"""Forward passes of one layer that activation checkpointing can come back to: uses before the backward pass."""


def _unsaved(running_var: Tensor) -> dict[str, Tensor]:
    """The buffers that are not in a state_dict: a count of skipped batches, and what recognises a batch again."""
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
        check_count(name, "num_features", num_features)
        check_positive(name, "eps", eps)
        check_count(name, "moving_batch_size", moving_batch_size)
        check_count(name, "warmup", warmup, least=0)
        check_count(name, "renorm_start", renorm_start, least=0)
        check_range(name, "momentum", momentum, 0, 1, "0 to 1, in torch's sense")
        check_range(name, "max_renorm", max_renorm, 1, math.inf, "at least 1")
        check_dtype(name, dtype)
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
        """Resets every statistic: the next training step is the first of a new warm-up."""
        self.running_var.fill_(1)
        for history in (self.recent_x2, self.recent_gz, self.recent_passes):
            history.zero_()
        for count in (self.num_batches_tracked, self.skipped_batches, self.passes):
            count.zero_()

    def reset_parameters(self) -> None:
        """Sets weight 1 and bias 0, and resets the statistics."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """y, as the class says for the layer's mode."""
        check_input(type(self).__name__, x, self.num_features, self._ranks)
        if not self.training or self.frozen:
            return functional.normalize_by_second_moment(x, self.running_var, self.weight, self.bias, self.eps)
        if transformed():
            problem = "it cannot train under a transform of torch.func or in forward mode"
            raise InputError(type(self).__name__, problem, fix=FIX)
        if x.numel() == 0:
            empty = f"an empty batch of shape {tuple(x.shape)} added nothing to the statistics"
            warnings.warn(f"{type(self).__name__}: {empty}", stacklevel=2)
        again = may_run_again()
        with torch.no_grad():
            used = step(self, x, again)
        y: Tensor = MABNFunction.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, *used, self.recent_gz, self
        )
        return y

    def train(self, mode: bool = True) -> _MABN:
        # Warned of here and not in the step: reading the counter makes the host wait for the device.
        if not mode and self.training and not self.skipped_batches.is_meta:
            skipped = int(self.skipped_batches)
            if skipped:
                what = f"{skipped} batches with values that were not finite left the statistics alone"
                fix = "lower the learning rate or the loss scale"
                warnings.warn(f"{type(self).__name__}: {what}; {fix}", stacklevel=2)
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
        # Not self.__getstate__: that of a parametrized layer refuses, since it cannot be pickled.
        twin.__setstate__(copy.deepcopy(_MABN.__getstate__(self), memo))
        twin.process_group, twin._loss_scale = self.process_group, self._loss_scale
        return twin

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        checkpoints.fit(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.passes.is_meta and not self.running_var.is_meta:  # loaded with assign=True
            self._buffers.update(_unsaved(self.running_var))

    def extra_repr(self) -> str:
        names = ("eps", "momentum", "moving_batch_size", "warmup", "affine", *(("frozen",) if self.frozen else ()))
        return ", ".join([str(self.num_features), *(f"{name}={getattr(self, name)}" for name in names)])


class MABN1d(_MABN):
    """Moving average batch normalization over a (N, C) or (N, C, L) input; see MABN2d."""

    _ranks = (2, 3)


class MABN2d(_MABN):
    """Moving average batch normalization over a (N, C, H, W) input.

    Divides each channel by the root of its second moment E[x^2], without a mean
    (weight centralisation stands in for that: CenConv2d), and replaces the two
    statistics of a batch, that of forward and that of backward, by moving
    averages. So it trains with batches of one or two samples.

    Training, for each channel, E being the mean over N, H and W; forward:

        chi2_B = E[x^2]
        chi2   = mean of chi2_B over the window
        z      = x / sqrt(chi2 + eps)
        r      = clip(sqrt(chi2 + eps) / sqrt(R + eps), 1/max_renorm, max_renorm)
        y      = weight * r * z + bias
        R     <- (1 - momentum) * R + momentum * chi2

    and backward:

        g      = dy * weight * r
        psi_B  = E[g * z]
        psi    = mean of psi_B over the window
        dx     = (g - z * psi) / sqrt(chi2 + eps)

    The window is the newest iterations, weighted by their samples, that fit
    whole into moving_batch_size samples; the current one is always among them,
    and alone in the warm-up. r is a constant in backward, and 1 until
    renorm_start. The first batch sets R. dx is not the gradient of the forward
    expression: that is the method, and so a training step has no second
    derivatives and no transforms of torch.func.

    Evaluation, and training of a layer that `freeze_mabn` froze:

        y = weight * x / sqrt(R + eps) + bias

    with all derivatives. `deploynorm.fold` writes it into the convolution before.

    Args:
        num_features: C, the channels of the input.
        eps: Added to second moments; 1e-5.
        momentum: Weight of the new value in R, in torch's sense; 0.02, which is
            0.98 in the authors' code.
        moving_batch_size: Samples that the window covers; 32. With batches of 2
            these are 16 iterations. A batch of this size or larger is its own
            average.
        warmup: Iterations that use the statistics of their own batch; 100, as
            the authors do.
        renorm_start: Iterations in which r is 1; 1000, as the authors do.
        max_renorm: Bound of r and of 1/r; 5.
        affine: False leaves weight and bias out.
        process_group: Processes of torch.distributed that share statistics; None
            for all of them. A group of one process shares nothing.
        device, dtype: Of the parameters, as for torch's layers.

    Shape:
        x and y are (N, C, H, W), of one type and one memory format.

    Parameters, which should not decay (see `parameter_groups`):
        weight (C,): gamma, 1 at the start.
        bias (C,): beta, 0 at the start.

    Buffers, in float32 (float64 for float64) whatever the layer is cast to:
        running_var (C,): R, named as in the authors' code; a second moment and
            not a variance.
        num_batches_tracked (): Training steps that entered the statistics, int64.
        recent_x2, recent_gz (moving_batch_size, C + 1): The windows of chi2_B and
            psi_B: sums over samples and the number of samples, newest first.
        skipped_batches, recent_passes, passes: Not saved. Batches that were not
            finite; what activation checkpointing finds its batch again by.

    Raises:
        InputError: Wrong rank, number of channels or type of the input; an
            argument out of its range; a second derivative or a transform of
            torch.func in training.

    Notes:
        - A batch that is empty or not finite leaves the statistics alone, with a
          warning; that of the latter comes when the layer is next put in
          evaluation mode, because reading the counter makes the host wait.
        - torch.distributed: statistics, backward ones too, are those of all
          processes of the group. So each has to make as many forward and backward
          passes as the others, if with empty batches. Their checkpoints are equal.
        - GradScaler: call `track_loss_scale` once, or psi jumps with the scale.
        - Activation checkpointing, compiled too: a batch counts once. A layer may
          be used up to 16 times before backward.
        - A backward pass moves psi: make one for each forward pass.
        - Fine-tuning: `freeze_mabn`. Other data or few steps: `recalibrate`.
        - Resuming with another moving_batch_size keeps the newest iterations that
          fit; with another batch size, all.

    Source: Yan et al., ICLR 2020, arXiv:2001.06838, Algorithm 1;
        megvii-model/MABN@995e8f5, MABN.py. Differs from that code: the first
        batch sets R, the window follows the batch size, and none of the faults of
        its in-place history (a layer used twice, one batch that is not finite)
        remain.
    """

    _ranks = (4,)


class MABN3d(_MABN):
    """Moving average batch normalization over a (N, C, D, H, W) input; see MABN2d."""

    _ranks = (5,)
