"""Exact second moments: against what enters each layer, on networks whose layers depend on each other."""

from __future__ import annotations

import copy
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mabn_steps import SHORT, C, batches
from tolerances import EXACT, FLOAT64, FOLD_FLOAT32
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from deploynorm.errors import InputError, ModelError
from deploynorm.layers import MABN1d, MABN2d
from deploynorm.layers.freeze import freeze_mabn
from deploynorm.layers.recalibration import recalibrate


class Net(nn.Module):
    """Layers defined in another order than they run in, a residual sum, one of two MABN on each branch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = MABN1d(C, **SHORT)
        self.norm2, self.shortcut, self.norm1 = (MABN2d(C, **SHORT) for _ in range(3))
        self.conv1, self.conv2, self.side = (nn.Conv2d(C, C, 3, padding=1, dtype=torch.float64) for _ in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        out: Tensor = self.last(self.drop(y + self.shortcut(self.side(x))).mean((2, 3)))
        return out


ORDER = ["norm1", "norm2", "shortcut", "last"]


def trained_net(steps: int = 12) -> Net:
    net = Net()
    for x, _ in batches(steps, (4, 4), range(2, 5), scaled=False):
        net(x).square().sum().backward()
    return net


def images() -> Tensor:
    return torch.randn(14, C, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 + 1


def entering(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The second moment of what enters each MABN in evaluation, all samples at once."""
    twin, found = copy.deepcopy(net).eval(), {}
    for name, layer in twin.named_modules():
        if isinstance(layer, MABN1d | MABN2d):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: found.update({name: args[0].square().mean([0, *range(2, args[0].dim())])})
            )
    with torch.no_grad():
        twin(x)
    return found


def assert_exact(net: nn.Module, x: Tensor) -> None:
    for name, moment in entering(net, x).items():
        torch.testing.assert_close(net.get_submodule(name).running_var, moment, **FLOAT64.kwargs(), msg=name)


@pytest.mark.parametrize("sizes", [[14], [2] * 7, [1, 6, 3, 4]], ids=str)
@pytest.mark.parametrize("steps", [0, 12], ids=["untrained", "trained"])
def test_each_layer_holds_the_second_moment_of_its_input_whatever_the_batch_size(sizes: list[int], steps: int) -> None:
    net, x = trained_net(steps), images()
    before = copy.deepcopy(net.state_dict())
    moved = recalibrate(net, x.split(sizes))
    assert_exact(net, x)
    assert list(moved) == ORDER
    for name, change in moved.items():
        old, new = before[f"{name}.running_var"], net.get_submodule(name).running_var
        assert change == pytest.approx(float((new / old - 1).abs().max()))
    assert max(recalibrate(net, [x]).values()) < 1e-9


def test_nothing_but_the_running_second_moments_changes() -> None:
    net = trained_net()
    net.norm2.eval()
    net.drop.train()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    rng = torch.get_rng_state()
    recalibrate(net, [images()])
    assert {n for n, v in net.state_dict().items() if not torch.equal(v, before[n])} == {
        f"{name}.running_var" for name in ORDER
    }
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, net.parameters(), strict=False))
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert torch.is_grad_enabled()


def test_training_goes_on_from_an_untrained_network_that_was_recalibrated() -> None:
    net = Net()
    recalibrate(net, [images()])
    before = net.norm1.running_var.clone()
    x = images()[:2]
    moment = net.conv1(x).square().mean((0, 2, 3)).detach()
    net(x)
    torch.testing.assert_close(net.norm1.running_var, before.lerp(moment, net.norm1.momentum), **FLOAT64.kwargs())


class Endless:
    def __iter__(self) -> Iterator[Tensor]:
        return itertools.repeat(images())


def test_the_number_of_batches_can_be_bounded() -> None:
    net, x = trained_net(), images()
    recalibrate(net, x.split(2), batches=3)
    assert_exact(net, x[:6])
    recalibrate(net, Endless(), batches=2)
    assert_exact(net, images())
    with pytest.raises(InputError, match=r"^recalibrate: batches must be positive\. Got 0"):
        recalibrate(net, x.split(2), batches=0)


LOADERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[nn.Module, Any], object] | None]] = {
    "tensors": (lambda x: list(x.split(4)), None),
    "dataloader": (lambda x: DataLoader(TensorDataset(x, torch.arange(len(x))), batch_size=4), None),
    "lists": (lambda x: [[part, {"label": 1}] for part in x.split(4)], None),
    "dicts": (lambda x: [{"x": part} for part in x.split(4)], None),
    "own_forward": (lambda x: [("name", part) for part in x.split(4)], lambda model, batch: model(batch[1])),
}


@pytest.mark.parametrize("name", LOADERS)
def test_batches_of_each_common_kind(name: str) -> None:
    make, forward = LOADERS[name]
    net, x = trained_net(), images()
    recalibrate(net, make(x), forward=forward)
    assert_exact(net, x)


