"""FRN in all that people do with a layer in training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from deploynorm.layers import FRN2d, _native


@pytest.fixture(params=["native", "plain"], autouse=True)
def way(request: pytest.FixtureRequest, require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native":
        require("native")
    else:
        monkeypatch.setattr(_native, "LIBRARY", None)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), FRN2d(8), nn.Conv2d(8, 4, 3), FRN2d(4, learned_eps="layer"))
    return layers.double()


def images(*sizes: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*(sizes or (4, 3, 9, 9)), dtype=torch.float64)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right)


def test_used_twice_before_the_backward_pass() -> None:
    """A head that all levels of a pyramid share, a siamese network."""
    model = network()
    both = gradients(model, model(images()).sum() + model(images() * 2 + 1).square().sum())
    one, other = gradients(model, model(images()).sum()), gradients(model, model(images() * 2 + 1).square().sum())
    assert_same(both, [a + b for a, b in zip(one, other, strict=True)])


def test_an_empty_batch() -> None:
    """An image without a region of interest."""
    model = network()
    assert model(images()[:0]).shape == (0, 4, 5, 5)
    assert all(not g.any() for g in gradients(model, model(images()[:0]).sum()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_infinity_spoils_its_own_plane_alone(dtype: torch.dtype) -> None:
    layer = FRN2d(3)
    clean = torch.randn(2, 3, 4, 5).to(dtype)
    spoilt = clean.clone()
    spoilt[0, 1, 2, 3] = torch.inf
    results = []
    for x in (clean, spoilt):
        x = x.requires_grad_()
        y = layer(x)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), x.grad))
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    for right, got in zip(*results, strict=True):
        assert torch.equal(got[others], right[others])
    assert results[1][0][0, 1].isnan().any(), "the overflow must be seen, so that a GradScaler skips the step"


def test_batches_and_images_of_changing_sizes() -> None:
    model = network()
    for sizes in [(4, 3, 9, 9), (1, 3, 9, 9), (3, 3, 20, 11), (2, 3, 5, 5)]:
        x = images(*sizes)
        each = torch.cat([model(one[None]) for one in x])
        torch.testing.assert_close(model(x), each)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model = network()
    x = images().requires_grad_()
    want = [*torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])]
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert x.grad is not None
    assert_same([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)], want)


def test_a_copy_in_the_middle_of_training_trains_like_the_original() -> None:
    def train(model: nn.Module) -> None:
        model.zero_grad()
        model(images()).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()

    model = network()
    train(model)
    other = copy.deepcopy(model)
    before = other(images()).detach()
    train(model)
    torch.testing.assert_close(other(images()), before)
    train(other)
    assert torch.equal(model(images()), other(images()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_cast_to_half_trains(dtype: torch.dtype) -> None:
    layer = FRN2d(3, learned_eps="channel").to(dtype)
    x = (torch.randn(2, 3, 4, 5) * 300).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == dtype
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
        assert tensor.grad.isfinite().all()


def test_a_channels_last_network_stays_so_in_both_directions() -> None:
    model = network()
    want = gradients(model, model(images()).square().sum())
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = last(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same(gradients(last, y.square().sum()), want)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_leaves_type_and_sums_to_the_layer(autocast: torch.dtype) -> None:
    model = network().float()
    x = (images() * 300).float()
    with torch.autocast("cpu", dtype=autocast):
        y = model(x)
    assert y.dtype == autocast
    y.float().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_functional_call_uses_the_parameters_that_it_is_given() -> None:
    model, other = network(), network(seed=5)
    y = torch.func.functional_call(model, dict(other.named_parameters()), (images(),))
    torch.testing.assert_close(y, other(images()))
    assert_same(gradients(other, y.sum()), gradients(other, other(images()).sum()))


def test_frozen_parameters_get_no_gradient_and_the_input_does() -> None:
    layer = FRN2d(3).requires_grad_(False)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in layer.parameters())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("find_unused_parameters", [True, False])
def test_distributed_data_parallel(find_unused_parameters: bool) -> None:
    model = network()
    want = gradients(model, model(images()).square().sum())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        parallel = DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
        for _ in range(2):
            model.zero_grad()
            parallel(images()).square().sum().backward()
    assert_same([p.grad for p in model.parameters() if p.grad is not None], want)
