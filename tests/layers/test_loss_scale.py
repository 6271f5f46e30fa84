"""A scaler that changes its scale, against a run whose loss is not scaled."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mabn_steps import SHORT, C, batches
from tolerances import EXACT, FLOAT64
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.amp import GradScaler

from deploynorm.errors import BackendError, InputError
from deploynorm.layers import CenConv2d, MABN2d
from deploynorm.layers.loss_scale import track_loss_scale

STEPS = 24


def new_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [MABN2d(C, **SHORT) for _ in range(2)]
    return nn.Sequential(norms[0], CenConv2d(C, C, 3), norms[1], nn.Flatten(), nn.Linear(4 * C, 1)).to(dtype)


def data(steps: int = STEPS) -> list[Tensor]:
    return [x for x, _ in batches(steps, (4, 4), range(2, 4), scaled=False)]


def loss_of(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (net(x) - 1).square().mean()


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def growing() -> GradScaler:
    """Doubles its scale every third step, and halves it where a gradient is not finite."""
    return GradScaler("cpu", init_scale=2.0**10, growth_interval=3)


def train(net: nn.Module, scaler: GradScaler, accumulate: int = 1) -> tuple[list[Tensor], set[float]]:
    """All unscaled gradients of all steps, and the scales that were used."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    found, scales = [], set()
    for step, x in enumerate(data()):
        scales.add(scaler.get_scale())
        scaler.scale(loss_of(net, x) / accumulate).backward()
        if (step + 1) % accumulate == 0:
            scaler.unscale_(optimizer)
            found += gradients(net)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return found, scales


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_scale_that_grows_changes_no_gradient(accumulate: int) -> None:
    net, scaler = new_net(), growing()
    plain = copy.deepcopy(net)
    track_loss_scale(net, scaler)
    got, scales = train(net, scaler, accumulate)
    want, _ = train(plain, GradScaler("cpu", enabled=False), accumulate)
    # Scales are powers of 2, so not even a rounding differs.
    torch.testing.assert_close(got, want, **EXACT.kwargs())
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), **EXACT.kwargs())
    assert len(scales) == STEPS // accumulate // 3


def test_without_knowing_the_scaler_the_gradients_are_off() -> None:
    net = new_net()
    plain = copy.deepcopy(net)
    got, _ = train(net, growing())
    want, _ = train(plain, GradScaler("cpu", enabled=False))
    off = [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
    assert max(off) > 0.01


@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be instantiated")  # by dynamo
def test_a_compiled_step_follows_the_scale_without_being_compiled_again() -> None:
    net, scaler = new_net(), growing()
    track_loss_scale(net, scaler)
    plain, counter = copy.deepcopy(net), CompileCounterWithBackend("aot_eager")
    track_loss_scale(plain, None)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for x in data()[:14]:
        x = x[:2]
        for module, call in ((net, compiled), (plain, plain)):
            module.zero_grad()
            loss = loss_of(call, x)
            (scaler.scale(loss) if module is net else loss).backward()
        got = [gradient / scaler.get_scale() for gradient in gradients(net)]
        torch.testing.assert_close(got, gradients(plain), **FLOAT64.kwargs())
        scaler.update(scaler.get_scale() * 2)
    assert counter.frame_count == 1


def test_a_skipped_step_leaves_its_psi_out_and_the_next_is_right() -> None:
    net, scaler = new_net(torch.float32), GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-110)
    track_loss_scale(net, scaler)
    plain = copy.deepcopy(net)
    track_loss_scale(plain, None)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    weights = copy.deepcopy(list(net.parameters()))
    for step, x in enumerate(data()):
        x = x.float()
        if step == 12:
            scaler.update(2.0**127)
        before = net[2].recent_gz.clone()
        scaler.scale(1e6 * loss_of(net, x)).backward()
        scaler.step(optimizer)
        skipped = scaler._found_inf_per_device(optimizer)[x.device].item() == 1
        assert skipped == (step in (0, 12))
        scaler.update()
        if skipped:
            assert torch.equal(net[2].recent_gz, before)
            torch.testing.assert_close(list(net.parameters()), weights, **EXACT.kwargs())
            plain(x)
        else:
            (1e6 * loss_of(plain, x)).backward()
            torch.testing.assert_close(gradients(net), gradients(plain), **EXACT.kwargs())
        for module in (net, plain):
            module.zero_grad()
        with torch.no_grad():  # both go on from the same weights
            for p, w in zip(net.parameters(), weights, strict=True):
                p.copy_(w)


def test_half_precision_training_with_a_scaler_stays_finite() -> None:
    net, scaler = new_net(torch.float32), GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    track_loss_scale(net, scaler)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scales = []
    for x in data(60):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(net, x.float())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert any(b < a for a, b in itertools.pairwise(scales)), "some step must have overflowed"
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_a_run_goes_on_with_another_scale_or_none_from_its_checkpoint() -> None:
    net, scaler = new_net(), growing()
    track_loss_scale(net, scaler)
    for x in data()[:12]:
        scaler.scale(loss_of(net, x)).backward()
    state, scaler_state = copy.deepcopy(net.state_dict()), scaler.state_dict()
    results = []
    for resumed_scaler in (growing(), GradScaler("cpu", init_scale=4.0), GradScaler("cpu", enabled=False)):
        resumed = new_net()
        track_loss_scale(resumed, resumed_scaler)
        resumed.load_state_dict(state)
        if not results:
            resumed_scaler.load_state_dict(scaler_state)  # after track_loss_scale
        resumed_scaler.scale(loss_of(resumed, data()[12])).backward()
        results.append([g / resumed_scaler.get_scale() for g in gradients(resumed)])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, **EXACT.kwargs())


def test_a_copy_follows_the_same_scaler_and_a_pickle_none() -> None:
    net, scaler = new_net(), growing()
    track_loss_scale(net, scaler)
    assert copy.deepcopy(net)[0]._loss_scale is scaler._scale
    assert pickle.loads(pickle.dumps(net))[0]._loss_scale is None


def test_a_scaler_keeps_its_scale_and_one_that_is_off_or_none_is_no_scale() -> None:
    net, scaler = new_net(), GradScaler("cpu", init_scale=2.0**7)
    track_loss_scale(net, scaler)
    assert scaler.get_scale() == 2.0**7
    for none in (None, GradScaler("cpu", enabled=False)):
        track_loss_scale(net, none)
        assert [layer._loss_scale for layer in net if isinstance(layer, MABN2d)] == [None, None]


def test_what_cannot_be_tracked_is_refused() -> None:
    with pytest.raises(InputError, match=r"^track_loss_scale: the model has no MABN\. Got ReLU"):
        track_loss_scale(nn.ReLU(), growing())
    with pytest.raises(InputError, match=r"^track_loss_scale: the model is on another kind of device.* on meta.* cpu"):
        track_loss_scale(MABN2d(C, device="meta"), growing())


def test_another_kind_of_scaler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaler(GradScaler):
        def scale(self, outputs: Any) -> Any:
            self._factor = math.pi
            return outputs

    with pytest.raises(BackendError, match=r"^track_loss_scale: .* has no GradScaler\._scale"):
        track_loss_scale(MABN2d(C), Scaler("cpu"))
