"""The CUDA kernels of the backward pass on a GPU: what tests/plugins/test_cuda_backward.py asks of the emulation, and
what only a GPU has."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import CASES, NormCase
from cuda_kernels import (
    BACKWARD_LAYOUTS,
    CHANNELS,
    SPATIAL,
    VARIANTS,
    BackwardCall,
    CudaKernel,
    Layout,
    check_backward,
    check_ties,
    sized,
)
from torch import Tensor

from deploynorm.contract import DTYPES
from deploynorm.layers import _handwritten


@pytest.mark.parametrize("layout", BACKWARD_LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case: NormCase, layout: Layout, kernel: CudaKernel) -> None:
    assert check_backward(kernel, case, (None, *VARIANTS), layout=layout) > 1
    assert check_backward(kernel, case, layout=layout, in_place=True) == 1


@pytest.mark.parametrize("layout", BACKWARD_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_every_turn(dtype: str, layout: Layout, kernel: CudaKernel) -> None:
    sizes = [(2, 3, spatial) for spatial in SPATIAL] + [(1, channels, 5) for channels in CHANNELS]
    for size in sizes:
        assert check_backward(kernel, sized(dtype, *size), (None, *VARIANTS), layout=layout) > 1


@pytest.mark.parametrize("samples", [3, 4, 5, 127, 129, 5000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_over_the_samples(dtype: str, samples: int, kernel: CudaKernel) -> None:
    for channels in (1, 8, 17):
        assert check_backward(kernel, sized(dtype, samples, channels, 2)) == 1


@pytest.mark.parametrize("shifts", [(1, 1, 1), (3, 3, 3), (1, 0, 0), (0, 1, 0), (0, 0, 1), (5, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_begin_off_16_bytes(dtype: str, shifts: tuple[int, int, int], kernel: CudaKernel) -> None:
    for layout, spatial in product(BACKWARD_LAYOUTS, (1, 5, 49, 1025)):
        assert check_backward(kernel, sized(dtype, 2, 8, spatial), (None, *VARIANTS), layout=layout, shifts=shifts)


@pytest.mark.parametrize("layout", BACKWARD_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_its_threshold_an_element_is_where_the_forward_pass_had_it(
    dtype: str, layout: Layout, kernel: CudaKernel
) -> None:
    check_ties(kernel, dtype, (None, *VARIANTS), layout=layout)


class OnTensors:
    """The kernel on torch's tensors: dy, x and dx (N, C, L) contiguous, or (N, L, C) with channels_last."""

    def __init__(self, kernel: CudaKernel, x: Tensor, channels_last: bool = False) -> None:
        self.kernel, self.channels_last, self.x = kernel, channels_last, x
        self.dy, self.dx = torch.empty_like(x), torch.full_like(x, float("nan"))
        samples, channels, spatial = (x.shape[0], *(reversed(x.shape[1:]) if channels_last else x.shape[1:]))
        generator = torch.Generator("cuda").manual_seed(0)
        self.gamma, self.beta, self.tau, self.eps = (
            torch.rand(channels, device="cuda", generator=generator) + offset for offset in (0.5, -0.5, -1.0, 1e-3)
        )
        self.rstd = torch.empty(samples, channels, device="cuda")
        self.of_parameters = torch.full((4, channels), float("nan"), device="cuda")  # gamma, beta, tau, eps
        self.draw()
        tensors = (self.dy, x, self.rstd, self.gamma, self.beta, self.tau, self.dx, *self.of_parameters)
        kind = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}[x.dtype]
        lanes = channels if channels_last else 1
        self.call = BackwardCall(samples, channels, spatial, lanes, kind, *(each.data_ptr() for each in tensors))
        size = kernel.workspace_bytes(self.call)
        self.workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")

    def channels_first(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if self.channels_last else tensor

    def draw(self) -> None:
        """New values of x and dy, a few samples at a time: they may be large."""
        column = (1, -1, 1)
        for start in range(0, len(self.x), 100):
            part = slice(start, start + 100)
            self.x[part].normal_()
            self.dy[part].normal_()
            x, dy = self.channels_first(self.x[part]), self.channels_first(self.dy[part])
            mean = torch.stack([each.float().square().mean(1) for each in x])
            self.rstd[part] = torch.rsqrt(mean + self.eps)
            # Where y is near to tau, rounding decides which of the two has the gradient.
            y = (self.gamma * self.rstd[part]).unsqueeze(2) * x + self.beta.view(column)
            dy.masked_fill_((y - self.tau.view(column)).abs() < 1e-5, 0)

    def __call__(self, variant: str | None = None) -> bool:
        """Enqueues on torch's current stream; whether the variant takes these sizes."""
        stream = torch.cuda.current_stream().cuda_stream
        code = self.kernel.call(self.call, workspace=self.workspace.data_ptr(), stream=stream, variant=variant)
        assert code in (0, 1), f"CUDA error {code}"
        return code == 0

    def check(self, samples: list[int] | None = None) -> None:
        """Against plain PyTorch in float64: dx of some samples, and if these are all, the parameters' gradients."""
        part = slice(None) if samples is None else samples
        dy, x = (self.channels_first(each[part]).double() for each in (self.dy, self.x))
        parameters = [each.double() for each in (self.gamma, self.beta, self.tau)]
        dx, *others = _handwritten.backward(dy, x, self.rstd[part].double(), *parameters)
        got = self.channels_first(self.dx[part]).double()
        tolerance = 1e-5 if self.x.dtype == torch.float32 else 1e-3
        torch.testing.assert_close(got, dx, rtol=tolerance, atol=tolerance)
        if samples is None:
            size = (self.dy.numel() / len(self.gamma)) ** 0.5  # of a sum of as many random numbers
            for mine, right in zip(self.of_parameters.double(), others, strict=True):
                torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4 * size)


