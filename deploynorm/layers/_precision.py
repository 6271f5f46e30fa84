"""The precision that layers keep whatever they are cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_HALF = (torch.float16, torch.bfloat16)


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
