"""FRN + TLU on a GPU: our CUDA kernels against everything that a user could have instead.

    PYTHONPATH=. python benchmarks/gpu.py --out benchmarks/results/gpu.json

Needs torch with CUDA, nvcc and CMake, and nothing of TensorRT, nor deploynorm to be installed: it builds the operator
library for the GPU that is there. For ResNet-50's shapes at batch 1, 8 and 64, in both layouts and three types, these
take turns:

    copy                   y.copy_(x), which is what has to move: one read, one write
    ours                   the variant that the library chooses
    eager                  the formula in plain torch
    torch.compile          the same, compiled
    rms_norm               F.rms_norm over the plane, and the affine and the threshold behind it (contiguous only)
    batch_norm, relu       cuDNN's BatchNorm in training, which computes statistics too, and ReLU

Every way is captured in a CUDA graph that calls it on one set of tensors after the other, as many as do not fit into
the second-level cache together where the shape is large enough, so that a call finds its input in memory. A figure is
the median over rounds in which all ways of a row take turns, timed by events. All are checked against float64 first.

More sections of the same file: gpu_training.py, the two passes of a layer of FRN and of MABN in training;
gpu_residual.py, the end of a residual block; and gpu_variants.py, each variant of our kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gpu_residual
import gpu_training
import gpu_variants
import machine
import torch
import torch.nn.functional as F
from gpu_timing import measure, sets_past_the_cache, timed
from torch import Tensor

from deploynorm import libraries
from deploynorm.errors import BackendError
from deploynorm.layers import _native
from deploynorm.libraries.kernels import TYPES, Forward, open_kernels

SHAPES = ((64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 28, 28), (512, 28, 28), (256, 14, 14), (1024, 14, 14),
          (512, 7, 7), (2048, 7, 7))  # fmt: skip
BATCHES = (1, 8, 64)
SECTIONS = ("training", "mabn", "residual", "variants", "inference")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EPS = 1e-6

Way = Callable[[Tensor, Tensor], object]
"""Computes FRN of the first tensor; into the second, or into a new one that it returns."""


class Kernel:
    """The library's CUDA kernels on torch's tensors and torch's stream."""

    def __init__(self, library: Path) -> None:
        opened = open_kernels(library)
        self._frn, self._workspace = opened.deploynorm_frn_cuda, opened.deploynorm_frn_cuda_workspace
        self._scratch: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, y: Tensor, parameters: list[Tensor]) -> None:
        channels = x.shape[1]
        block = channels if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() else 1
        pointers = [p.data_ptr() for p in parameters]
        sizes = (x.shape[0], channels, math.prod(x.shape[2:]), block)
        call = Forward(*sizes, TYPES[str(x.dtype).removeprefix("torch.")], x.data_ptr(), y.data_ptr(), None, *pointers)
        bytes_wanted = self._workspace(ctypes.byref(call))
        scratch = self._scratch.get(bytes_wanted)
        if scratch is None:
            scratch = self._scratch[bytes_wanted] = torch.empty(
                max(1, bytes_wanted), dtype=torch.uint8, device=x.device
            )
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        code = self._frn(ctypes.byref(call), scratch.data_ptr(), stream, None)
        if code != 0:
            raise RuntimeError(f"CUDA error {code} for {tuple(x.shape)} {x.dtype}")


def formula(x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor) -> Tensor:
    """FRN + TLU as one writes it in torch, with statistics that are safe in half precision."""
    wide = x.float()
    mean = wide.square().mean(dim=(2, 3), keepdim=True)
    column = (1, -1, 1, 1)
    y = gamma.view(column) * wide * torch.rsqrt(mean + eps.view(column)) + beta.view(column)
    return torch.maximum(y, tau.view(column)).to(x.dtype)


def rms_norm(x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor) -> Tensor:
    column = (1, -1, 1, 1)
    unit = F.rms_norm(x, x.shape[2:], eps=EPS)
    return torch.maximum(torch.addcmul(beta.view(column), unit, gamma.view(column)), tau.view(column)).to(x.dtype)


