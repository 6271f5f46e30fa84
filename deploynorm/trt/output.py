"""Outputs of TensorRT whose size depends on values, and is known only when they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from deploynorm.trt import TensorRT
from deploynorm.trt.gpu import Gpu

__all__ = ["WaitingOutput"]


class WaitingOutput:
    """An output whose size TensorRT reports while it runs."""

    def __init__(self, gpu: Gpu, dtype: torch.dtype) -> None:
        self._gpu, self._dtype = gpu, dtype
        self._memory: Tensor | None = None
        self._shape: tuple[int, ...] = ()
        self._allocator: Any = None

    def allocator(self, trt: TensorRT) -> Any:
        """A tensorrt.IOutputAllocator that is alive as long as this object."""
        waiting = self

        class Allocator(trt.module.IOutputAllocator):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.module.IOutputAllocator.__init__(self)

            def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
                waiting._memory = waiting._gpu.empty((max(size, 1),), torch.uint8)
                return waiting._memory.data_ptr()

            def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
                return self.reallocate_output_async(name, memory, size, alignment, 0)

            def notify_shape(self, name: str, shape: Sequence[int]) -> None:
                waiting._shape = tuple(shape)

        self._allocator = Allocator()
        return self._allocator

    def take(self) -> Tensor:
        if self._memory is None:
            return self._gpu.empty(self._shape, self._dtype)
        return self._memory[: prod(self._shape) * self._dtype.itemsize].view(self._dtype).reshape(self._shape)