SIZES = {"packed": (64, 256, 49), "registers": (16, 64, 3136), "two_passes": (8, 64, 150528), "split": (1, 3, 1048576)}


def on_random(kernel: CudaKernel, variant: str, channels_last: bool) -> OnTensors:
    samples, channels, spatial = SIZES[variant]
    if channels_last and variant == "registers":
        spatial = 784
    shape = (samples, spatial, channels) if channels_last else (samples, channels, spatial)
    run = OnTensors(kernel, torch.empty(shape, device="cuda"), channels_last)
    if not run(variant):
        pytest.skip(f"{variant} does not take {shape}")
    return run


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thousand_runs_give_the_same_bits(variant: str, channels_last: bool, kernel: CudaKernel) -> None:
    """A race would show as a difference between runs: a device fills and empties in another order each time."""
    run = on_random(kernel, variant, channels_last)
    run.check()
    first, first_of_parameters = run.dx.clone(), run.of_parameters.clone()
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000 if run.x.numel() < 10**7 else 100):
        for each in (run.dx, run.of_parameters):
            each.fill_(float("nan"))
        run.workspace.fill_(0xFF)
        run(variant)
        differences += (run.dx != first).sum() + (run.of_parameters != first_of_parameters).sum()
    assert differences.item() == 0


def test_it_runs_on_the_callers_stream(kernel: CudaKernel) -> None:
    """Behind the work that is on it, and not beside it: x is written long after the call."""
    run = OnTensors(kernel, torch.zeros(64, 64, 3136, device="cuda"))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        run.draw()
        run()
    stream.synchronize()
    run.check()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cuda_graph_captures_and_replays_it(variant: str, channels_last: bool, kernel: CudaKernel) -> None:
    run = on_random(kernel, variant, channels_last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(variant)
    for _ in range(3):
        run.draw()
        for each in (run.dx, run.of_parameters):
            each.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        run.check()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_a_tensor_of_more_than_2_to_the_32_elements(channels_last: bool, kernel: CudaKernel) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    samples, channels, spatial = 1370, 1000, 56 * 56
    shape = (samples, spatial, channels) if channels_last else (samples, channels, spatial)
    run = OnTensors(kernel, torch.empty(shape, dtype=torch.float16, device="cuda"), channels_last)
    assert run.x.numel() > 2**32
    assert run()
    torch.cuda.synchronize()
    assert not any(run.dx[start : start + 100].isnan().any() for start in range(0, samples, 100))
    for sample in (0, 684, 685, samples - 1):
        run.check([sample])
    assert run.of_parameters.isfinite().all()
    # Every element of dy goes to beta or to tau.
    total = torch.zeros(channels, dtype=torch.float64, device="cuda")
    for start in range(0, samples, 100):
        total += run.channels_first(run.dy[start : start + 100]).sum((0, 2), dtype=torch.float64)
    _, of_beta, of_tau, _ = run.of_parameters.double()
    torch.testing.assert_close(of_beta + of_tau, total, rtol=1e-3, atol=1.0)
