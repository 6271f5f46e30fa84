"""The CUDA kernels' variants beside each other: what the library's choice among them rests on. A section of gpu.py.

Forward, a variant reads and writes as much as y.copy_(x) does; backward, as much as torch.add(dy, x, out=dx).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from gpu_timing import measure, sets_past_the_cache
from torch import Tensor

from deploynorm import libraries
from deploynorm.libraries.kernels import TYPES, Backward, Forward, open_kernels

__all__ = ["BATCHES", "DTYPES", "SHAPES", "Kernels", "Tensors", "row", "show"]

SHAPES = ((64, 112, 112), (256, 56, 56), (512, 28, 28), (512, 20, 20), (1024, 16, 16), (1024, 15, 15), (1024, 14, 14),
          (1024, 12, 12), (2048, 10, 10), (2048, 8, 8), (2048, 7, 7), (2048, 5, 5), (4096, 4, 4))  # fmt: skip
BATCHES = (2, 32)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Pass = Literal["forward", "backward"]
FUNCTIONS: dict[Pass, str] = {"forward": "deploynorm_frn_cuda", "backward": "deploynorm_frn_backward_cuda"}


@dataclass
class Tensors:
    """What a call of either pass takes, filled at random.

    Attributes:
        shape: (N, C, spatial). Contiguous tensors are stored so, channels_last ones as (N, spatial, C).
    """

    shape: tuple[int, int, int]
    layout: str
    dtype: torch.dtype
    device: str = "cuda"
    calls: dict[Pass, ctypes.Structure] = field(init=False)

    def __post_init__(self) -> None:
        samples, channels, spatial = self.shape
        block = channels if self.layout == "nhwc" else 1
        stored = (samples, spatial, channels) if self.layout == "nhwc" else self.shape
        self.x, self.dy = (torch.randn(stored, device=self.device).to(self.dtype) for _ in range(2))
        self.out = torch.empty_like(self.x)
        wide = torch.promote_types(self.dtype, torch.float32)
        self.parameters = [
            torch.rand(channels, device=self.device, dtype=wide) + least for least in (0.5, -0.5, -1.0, 1e-3)
        ]
        self.rstd = torch.rand(samples, channels, device=self.device, dtype=wide) + 0.5
        self.gradients = torch.empty(4, channels, device=self.device, dtype=wide)
        head = (*self.shape, block, TYPES[str(self.dtype).removeprefix("torch.")])
        x, dy, out, rstd = (each.data_ptr() for each in (self.x, self.dy, self.out, self.rstd))
        gamma, beta, tau, eps = (each.data_ptr() for each in self.parameters)
        self.calls = {
            "forward": Forward(*head, x, out, None, gamma, beta, tau, eps, None),
            "backward": Backward(
                *head, dy, x, rstd, gamma, beta, tau, out, *(each.data_ptr() for each in self.gradients)
            ),
        }
        self.scratch: dict[Pass, Tensor] = {}


class Kernels:
    """The library's CUDA kernels of both passes, on torch's stream."""

    def __init__(self, library: Path) -> None:
        opened = open_kernels(library)
        self.variants = libraries.cuda_variants(library)
        self._run = {which: getattr(opened, name) for which, name in FUNCTIONS.items()}
        self._workspace = {which: getattr(opened, f"{name}_workspace") for which, name in FUNCTIONS.items()}

    def __call__(self, which: Pass, tensors: Tensors, variant: str | None = None) -> int:
        """CUDA's error code: not 0 where the variant does not take these sizes. None is the library's choice."""
        call = ctypes.byref(tensors.calls[which])
        if which not in tensors.scratch:
            size = max(1, self._workspace[which](call))
            tensors.scratch[which] = torch.empty(size, dtype=torch.uint8, device=tensors.device)
        stream = torch.cuda.current_stream().cuda_stream if tensors.x.is_cuda else 0
        name = None if variant is None else variant.encode()
        return int(self._run[which](call, tensors.scratch[which].data_ptr(), stream, name))


def row(kernels: Kernels, shape: tuple[int, ...], layout: str, dtype: str, *, rounds: int) -> dict[str, Any]:
    """All figures of one shape."""
    sizes = (shape[0], shape[1], math.prod(shape[2:]))
    first = Tensors(sizes, layout, DTYPES[dtype])
    size = 3 * first.x.nbytes
    sets = [first, *(Tensors(sizes, layout, DTYPES[dtype]) for _ in range(sets_past_the_cache(size) - 1))]
    ways = {
        ("forward", "copy"): lambda given: given.out.copy_(given.x),
        ("backward", "add"): lambda given: torch.add(given.dy, given.x, out=given.out),
    }
    for which in FUNCTIONS:
        for variant in (None, *kernels.variants):
            if kernels(which, first, variant) == 0:
                key = (which, "ours" if variant is None else variant)
                ways[key] = lambda given, which=which, variant=variant: kernels(which, given, variant)
    times = measure({" ".join(key): way for key, way in ways.items()}, sets, size, rounds)
    passes = {
        which: {name: round(times[f"{which} {name}"], 3) for way, name in ways if way == which} for which in FUNCTIONS
    }
    return {"shape": list(sizes), "layout": layout, "dtype": dtype, "microseconds": passes}


def show(result: Mapping[str, Any]) -> str:
    size = "x".join(map(str, result["shape"]))
    row = [f"{size:>14} {result['layout']} {result['dtype']:>8}"]
    for which, times in result["microseconds"].items():
        (reference, moved), *others = times.items()
        ratios = "  ".join(f"{name} {value / moved:.2f}" for name, value in others)
        row.append(f"{which}: {reference} {moved:.1f} us = 1: {ratios}")
    return "  ".join(row)
