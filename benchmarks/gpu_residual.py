"""The end of a residual block: FRN, an addition and the threshold, in one kernel and in three. A section of gpu.py.

one      our kernel with the residual: two reads and one write
three    our kernel without threshold, torch.add and torch.maximum: four reads and three writes
add      torch.add alone, which moves as much as `one`
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from gpu_timing import measure, sets_past_the_cache
from gpu_variants import BATCHES, DTYPES, Kernels, Tensors
from torch import Tensor

__all__ = ["BATCHES", "DTYPES", "SHAPES", "End", "row", "show"]

SHAPES = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))


class End:
    """The end of a block on tensors of its own."""

    def __init__(self, kernels: Kernels, tensors: Tensors) -> None:
        self._kernels, self.fused, self.bare = kernels, tensors, copy.copy(tensors)
        self.residual, self._sum = tensors.dy, torch.empty_like(tensors.out)
        column = (1, 1, -1) if tensors.layout == "nhwc" else (1, -1, 1)
        self._tau = tensors.parameters[2].to(tensors.dtype).view(column)
        self._none = torch.full_like(tensors.parameters[2], -math.inf)
        forward = tensors.calls["forward"]
        bare = type(forward).from_buffer_copy(forward)
        bare.tau, bare.y = self._none.data_ptr(), self._sum.data_ptr()
        self.bare.calls, self.bare.scratch = {"forward": bare}, {}
        forward.residual = self.residual.data_ptr()

    def one(self) -> Tensor:
        _succeed(self._kernels("forward", self.fused))
        return self.fused.out

    def three(self) -> Tensor:
        _succeed(self._kernels("forward", self.bare))
        torch.add(self._sum, self.residual, out=self._sum)
        return torch.maximum(self._sum, self._tau, out=self.fused.out)

    def add(self) -> Tensor:
        return torch.add(self.fused.x, self.residual, out=self.fused.out)


def _succeed(code: int) -> None:
    if code != 0:
        raise RuntimeError(f"CUDA error {code}")


def row(kernels: Kernels, shape: tuple[int, ...], layout: str, dtype: str, *, rounds: int) -> dict[str, Any]:
    """All figures of one shape."""
    sizes = (shape[0], shape[1], math.prod(shape[2:]))
    first = End(kernels, Tensors(sizes, layout, DTYPES[dtype]))
    size = 3 * first.residual.nbytes
    more = sets_past_the_cache(size) - 1
    sets = [first, *(End(kernels, Tensors(sizes, layout, DTYPES[dtype])) for _ in range(more))]
    ways = {"one": End.one, "three": End.three, "add": End.add}
    times = {name: round(time, 3) for name, time in measure(ways, sets, size, rounds).items()}
    return {
        "shape": list(sizes),
        "layout": layout,
        "dtype": dtype,
        "microseconds": times,
        "times_as_fast": round(times["three"] / times["one"], 3),
        "of_add": round(times["add"] / times["one"], 3),
    }


def show(result: Mapping[str, Any]) -> str:
    size = "x".join(map(str, result["shape"]))
    times = result["microseconds"]
    head = f"{size:>14} {result['layout']} {result['dtype']:>8}  one kernel {times['one']:.1f} us"
    return f"{head}, {result['times_as_fast']:.2f} times as fast as three, {100 * result['of_add']:.0f} % of add"
