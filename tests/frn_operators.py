"""FRN's operators of torch.library, and operands for them."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD = torch.ops.deploynorm.frn_forward.default
BACKWARD = torch.ops.deploynorm.frn_backward.default
RULES = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
"""The tests of opcheck, all of them."""


def operands(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Tensor]:
    """x, gamma, beta, tau and eps; all but eps, which must stay positive, may be differentiated."""
    torch.manual_seed(sum(shape))
    full = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(*shape, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        x = torch.cat([x, x + 1], -1)[..., ::2]
    parameters = [torch.randn(shape[1], dtype=full) for _ in range(3)]
    return [x, *parameters, torch.rand(shape[1], dtype=full) + 0.1]


def differentiable(tensors: list[Tensor]) -> list[Tensor]:
    return [t.requires_grad_() for t in tensors]
