"""torch.compile, and what it says where it cannot compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deploynorm.errors import BackendError

__all__ = ["compiled"]


def compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network, compiled in its first step.

    Raises:
        BackendError: The first call, where torch finds no compiler, or one that fails.
    """
    from torch._dynamo.exc import TorchDynamoException

    run: Callable[[Tensor], Tensor] = torch.compile(network)

    def call(images: Tensor) -> Tensor:
        try:
            return run(images)
        except TorchDynamoException as error:
            reason = str(error).partition("\n")[0]
            raise BackendError("--compile", "torch.compile failed", got=reason, fix="leave it out") from error

    return call
