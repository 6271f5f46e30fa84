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

    Shape: (N, C, ...) -> the same.

    Args:
        num_features: C.

    Raises:
        InputError: The input has fewer than two axes, another number of channels, or no floating type.

    Source: Singh & Krishnan, arXiv:1911.09737, eq. 3 (tau starts at 0: a ReLU).
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
        if x.dim() < 2:
            raise InputError(
                "TLU",
                "wrong rank",
                got=f"a tensor of shape {tuple(x.shape)}",
                expected=f"(N, {self.num_features}, ...)",
            )
        check_input("TLU", x, self.num_features, (x.dim(),))
        return functional.tlu(x, self.tau)

    def extra_repr(self) -> str:
        return f"{self.num_features}"