def make_ways(kernel: Kernel, x: Tensor, parameters: list[Tensor], compiled: bool) -> dict[str, Way]:
    """All ways for tensors like x. batch_norm computes something else, and is not to be compared in numbers."""
    gamma, beta, tau, eps = parameters
    ways: dict[str, Way] = {
        "copy": lambda x, y: y.copy_(x),
        "ours": lambda x, y: kernel(x, y, parameters),
        "eager": lambda x, y: formula(x, gamma, beta, tau, eps),
        "batch_norm, relu": lambda x, y: F.relu(F.batch_norm(x, None, None, gamma, beta, True), inplace=True),
    }
    if compiled:
        fused = torch.compile(formula, fullgraph=True, dynamic=False)
        ways["torch.compile"] = lambda x, y: fused(x, gamma, beta, tau, eps)
    if x.is_contiguous():
        ways["rms_norm"] = lambda x, y: rms_norm(x, gamma.to(x.dtype), beta.to(x.dtype), tau.to(x.dtype))
    return ways


def check_ways(ways: Mapping[str, Way], x: Tensor, parameters: list[Tensor]) -> dict[str, float]:
    """The largest error of each way against float64, relative to the largest value.

    Raises:
        SystemExit: One is off by more than its type explains.
    """
    wide = x.double()
    mean = wide.square().mean(dim=(2, 3), keepdim=True)
    gamma, beta, tau, eps = (p.double().view(1, -1, 1, 1) for p in parameters)
    want = torch.maximum(gamma * wide * torch.rsqrt(mean + eps) + beta, tau)
    errors = {}
    for name, way in ways.items():
        if name in ("copy", "batch_norm, relu"):
            continue
        y = torch.full_like(x, float("nan"))
        returned = way(x, y)
        got = returned if isinstance(returned, Tensor) else y
        errors[name] = float((got.double() - want).abs().max() / want.abs().max())
        if not errors[name] <= TOLERANCES[x.dtype] * (4 if name == "rms_norm" else 1):
            sys.exit(f"{name} is wrong for {tuple(x.shape)} {x.dtype}: {errors[name]:.3g}")
    return errors


def make_parameters(channels: int, device: str) -> list[Tensor]:
    """gamma, beta, tau and eps; one eps for all, since rms_norm has no more."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = [torch.rand(channels, device=device, generator=generator) for _ in range(3)]
    return [drawn[0] + 0.5, drawn[1] - 0.5, drawn[2] - 1, torch.full((channels,), EPS, device=device)]


def row(kernel: Kernel, shape: tuple[int, ...], layout: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one shape."""
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format

    def tensor() -> Tensor:
        return torch.randn(shape, device="cuda").to(DTYPES[dtype]).contiguous(memory_format=form)

    first = tensor()
    size = 2 * first.numel() * first.element_size()
    sets = [(first, torch.empty_like(first))]
    sets += [(tensor(), torch.empty_like(first)) for _ in range(sets_past_the_cache(size) - 1)]
    parameters = make_parameters(shape[1], "cuda")
    ways = make_ways(kernel, first, parameters, not options.no_compile)
    errors = check_ways(ways, first, parameters)
    calls = {name: lambda given, way=way: way(*given) for name, way in ways.items()}
    times = measure(calls, sets, size, options.rounds)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return {
        **timed(shape, layout, dtype, times),
        "of_copy": round(times["copy"] / times["ours"], 3),
        "bytes_read_and_written": size,
        "past_the_cache": size > cache,
        "errors": {name: float(f"{value:.3g}") for name, value in errors.items()},
    }


