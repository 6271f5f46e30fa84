"""Mixed precision: convolutions in 16 bits, parameters and statistics in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deploynorm.errors import BackendError

__all__ = ["AMP", "autocast", "check_amp"]

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Value of --amp -> the type that autocast computes in."""


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """torch.autocast in the type that amp names; None computes everything in the type of the parameters."""
    return torch.autocast(device.type, AMP.get(amp or ""), enabled=amp is not None)


def check_amp(device: torch.device, amp: str | None) -> None:
    """Tries one convolution and its backward pass: support differs between devices and releases of torch.

    Raises:
        BackendError: torch refuses.
    """
    image, weight = (torch.ones(1, 1, 3, 3, device=device, requires_grad=True) for _ in range(2))
    try:
        with autocast(device, amp):
            F.conv2d(image, weight).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise BackendError(
            f"--amp {amp}", f"torch cannot compute in it on {device}", got=error, fix="use the other --amp, or none"
        ) from error