class Failing:
    """A loader that fails in its second pass."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.passes = error, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield images()
        if self.passes == 3:
            raise self.error


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()], ids=["error", "ctrl_c"])
def test_a_failure_half_way_changes_nothing(error: BaseException) -> None:
    net, loader = trained_net(), Failing(error)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    with pytest.raises(type(error)):
        recalibrate(net, loader)
    assert loader.passes == 3, "the first layer was set by then"
    torch.testing.assert_close(net.state_dict(), before, **EXACT.kwargs())
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_pre_hooks for m in net.modules())
    recalibrate(net, [images()])
    assert_exact(net, images())


def test_a_layer_used_several_times_has_the_second_moment_of_all_its_inputs() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = MABN2d(C, **SHORT), MABN2d(C, **SHORT)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.norm(x) + self.norm(3 * x[:1]))
            return out

    net, x = Shared(), images()
    recalibrate(net, [x])
    squares = torch.cat([x, 3 * x[:1]]).square().mean((0, 2, 3))
    torch.testing.assert_close(net.norm.running_var, squares, **FLOAT64.kwargs())
    torch.testing.assert_close(net.last.running_var, entering(net, x)["last"], **FLOAT64.kwargs())


def test_a_layer_that_is_not_reached_is_warned_of_and_unchanged() -> None:
    net = trained_net()
    net.auxiliary = MABN2d(C, **SHORT)
    net.auxiliary.running_var.fill_(5)
    with pytest.warns(UserWarning, match=r"^recalibrate: never reached in evaluation, and unchanged: auxiliary$"):
        moved = recalibrate(net, [images()])
    assert list(moved) == ORDER
    assert net.auxiliary.running_var.tolist() == [5] * C


def test_float32_sums_keep_their_digits_over_many_batches() -> None:
    layer = MABN2d(C)
    x = torch.randn(400, C, 8, 8) * torch.tensor([1e-3, 1.0, 1e3]).reshape(C, 1, 1)
    recalibrate(layer, x.split(1))
    expected = x.double().square().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_var.double(), expected, **FOLD_FLOAT32.kwargs())
    assert layer.running_var.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be instantiated")  # by dynamo
def test_a_compiled_network_is_recalibrated_as_if_it_were_not() -> None:
    net, x = trained_net(), images()
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    recalibrate(compiled, [x])
    assert_exact(net, x)
    torch.testing.assert_close(compiled.eval()(x), net.eval()(x), **FLOAT64.kwargs())


class Two(Net):
    """A network of two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


def frozen() -> nn.Module:
    net = Net()
    freeze_mabn(net)
    return net


ERRORS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "no_mabn": (nn.ReLU, [images()], r"the model has no MABN that is not frozen\. Got ReLU"),
    "all_frozen": (frozen, [images()], r"the model has no MABN that is not frozen\. Got Net"),
    "once": (Net, iter([images()]), r"can be iterated only once\. Got list_iterator.*give a DataLoader, or"),
    "generator": (Net, (x for x in [images()]), r"can be iterated only once\. Got generator"),
    "empty": (Net, [], r"the loader is empty\. Got list"),
    "strings": (Net, ["image.png"], r"called with a batch of the loader\. Got str; expected a tensor"),
    "two_inputs": (
        Two,
        [(images(), images())],
        r"missing 1 required positional argument: 'y'\. Got tuple of Tensor \(14, 3, 4, 4\), Tensor \(14, 3, 4, 4\); "
        r".*pass forward=, for example forward=lambda model, batch: model\(\*batch\)",
    ),
    "nested": (
        lambda: MABN2d(C),
        [([images()], 3)],
        r"called with a batch of the loader: .*\. Got tuple of list of Tensor \(14, 3, 4, 4\), int; .*forward=",
    ),
    "other_keys": (Net, [{"image": images()}], r"'image'\. Got dict of image: Tensor .*forward="),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_it_cannot_work_with_is_refused(name: str) -> None:
    network, loader, message = ERRORS[name]
    with pytest.raises(InputError, match=f"^recalibrate: .*{message}"):
        recalibrate(network(), loader)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_reported_with_the_layer_that_they_reach(bad: float) -> None:
    net, x = trained_net(), images()
    before = copy.deepcopy(net.state_dict())
    x[3, 0, 0, 0] = bad
    with pytest.raises(ModelError, match=r"^recalibrate: what enters norm1 is not finite\. Fix: look for values"):
        recalibrate(net, [images(), x])
    torch.testing.assert_close(net.state_dict(), before, **EXACT.kwargs())


def test_a_forward_that_runs_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^recalibrate: no MABN was reached\. Fix: give a `forward`"):
        recalibrate(Net(), [images()], forward=lambda model, batch: None)


def test_an_exception_of_the_model_comes_through_as_it_is() -> None:
    with pytest.raises(InputError, match=r"^MABN2d: wrong number of channels"):
        recalibrate(MABN2d(C + 1), [images()])


def test_away_from_a_terminal_nothing_is_shown(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes rich take any stream for a terminal
    recalibrate(Net(), [images()])
    assert capfd.readouterr() == ("", "")


def test_a_progress_bar_is_shown_on_a_terminals_stderr(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        recalibrate(MABN2d(C, **SHORT), [images()] * 3)
        monkeypatch.undo()
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how Linux ends the reading of a terminal that is closed
        pass
    finally:
        os.close(ours)
    assert capfd.readouterr() == ("", "")
    assert b"recalibrate" in shown
    assert b"6/6" in shown
