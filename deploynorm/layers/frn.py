"""Filter response normalization with its thresholded linear unit, and this unit as a layer of its own."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deploynorm.errors import InputError
from deploynorm.layers import _frn_checkpoints as checkpoints
from deploynorm.layers import functional
from deploynorm.layers._checks import check_count, check_dtype, check_input, check_positive, check_residual
from deploynorm.layers._precision import FullPrecisionBuffers, cast, compute_dtype

_LEARNED_EPS_INIT = 1e-4


class _FRN(FullPrecisionBuffers):
    """What FRN1d, FRN2d and FRN3d share; they differ in the rank of their input alone."""

    _ranks: ClassVar[tuple[int, ...]]

    weight: nn.Parameter
    bias: nn.Parameter
    tau: nn.Parameter | None
    eps: float | Tensor
    eps_l: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float | Tensor = 1e-6,
        *,
        learned_eps: Literal["layer", "channel"] | None = None,
        tlu: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_count(name, "num_features", num_features)
        check_dtype(name, dtype)
        self.num_features = num_features
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.tau = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if tlu else None
        self._set_eps(eps, device)
        self.learned_eps = learned_eps
        if learned_eps is None:
            self.register_parameter("eps_l", None)
        elif learned_eps in ("layer", "channel"):
            shape = () if learned_eps == "layer" else (num_features,)
            self.eps_l = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            raise InputError(name, "unknown learned_eps", got=repr(learned_eps), expected="'layer', 'channel' or None")
        self.reset_parameters()

    def _set_eps(self, eps: float | Tensor, device: torch.device | str | None) -> None:
        name = type(self).__name__
        if not isinstance(eps, Tensor):
            check_positive(name, "eps", eps)
            self.eps = float(eps)
            return
        sound = eps.is_meta or bool(((eps > 0) & torch.isfinite(eps)).all())
        if eps.shape != (self.num_features,) or not sound:
            expected = f"a number, or a tensor ({self.num_features},) of positive numbers"
            raise InputError(name, "wrong eps", got=f"a tensor of shape {tuple(eps.shape)}", expected=expected)
        values = eps.detach().to(device=device, dtype=compute_dtype(self.weight.dtype), copy=True)
        self.register_buffer("eps", values)

    def reset_parameters(self) -> None:
        """Sets gamma 1, beta 0, tau 0 and eps_l 1e-4."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.tau is not None:
            nn.init.zeros_(self.tau)
        if self.eps_l is not None:
            nn.init.constant_(self.eps_l, _LEARNED_EPS_INIT)

    def effective_eps(self) -> float | Tensor:
        """The epsilon that is added to the mean square: eps, or eps + |eps_l| when it is learned."""
        if self.eps_l is None:
            return self.eps
        # Added in float32 at least: in float16 a floor below 6e-8 would be zero.
        return self.eps + cast(self.eps_l.abs(), compute_dtype(self.eps_l.dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """z, as the class says."""
        check_input(type(self).__name__, x, self.num_features, self._ranks)
        if residual is not None and not torch.compiler.is_exporting():  # where a comparison would fix sizes
            check_residual(type(self).__name__, residual, x)
        if x.dim() == 2 and self.eps_l is None and not torch.compiler.is_compiling():
            cause = "on a (N, C) input each value is its own mean, so with a small fixed eps"
            fault = "the output is a sign function with almost no gradient"
            fix = "pass learned_eps='layer' (arXiv:1911.09737, section 3.3)"
            warnings.warn(f"{type(self).__name__}: {cause} {fault}; {fix}", stacklevel=2)
        eps = self.effective_eps()
        return functional.filter_response_norm(x, self.weight, self.bias, self.tau, eps, residual)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        checkpoints.fit(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        eps = self.eps if isinstance(self.eps, float) else "per channel"
        return f"{self.num_features}, eps={eps}, learned_eps={self.learned_eps!r}, tlu={self.tau is not None}"


class FRN1d(_FRN):
    """Filter response normalization and TLU over a (N, C) or (N, C, L) input; see FRN2d.

    On a (N, C) input each value is its own mean, so with a fixed eps the output is a sign function; the layer warns.
    """

    _ranks = (2, 3)


class FRN2d(_FRN):
    """Filter response normalization and thresholded linear unit (TLU).

    For each sample and channel of x, nu2 being the mean over H and W:

        nu2 = mean(x^2)
        y   = weight * x / sqrt(nu2 + eps + |eps_l|) + bias [+ residual]
        z   = max(y, tau)

    Nothing is shared between samples and nothing is tracked: training and
    evaluation compute the same. The activation is included: no ReLU after it.
    Statistics are computed in float32 (float64 for float64) whatever x is.
    Backward saves only x and one scalar per (sample, channel).

    At the end of a residual block, `norm(x, residual=shortcut)` computes in one
    pass what FRN2d without tlu, an addition and a TLU do in three: the same
    gradients, in seven to nine tenths of their time. Backward then saves z too,
    as the layer after does.

    Args:
        num_features: C, the channels of the input.
        eps: Added to the mean square; 1e-6. A number, or a tensor (C,), which
            becomes a buffer. With learned_eps it is the lower bound.
        learned_eps: "layer" or "channel" adds the parameter eps_l, for layers
            whose maps may be as small as 1x1; None, the default, does not.
        tlu: False leaves the threshold out.
        device, dtype: Of the parameters, as for torch's layers.

    Shape:
        x, residual and z are (N, C, H, W), of one type; z has x's memory format.

    Parameters, which should not decay (see `parameter_groups`):
        weight (C,): gamma, 1 at the start.
        bias (C,): beta, 0 at the start.
        tau (C,): The threshold, 0 at the start; None without tlu.
        eps_l () or (C,): 1e-4 at the start; None without learned_eps.

    Buffers:
        eps (C,): Where eps was given as a tensor, or came with a state dict, as
            that of an imported checkpoint; float32 (float64 for float64) whatever
            the layer is cast to.

    Raises:
        InputError: Wrong rank, number of channels or type of the input; a residual
            of another shape or type; eps not positive or of another shape; unknown
            learned_eps.

    Source: Singh & Krishnan, CVPR 2020, arXiv:1911.09737, eq. 1 to 3 and section
        3.3. Their eq. 7, the gradient of x, lacks a factor 1/(H*W).
    """

    _ranks = (4,)


class FRN3d(_FRN):
    """Filter response normalization and TLU over a (N, C, D, H, W) input; see FRN2d."""

    _ranks = (5,)


class TLU(nn.Module):
    """Thresholded linear unit: z = max(x, tau), with a learned threshold per channel.

    FRN2d has one of its own; this one is for where an addition stands between the
    two: relu(x + frn(y)) becomes tlu(x + frn(y)), with FRN2d(..., tlu=False).
    Training and evaluation compute the same.

    Args:
        num_features: C, the channels of the input.
        device, dtype: Of the parameter, as for torch's layers.

    Shape:
        x and z are (N, C, ...), of one type.

    Parameters, which should not decay (see `parameter_groups`):
        tau (C,): The threshold, 0 at the start, which makes it a ReLU.

    Raises:
        InputError: The input has fewer than two axes, another number of channels,
            or no floating type.

    Source: Singh & Krishnan, CVPR 2020, arXiv:1911.09737, eq. 3. At a tie the
        gradient goes to tau, where their eq. 4 has it go to x.
    """

    def __init__(
        self,
        num_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("TLU", "num_features", num_features)
        check_dtype("TLU", dtype)
        self.num_features = num_features
        self.tau = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.tau)

    def forward(self, x: Tensor) -> Tensor:
        """z, as the class says."""
        check_input("TLU", x, self.num_features)
        return functional.tlu(x, self.tau)

    def extra_repr(self) -> str:
        return f"{self.num_features}"
