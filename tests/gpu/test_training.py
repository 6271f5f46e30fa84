"""Layers that train on a GPU: FRN through autograd, on our kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploynorm.errors import BackendError
from deploynorm.layers import FRN2d, _handwritten, _native
from deploynorm.layers._composed import composed

pytestmark = pytest.mark.usefixtures("native")

DTYPES = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""dtype -> the largest error that its rounding explains, relative to the largest value."""

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [(2, 64, 56, 56), (3, 24, 7, 7), (5, 16, 1, 1), (2, 13, 31, 3), (1, 3, 300, 300), (0, 8, 4, 4), (2, 8, 0, 4)]


def make_layer(channels: int, dtype: torch.dtype = torch.float32) -> FRN2d:
    layer = FRN2d(channels, learned_eps="channel").to("cuda", dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1, generator=generator)
    return layer


def draw(shape: tuple[int, ...], dtype: str, layout: str = "nchw") -> Tensor:
    """A leaf that requires a gradient."""
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(shape, device="cuda", generator=generator).to(getattr(torch, dtype))
    return x.contiguous(memory_format=FORMATS[layout]).requires_grad_()


def leaves(layer: FRN2d, x: Tensor) -> list[Tensor]:
    return [x, *layer.parameters()]


def definition(layer: FRN2d, x: Tensor) -> Tensor:
    """The layer in float64, by autograd."""
    assert layer.eps_l is not None
    return composed(x, layer.weight, layer.bias, layer.tau, layer.eps + layer.eps_l.abs())


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def check(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for mine, right in zip(got, want, strict=True):
        assert mine.shape == right.shape
        assert largest(mine.double() - right) <= tolerance * largest(right)


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes in plain PyTorch would hide that the kernels were not called."""

    def fail(*_: object) -> Any:
        raise AssertionError("not on our kernels")

    monkeypatch.setattr(_handwritten, "forward", fail)
    monkeypatch.setattr(_handwritten, "backward", fail)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: str, layout: str, shape: tuple[int, ...]) -> None:
    layer, x = make_layer(shape[1], torch.float64 if dtype == "float64" else torch.float32), draw(shape, dtype, layout)
    y = layer(x)
    # What is near to the threshold may be on either side of it, so that neither side has a gradient there.
    wide, x64 = make_layer(shape[1], torch.float64), x.detach().double().requires_grad_()
    wide.load_state_dict(layer.state_dict())
    right = definition(wide, x64)
    tau = layer.tau.detach().double().reshape(1, -1, 1, 1)  # type: ignore[union-attr]
    near = ((right - tau).abs() < 1e-4) & (right != tau)
    dy = torch.randn(shape, device="cuda").to(x.dtype).masked_fill(near, 0)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=FORMATS[layout])
    check([y, *torch.autograd.grad(y, leaves(layer, x), dy)],
          [right, *torch.autograd.grad(right, leaves(wide, x64), dy.double())], DTYPES[dtype])  # fmt: skip


@pytest.mark.parametrize("layout", FORMATS)
def test_gradcheck(layout: str) -> None:
    layer, x = make_layer(6, torch.float64), draw((3, 6, 4, 5), "float64", layout)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), leaves(layer, x))
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), leaves(layer, x))


def test_only_x_and_one_scalar_per_sample_and_channel_are_saved() -> None:
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> None:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    layer, x = make_layer(64), draw((8, 64, 28, 28), "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(count, lambda _: None):
        layer(x)
    assert sum(saved.values()) <= x.nbytes + 4 * 8 * 64 + 5 * 4096


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3), make_layer(16), nn.Conv2d(16, 4, 1)).cuda()
    x = draw((2, 3, 20, 20), "float32")
    with torch.autocast("cuda", dtype):
        y = network(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


def test_a_gradient_of_another_layout_is_taken() -> None:
    layer, x = make_layer(16), draw((2, 16, 9, 9), "float32")
    y = layer(x)
    dy = torch.randn_like(y)
    want = torch.autograd.grad(y, leaves(layer, x), dy, retain_graph=True)
    for other in (dy.contiguous(memory_format=torch.channels_last), torch.randn(2, 16, 9, 18, device="cuda")[..., ::2]):
        other.copy_(dy)
        got = torch.autograd.grad(y, leaves(layer, x), other, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_on_another_stream() -> None:
    layer, x = make_layer(64), draw((32, 64, 56, 56), "float32")
    y = layer(x)
    want = torch.autograd.grad(y, leaves(layer, x), torch.ones_like(y))
    del y  # a graph that is alive ties the parameters to its stream
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x).requires_grad_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.data.copy_(x.detach())
        y = layer(late)
        got = torch.autograd.grad(y, leaves(layer, late), torch.ones_like(y))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", FORMATS)
def test_a_cuda_graph_captures_a_step(layout: str) -> None:
    layer, x = make_layer(64), draw((4, 64, 28, 28), "float32", layout)
    dy = torch.randn_like(x)

    def step() -> list[Tensor]:
        y = layer(x)
        # detach: a graph that is alive ties the parameters to its stream.
        return [y.detach(), *torch.autograd.grad(y, leaves(layer, x), dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        x.data.normal_()
        dy.normal_()
        graph.replay()
        got = [each.clone() for each in captured]
        assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler, by itself
@pytest.mark.parametrize("layout", FORMATS)
def test_compiled_it_is_the_same(layout: str) -> None:
    layer, x = make_layer(64), draw((4, 64, 28, 28), "float32", layout)
    y = layer(x)
    dy = torch.randn_like(y)
    want = [y, *torch.autograd.grad(y, leaves(layer, x), dy)]
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True)(x)
    check([y, *torch.autograd.grad(y, leaves(layer, x), dy)], [each.double() for each in want], 1e-6)
    torch._dynamo.reset()


def test_a_refusal_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _native.LIBRARY is not None
    monkeypatch.setattr(_native.LIBRARY.functions, "deploynorm_frn_cuda", lambda *_: 700)
    with pytest.raises(BackendError, match="code 700"):
        make_layer(4)(draw((1, 4, 5, 5), "float32"))
