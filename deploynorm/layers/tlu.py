"""Thresholded linear unit as a layer of its own, for where an addition stands between it and FRN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploynorm.errors import InputError
from deploynorm.layers import functional
from deploynorm.layers._checks import check_input, check_positive

__all__ = ["TLU"]


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
        check_positive("TLU", "num_features", num_features)
        self.num_features = num_features
        self.tau = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.tau)

    def forward(self, x: Tensor) -> Tensor:
        """z, as the class says."""
        if x.dim() < 2:
            got = f"a tensor of shape {tuple(x.shape)}"
            raise InputError("TLU", "wrong rank", got=got, expected=f"(N, {self.num_features}, ...)")
        check_input("TLU", x, self.num_features, (x.dim(),))
        return functional.tlu(x, self.tau)

    def extra_repr(self) -> str:
        return f"{self.num_features}"
