"""The CUDA kernels on a GPU: what tests/plugins/test_cuda_kernel.py asks of the emulation, and what only a GPU has."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import CASES, NormCase
from cuda_kernels import CHANNELS, LAYOUTS, SPATIAL, VARIANTS, CudaKernel, Layout, check, check_one_rounding, sized
from emulated import KERNEL_SOURCES
from kernels import Call
from tolerances import OP_FLOAT16

from deploynorm import libraries
from deploynorm.contract import DTYPES
from deploynorm.layers.functional import filter_response_norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case: NormCase, layout: Layout, kernel: CudaKernel) -> None:
    for variant in (None, *VARIANTS):
        check(kernel, case, layout=layout, variant=variant)
    assert check(kernel, case, layout=layout, statistics=False, in_place=True)
    assert check(kernel, case, layout=layout, statistics=False, workspace=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_y_is_rounded_once_behind_its_scale(dtype: str, kernel: CudaKernel) -> None:
    for layout, variant in itertools.product(LAYOUTS, VARIANTS):
        check_one_rounding(kernel, dtype, layout=layout, variant=variant)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_every_turn(dtype: str, layout: Layout, kernel: CudaKernel) -> None:
    sizes = [(2, 3, spatial) for spatial in SPATIAL] + [(1, channels, 5) for channels in CHANNELS]
    for size, variant in itertools.product(sizes, (None, *VARIANTS)):
        check(kernel, sized(dtype, *size), layout=layout, variant=variant)


@pytest.mark.parametrize("shifts", [(1, 1), (3, 3), (0, 1), (1, 0), (5, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_begin_off_16_bytes(dtype: str, shifts: tuple[int, int], kernel: CudaKernel) -> None:
    for layout, spatial, variant in itertools.product(LAYOUTS, (1, 5, 49, 1025), (None, *VARIANTS)):
        check(kernel, sized(dtype, 2, 8, spatial), layout=layout, variant=variant, shifts=shifts)


class OnTensors:
    """The kernel on torch's tensors: x (N, C, L) contiguous, or (N, L, C) with channels_last."""

    def __init__(self, kernel: CudaKernel, x: torch.Tensor, channels_last: bool = False) -> None:
        self.kernel, self.x, self.y = kernel, x, torch.full_like(x, float("nan"))
        samples, channels, spatial = (x.shape[0], *(reversed(x.shape[1:]) if channels_last else x.shape[1:]))
        generator = torch.Generator("cuda").manual_seed(0)
        self.parameters = [
            torch.rand(channels, device="cuda", generator=generator) + offset for offset in (0.5, -0.5, -1.0, 1e-3)
        ]
        kind = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}[x.dtype]
        names = ("gamma", "beta", "tau", "eps")
        pointers = {name: p.data_ptr() for name, p in zip(names, self.parameters, strict=True)}
        lanes = channels if channels_last else 1
        self.call = Call(samples, channels, spatial, lanes, kind, x.data_ptr(), self.y.data_ptr(), **pointers)
        self.workspace = torch.empty(max(1, kernel.workspace_bytes(self.call)), dtype=torch.uint8, device="cuda")

    def __call__(self, variant: str | None = None) -> bool:
        """Enqueues on torch's current stream; whether the variant takes these sizes."""
        stream = torch.cuda.current_stream().cuda_stream
        code = self.kernel.call(self.call, workspace=self.workspace.data_ptr(), stream=stream, variant=variant)
        assert code in (0, 1), f"CUDA error {code}"
        return code == 0

    def want(self, part: slice | list[int], channels_last: bool = False) -> torch.Tensor:
        """The answer for some samples, in float64."""
        x = self.x[part].double()
        x = x.transpose(1, 2) if channels_last else x
        y = filter_response_norm(x, *(p.double() for p in self.parameters))
        return y.transpose(1, 2) if channels_last else y


SIZES = {"packed": (64, 256, 49), "registers": (16, 64, 3136), "two_passes": (8, 64, 150528), "split": (1, 3, 1048576)}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thousand_runs_give_the_same_bits(variant: str, channels_last: bool, kernel: CudaKernel) -> None:
    """A race would show as a difference between runs: a device fills and empties in another order each time."""
    samples, channels, spatial = SIZES[variant]
    shape = (samples, spatial, channels) if channels_last else (samples, channels, spatial)
    run = OnTensors(kernel, torch.randn(shape, device="cuda"), channels_last)
    if not run(variant):
        pytest.skip(f"{variant} does not take {shape}")
    first = run.y.clone()
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000 if run.x.numel() < 10**7 else 100):
        run.y.fill_(float("nan"))
        run(variant)
        differences += (run.y != first).sum()
    assert differences.item() == 0


def test_it_runs_on_the_callers_stream(kernel: CudaKernel) -> None:
    """Behind the work that is on it, and not beside it: x is written long after the call."""
    run = OnTensors(kernel, torch.zeros(64, 64, 3136, device="cuda"))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        run.x.normal_()
        run()
    stream.synchronize()
    torch.testing.assert_close(run.y.double(), run.want(slice(None)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cuda_graph_captures_and_replays_it(variant: str, channels_last: bool, kernel: CudaKernel) -> None:
    samples, channels, spatial = SIZES[variant]
    shape = (samples, spatial, channels) if channels_last else (samples, channels, spatial)
    run = OnTensors(kernel, torch.randn(shape, device="cuda"), channels_last)
    if not run(variant):
        pytest.skip(f"{variant} does not take {shape}")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(variant)
    for _ in range(3):
        run.x.normal_()
        run.y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        want = run.want(slice(None), channels_last)
        torch.testing.assert_close(run.y.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_a_tensor_of_more_than_2_to_the_32_elements(channels_last: bool, kernel: CudaKernel) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    samples, channels, spatial = 1370, 1000, 56 * 56
    shape = (samples, spatial, channels) if channels_last else (samples, channels, spatial)
    x = torch.empty(shape, dtype=torch.float16, device="cuda")
    assert x.numel() > 2**32
    for start in range(0, samples, 100):
        x[start : start + 100].normal_()
    run = OnTensors(kernel, x, channels_last)
    assert run()
    torch.cuda.synchronize()
    assert not any(run.y[start : start + 100].isnan().any() for start in range(0, samples, 100))
    for sample in (0, 684, 685, samples - 1):
        want = run.want([sample], channels_last)
        torch.testing.assert_close(run.y[[sample]].double(), want, rtol=OP_FLOAT16.rtol, atol=OP_FLOAT16.atol)


@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "synccheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(
    tool: str, architecture: str, require: Callable[[str], None], tmp_path: Path
) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(sanitizer, os.X_OK):
        pytest.skip("compute-sanitizer is not installed")
    program = tmp_path / "every_variant"
    kernels = libraries.source_folder() / "kernels"
    sources = [str(Path(__file__).parent / "every_variant.cu"), *(str(kernels / name) for name in KERNEL_SOURCES)]
    options = ["-std=c++17", "-O2", "-lineinfo", f"-arch=sm_{architecture}", "-I", str(kernels)]
    subprocess.run([str(libraries.find_cuda().nvcc), *options, *sources, "-o", str(program)], check=True)
    plain = subprocess.run([str(program)], capture_output=True, text=True)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", str(program)], capture_output=True, text=True
    )
    told = done.stdout + done.stderr
    if "Device not supported" in told:
        pytest.skip("compute-sanitizer does not know this device")
    assert done.returncode == 0, told[-4000:]