def show(result: dict[str, Any]) -> str:
    times = result["microseconds"]
    others = "  ".join(f"{name} {value / times['ours']:.2f}" for name, value in times.items() if name != "ours")
    size = "x".join(map(str, result["shape"]))
    cached = "" if result["past_the_cache"] else " (in cache)"
    return (
        f"{size:>16} {result['layout']} {result['dtype']:>8}  ours {times['ours']:8.2f} us{cached}  ours = 1: {others}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--libraries", type=Path, help="a folder of ours that were built for this GPU")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes longest")
    parser.add_argument("--sections", choices=SECTIONS, nargs="+", default=SECTIONS)
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        help=f"by default {BATCHES}, in training and of variants {gpu_training.BATCHES}",
    )
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--layouts", choices=("nchw", "nhwc"), nargs="+", default=["nchw", "nhwc"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch finds no CUDA device")
    torch.backends.cudnn.benchmark = True
    properties = torch.cuda.get_device_properties(0)
    results: dict[str, Any] = {"device": describe(properties), "machine": machine.describe("torch")}
    with tempfile.TemporaryDirectory() as folder:
        try:
            architecture = f"{properties.major}{properties.minor}"
            if options.libraries is None:
                libraries.build(Path(folder), cuda=True, tensorrt=False, architectures=[architecture])
            library = (options.libraries or Path(folder)) / libraries.ORT_LIBRARY
        except BackendError as error:
            sys.exit(f"benchmarks/gpu.py: {error}")
        # A machine may be lent for less time than this takes: what there is is written after each row.
        if "training" in options.sections:
            _native.LIBRARY = _native._Library(library.with_name(libraries.TORCH_LIBRARY))
            results["training"] = []
            for shape, layout, dtype in rows(gpu_training, options):
                how = {"rounds": options.rounds, "compiled": not options.no_compile}
                results["training"].append(gpu_training.row(shape, layout, dtype, **how))
                print(gpu_training.show(results["training"][-1]), flush=True)
                options.out.write_text(json.dumps(results, indent=1))
            torch._dynamo.reset()
            results["training_host_microseconds"] = gpu_training.host_times(options.rounds, not options.no_compile)
            options.out.write_text(json.dumps(results, indent=1))
        if "mabn" in options.sections:
            results["mabn"] = []
            for shape, layout, dtype in rows(gpu_training, options):
                how = {"rounds": options.rounds, "compiled": not options.no_compile}
                results["mabn"].append(gpu_training.mabn_row(shape, layout, dtype, **how))
                print(gpu_training.show(results["mabn"][-1]), flush=True)
                options.out.write_text(json.dumps(results, indent=1))
        kernels = gpu_variants.Kernels(library.with_name(libraries.TORCH_LIBRARY))
        for name, section in {"residual": gpu_residual, "variants": gpu_variants}.items():
            if name in options.sections:
                results[name] = []
                for shape, layout, dtype in rows(section, options):
                    results[name].append(section.row(kernels, shape, layout, dtype, rounds=options.rounds))
                    print(section.show(results[name][-1]), flush=True)
                    options.out.write_text(json.dumps(results, indent=1))
        if "inference" in options.sections:
            kernel = Kernel(library)
            results["rows"] = []
            for shape, layout, dtype in rows(sys.modules[__name__], options):
                with torch.no_grad():
                    results["rows"].append(row(kernel, shape, layout, dtype, options))
                print(show(results["rows"][-1]), flush=True)
                options.out.write_text(json.dumps(results, indent=1))


def rows(section: Any, options: argparse.Namespace) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """Shape, layout and dtype of each row of a section, with nothing left over from the one before."""
    for batch in options.batches or section.BATCHES:
        for shape in section.SHAPES:
            for layout in options.layouts:
                for dtype in options.dtypes:
                    if dtype in section.DTYPES:
                        torch._dynamo.reset()
                        torch.cuda.empty_cache()
                        yield (batch, *shape), layout, dtype


def describe(properties: Any) -> dict[str, object]:
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "second_level_cache": properties.L2_cache_size,
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


if __name__ == "__main__":
    main()
