"""The CUDA kernels of both passes on a GPU, on torch's tensors and streams: what the emulation cannot show."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_kernels import VARIANTS, CudaKernel
from emulated import KERNEL_SOURCES
from tolerances import OP_FLOAT16
from torch import Tensor

from deploynorm import libraries
from deploynorm.layers import _handwritten
from deploynorm.layers.functional import filter_response_norm
from deploynorm.libraries.kernels import TYPES, Backward, Forward

SIZES = {"runs": (64, 256, 49), "registers": (16, 64, 3136), "two_passes": (8, 64, 150528), "split": (1, 3, 1048576)}


class OnTensors:
    """A pass on torch's tensors: x (N, C, L) contiguous, or (N, L, C) with channels_last. A subclass has

    prepare(sizes)     makes `call` and the tensors that it needs; those that it writes are `written`, y or dx first
    draw()             new values, a few samples at a time, for they may be large
    check(samples)     against plain PyTorch in float64: some samples, or all and what there is once for them
    """

    call: Forward | Backward
    written: list[Tensor]
    prepare: Callable[[tuple[int, int, int, int, int]], None]
    draw: Callable[[], None]
    check: Callable[..., None]

    def __init__(self, kernel: CudaKernel, x: Tensor, channels_last: bool = False) -> None:
        self.kernel, self.channels_last, self.x = kernel, channels_last, x
        samples, channels, spatial = (x.shape[0], *(reversed(x.shape[1:]) if channels_last else x.shape[1:]))
        generator = torch.Generator("cuda").manual_seed(0)
        self.parameters = [
            torch.rand(channels, device="cuda", generator=generator) + offset for offset in (0.5, -0.5, -1.0, 1e-3)
        ]
        kind = TYPES[str(x.dtype).removeprefix("torch.")]
        self.prepare((samples, channels, spatial, channels if channels_last else 1, kind))
        self.draw()
        size = max(1, kernel.workspace_bytes(self.call))
        self.workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")

    def channels_first(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if self.channels_last else tensor

    def forget(self) -> None:
        """What is not written by the next call stays NaN."""
        for each in self.written:
            each.fill_(float("nan"))
        self.workspace.fill_(0xFF)

    def __call__(self, variant: str | None = None) -> bool:
        """Enqueues on torch's current stream; whether the variant takes these sizes."""
        stream = torch.cuda.current_stream().cuda_stream
        code = self.kernel.call(self.call, workspace=self.workspace.data_ptr(), stream=stream, variant=variant)
        assert code in (0, 1), f"CUDA error {code}"
        return code == 0


class ForwardOnTensors(OnTensors):
    def prepare(self, sizes: tuple[int, int, int, int, int]) -> None:
        self.written = [torch.full_like(self.x, float("nan"))]
        pointers = [each.data_ptr() for each in self.parameters]
        self.call = Forward(*sizes, self.x.data_ptr(), self.written[0].data_ptr(), None, *pointers)

    def draw(self) -> None:
        for start in range(0, len(self.x), 100):
            self.x[start : start + 100].normal_()

    def check(self, samples: list[int] | None = None) -> None:
        part = slice(None) if samples is None else samples
        x, y = (self.channels_first(each[part]).double() for each in (self.x, self.written[0]))
        want = filter_response_norm(x, *(each.double() for each in self.parameters))
        half = self.x.dtype == torch.float16
        rtol, atol = (OP_FLOAT16.rtol, OP_FLOAT16.atol) if half else (1e-4, 1e-5)
        torch.testing.assert_close(y, want, rtol=rtol, atol=atol)


