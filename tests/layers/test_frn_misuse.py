"""FRN in all that people do with a layer in training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from deploynorm.layers import FRN2d

pytestmark = pytest.mark.usefixtures("way")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), FRN2d(8), nn.Conv2d(8, 4, 3), FRN2d(4, learned_eps="layer"))
    return layers.double()


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, 9, 9, dtype=torch.float64)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_used_twice_before_the_backward_pass() -> None:
    """A head that all levels of a pyramid share, a siamese network."""
    model = network()
    both = gradients(model, model(images()).sum() + model(images() * 2 + 1).square().sum())
    one, other = gradients(model, model(images()).sum()), gradients(model, model(images() * 2 + 1).square().sum())
    torch.testing.assert_close(both, [a + b for a, b in zip(one, other, strict=True)])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model = network()
    x = images().requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close([x.grad, *(p.grad for p in model.parameters())], want)


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
    torch.testing.assert_close([p.grad for p in model.parameters()], want)
