"""The precision that layers compute in, and the one that their buffers keep whatever the layers are cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of `dtype` tensors are computed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype) that leaves no node in an exported graph where there is nothing to convert."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """Views a (C,) or () parameter so that it broadcasts over x (N, C, ...), in x's compute type."""
    return cast(parameter, compute_dtype(x.dtype)).reshape((1, -1) + (1,) * (x.dim() - 2))


class FullPrecisionBuffers(nn.Module):
    """A module whose buffers stay in float32 when it is cast to half precision: its parameters follow the cast.

    A moving average needs the digits, and an epsilon below 6e-8 would be zero in float16.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype in _HALF:
                self._buffers[name] = kept.to(after.device)
        return self