class BackwardOnTensors(OnTensors):
    def prepare(self, sizes: tuple[int, int, int, int, int]) -> None:
        samples, channels = sizes[:2]
        self.dy = torch.empty_like(self.x)
        self.rstd = torch.empty(samples, channels, device="cuda")
        of_parameters = torch.full((4, channels), float("nan"), device="cuda")  # gamma, beta, tau, eps
        self.written = [torch.full_like(self.x, float("nan")), of_parameters]
        tensors = (self.dy, self.x, self.rstd, *self.parameters[:3], self.written[0], *of_parameters)
        self.call = Backward(*sizes, *(each.data_ptr() for each in tensors))

    def draw(self) -> None:
        column = (1, -1, 1)
        gamma, beta, tau, eps = self.parameters
        for start in range(0, len(self.x), 100):
            part = slice(start, start + 100)
            self.x[part].normal_()
            self.dy[part].normal_()
            x, dy = self.channels_first(self.x[part]), self.channels_first(self.dy[part])
            mean = torch.stack([each.float().square().mean(1) for each in x])
            self.rstd[part] = torch.rsqrt(mean + eps)
            # Where y is near to tau, rounding decides which of the two has the gradient.
            y = (gamma * self.rstd[part]).unsqueeze(2) * x + beta.view(column)
            dy.masked_fill_((y - tau.view(column)).abs() < 1e-5, 0)

    def check(self, samples: list[int] | None = None) -> None:
        part = slice(None) if samples is None else samples
        dy, x = (self.channels_first(each[part]).double() for each in (self.dy, self.x))
        parameters = [each.double() for each in self.parameters[:3]]
        dx, *others = _handwritten.backward(dy, x, self.rstd[part].double(), *parameters)
        got = self.channels_first(self.written[0][part]).double()
        tolerance = 1e-5 if self.x.dtype == torch.float32 else 1e-3
        torch.testing.assert_close(got, dx, rtol=tolerance, atol=tolerance)
        if samples is None:
            size = (self.dy.numel() / len(parameters[0])) ** 0.5  # of a sum of as many random numbers
            for mine, right in zip(self.written[1].double(), others, strict=True):
                torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4 * size)


PASSES: dict[str, type[OnTensors]] = {"forward": ForwardOnTensors, "backward": BackwardOnTensors}
both_passes = pytest.mark.parametrize("which", PASSES)
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


def on_random(kernel: CudaKernel, which: str, variant: str, channels_last: bool) -> OnTensors:
    samples, channels, spatial = SIZES[variant]
    if which == "backward" and channels_last and variant == "registers":
        spatial = 784
    shape = (samples, spatial, channels) if channels_last else (samples, channels, spatial)
    run = PASSES[which](kernel, torch.empty(shape, device="cuda"), channels_last)
    if not run(variant):
        pytest.skip(f"{variant} does not take {shape}")
    return run


@both_passes
@both_layouts
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thousand_runs_give_the_same_bits(
    variant: str, channels_last: bool, which: str, gpu_kernel: CudaKernel
) -> None:
    """A race would show as a difference between runs: a device fills and empties in another order each time."""
    run = on_random(gpu_kernel, which, variant, channels_last)
    run.check()
    first = [each.clone() for each in run.written]
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000 if run.x.numel() < 10**7 else 100):
        run.forget()
        run(variant)
        for mine, other in zip(run.written, first, strict=True):
            differences += (mine != other).sum()
    assert differences.item() == 0


@both_passes
def test_it_runs_on_the_callers_stream(which: str, gpu_kernel: CudaKernel) -> None:
    """Behind the work that is on it, and not beside it: x is written long after the call."""
    run = PASSES[which](gpu_kernel, torch.zeros(64, 64, 3136, device="cuda"))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        run.draw()
        run()
    stream.synchronize()
    run.check()


@both_passes
@both_layouts
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cuda_graph_captures_and_replays_it(
    variant: str, channels_last: bool, which: str, gpu_kernel: CudaKernel
) -> None:
    run = on_random(gpu_kernel, which, variant, channels_last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(variant)
    for _ in range(3):
        run.draw()
        run.forget()
        graph.replay()
        torch.cuda.synchronize()
        run.check()


@both_passes
@both_layouts
def test_a_tensor_of_more_than_2_to_the_32_elements(channels_last: bool, which: str, gpu_kernel: CudaKernel) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    samples, channels, spatial = 1370, 1000, 56 * 56
    shape = (samples, spatial, channels) if channels_last else (samples, channels, spatial)
    run = PASSES[which](gpu_kernel, torch.empty(shape, dtype=torch.float16, device="cuda"), channels_last)
    assert run.x.numel() > 2**32
    assert run()
    torch.cuda.synchronize()
    assert not any(run.written[0][start : start + 100].isnan().any() for start in range(0, samples, 100))
    for sample in (0, 684, 685, samples - 1):
        run.check([sample])
    if isinstance(run, BackwardOnTensors):
        of_parameters = run.written[1]
        assert of_parameters.isfinite().all()
        # Every element of dy goes to beta or to tau.
        total = torch.zeros(channels, dtype=torch.float64, device="cuda")
        for start in range(0, samples, 100):
            total += run.channels_first(run.dy[start : start + 100]).sum((0, 2), dtype=torch.float64)
        _, of_beta, of_tau, _ = of_parameters.double()
        torch.testing.assert_close(of_beta + of_tau, total, rtol=1e-3, atol=1.0)


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
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not know this device")
    assert done.returncode == 0, said[-4000:]
