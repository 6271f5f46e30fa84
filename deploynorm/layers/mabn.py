"""Moving average batch normalization."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deploynorm.errors import InputError
from deploynorm.layers import _statistics as statistics
from deploynorm.layers import functional
from deploynorm.layers._checks import check_input, check_positive
from deploynorm.layers._precision import FullPrecisionBuffers
from deploynorm.layers.functional import compute_dtype

__all__ = ["MABN1d", "MABN2d", "MABN3d"]

_REMEMBERED_STEPS = 8
"""Forward passes of one layer that activation checkpointing can come back to: uses before the backward pass."""


class _MABNFunction(torch.autograd.Function):
    """y = weight * r * z + bias with z = x / chi, and the backward pass of Algorithm 1.

    The gradient of x is not that of the forward expression: the batch statistic psi = E[g * z] in it is replaced
    by its moving average, which is the point of the method (arXiv:2001.06838, eq. 16 and Algorithm 1).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        second_moment: Tensor,
        r: Tensor,
        warm: Tensor,
        layer: _MABN,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, second_moment, r, warm)
        # The history itself is not saved for backward: it changes there, also for a second use of the layer.
        ctx.layer = layer
        scale = weight.to(r.dtype) * r
        return functional.normalize_by_second_moment(x, second_moment, scale, bias, layer.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, second_moment, r, warm = ctx.saved_tensors
        layer: _MABN = ctx.layer
        dtype = compute_dtype(x.dtype)
        reduced = (0, *range(2, x.dim()))
        inverse = torch.rsqrt(second_moment + layer.eps).to(dtype)
        grad = grad_y.to(dtype)
        z_grad_y = (grad * x.to(dtype)).sum(reduced) * inverse
        scale = weight.to(dtype) * r.to(dtype)

        psi = scale * z_grad_y / _positions(x)
        psi = layer._average_psi(psi, x, second_moment, warm).to(dtype)
        grad_x = grad * functional.per_channel(scale * inverse, x)
        grad_x = grad_x - x.to(dtype) * functional.per_channel(psi * inverse.square(), x)
        return (
            grad_x.to(x.dtype),
            (z_grad_y * r.to(dtype)).to(weight.dtype),
            grad.sum(reduced).to(weight.dtype),
            None,
            None,
            None,
            None,
        )


def _positions(x: Tensor) -> int:
    """Values behind one channel's statistic; 1 and not 0 for an empty batch, whose sums are 0."""
    return max(x.numel() // x.shape[1], 1)


def _samples(x: Tensor) -> int:
    return x.shape[0] if x.numel() else 0


class _MABN(FullPrecisionBuffers):
    """What MABN1d, MABN2d and MABN3d share; they differ in the rank of their input alone."""

    _ranks: ClassVar[tuple[int, ...]]

    running_var: Tensor
    num_batches_tracked: Tensor
    recent_x2: Tensor
    recent_x2_samples: Tensor
    recent_gz: Tensor
    recent_gz_samples: Tensor
    skipped_batches: Tensor
    recent_steps: Tensor

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
        if affine:
            self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        full = compute_dtype(dtype or torch.get_default_dtype())
        history = (moving_batch_size, num_features)

        def buffer(name: str, *shape: int, dtype: torch.dtype = full, persistent: bool = True) -> None:
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype), persistent)

        buffer("running_var", num_features)
        buffer("num_batches_tracked", dtype=torch.int64)
        buffer("recent_x2", *history)
        buffer("recent_x2_samples", moving_batch_size)
        buffer("recent_gz", *history)
        buffer("recent_gz_samples", moving_batch_size)
        buffer("skipped_batches", dtype=torch.int64, persistent=False)
        buffer("recent_steps", _REMEMBERED_STEPS, 4, num_features, persistent=False)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forgets every statistic: the next training step is the first, warm-up included."""
        self.running_var.fill_(1)
        self.recent_steps.fill_(torch.inf)
        self.num_batches_tracked.zero_()
        self.skipped_batches.zero_()
        for history in (self.recent_x2, self.recent_x2_samples, self.recent_gz, self.recent_gz_samples):
            history.zero_()

    def reset_parameters(self) -> None:
        """Sets weight 1, bias 0 and forgets the statistics."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_input(type(self).__name__, x, self.num_features, self._ranks)
        if not self.training:
            return functional.normalize_by_second_moment(x, self.running_var, self.weight, self.bias, self.eps)
        if x.numel() == 0:
            warnings.warn(
                f"{type(self).__name__}: an empty batch of shape {tuple(x.shape)} added nothing to the statistics",
                stacklevel=2,
            )
        with torch.no_grad():
            second_moment, r, warm = self._step(x)
        weight = self.weight if self.affine else torch.ones_like(self.running_var)
        bias = self.bias if self.affine else torch.zeros_like(self.running_var)
        y: Tensor = _MABNFunction.apply(x, weight, bias, second_moment, r, warm, self)  # type: ignore[no-untyped-call]
        return y

    def _step(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """chi^2 of Algorithm 1, the renorm factor r, and whether this step is in the warm-up."""
        current = statistics.second_moment_sum(x, self.running_var.dtype) / _positions(x)
        if statistics.recomputing():
            _, second_moment, r, warm = statistics.nearest(self.recent_steps, current)
            return second_moment, r, warm.bool().all()
        second_moment, r, warm = (statistics.held(t) for t in self._update_statistics(current, _samples(x)))
        statistics.remember(self.recent_steps, current, second_moment, r, warm)
        return second_moment, r, warm

    def _update_statistics(self, current: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        current, count = statistics.over_all_ranks(current, current.new_full((), samples))
        finite = torch.isfinite(current).all()
        keep = finite & (count > 0)

        first = self.num_batches_tracked == 0
        self.num_batches_tracked.add_(keep)
        self.skipped_batches.add_(~finite)
        warm = self.num_batches_tracked <= self.warmup
        average = statistics.moving_average(
            self.recent_x2, self.recent_x2_samples, current, count, self.moving_batch_size, keep
        )
        second_moment = torch.where(warm, current, average)

        r = ((second_moment + self.eps) / (self.running_var + self.eps)).sqrt()
        r = r.clamp(1 / self.max_renorm, self.max_renorm)
        renorm = self.num_batches_tracked > max(self.warmup, self.renorm_start)
        r = torch.where(renorm, r, 1.0)

        moved = torch.lerp(self.running_var, second_moment, self.momentum)
        # The first batch sets the average: started from 1 it would be far off for hundreds of steps.
        moved = torch.where(first, second_moment, moved)
        self.running_var.copy_(torch.where(keep, moved, self.running_var))
        return second_moment, r, warm

    def _average_psi(self, psi: Tensor, x: Tensor, second_moment: Tensor, warm: Tensor) -> Tensor:
        """The moving average of psi = E[g * z]; psi itself in the warm-up."""
        psi, count = statistics.over_all_ranks(psi, psi.new_full((), _samples(x)))
        # Of a batch that the forward pass left out, the gradient is left out as well.
        finite = torch.isfinite(psi).all() & torch.isfinite(second_moment).all()
        average = statistics.moving_average(
            self.recent_gz,
            self.recent_gz_samples,
            psi.to(self.recent_gz.dtype),
            count.to(self.recent_gz.dtype),
            self.moving_batch_size,
            finite & (count > 0),
        )
        return torch.where(warm, psi, average.to(psi.dtype))

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

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"moving_batch_size={self.moving_batch_size}, warmup={self.warmup}, affine={self.affine}"
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
    Statistics are float32 (float64 for float64) whatever the layer is cast to. Under torch.distributed they are
    those of all processes. A batch that is empty or not finite leaves them alone; the layer warns of it, for
    values that are not finite when it is next put in evaluation mode, because reading the counter earlier would
    make the host wait for the device. Under activation checkpointing a batch counts once. psi is kept in units of
    the loss: a new loss scale (GradScaler) disturbs the gradients until the window has passed.

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
