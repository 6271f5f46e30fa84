"""MABN on a GPU: the CPU's numbers, and a host that never waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from mabn_steps import SHORT, C, batches, run_step, trained_affine
from tolerances import EXACT, FLOAT64, OP_BFLOAT16, OP_FLOAT16, OP_FLOAT32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deploynorm.layers import CenConv2d, MABN2d
from deploynorm.layers.loss_scale import track_loss_scale
from deploynorm.layers.recalibration import recalibrate

DEVICE = "cuda"
TOLERANCES = {torch.float64: FLOAT64, torch.float32: OP_FLOAT32, torch.float16: OP_FLOAT16, torch.bfloat16: OP_BFLOAT16}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_training_has_the_cpus_numbers(dtype: torch.dtype, layout: torch.memory_format) -> None:
    layer = trained_affine(MABN2d(C, **{**SHORT, "dtype": dtype})).to(DEVICE)
    exact = trained_affine(MABN2d(C, **SHORT))
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    for x, dy in batches(14, (9, 7), range(1, 5), scaled=False):
        x, dy = x.to(dtype), dy.to(dtype)
        got = run_step(layer, *(t.to(DEVICE, memory_format=layout) for t in (x, dy)))
        assert got[1].is_contiguous(memory_format=layout) or len(x) == 1
        for a, b in zip(got, run_step(exact, x.double(), dy.double()), strict=True):
            torch.testing.assert_close(a.cpu().double(), b, **TOLERANCES[dtype].kwargs())
    torch.testing.assert_close(
        layer.running_var.cpu().double(),
        exact.running_var,
        **(FLOAT64 if dtype == torch.float64 else OP_FLOAT32).kwargs(),
    )


def test_a_large_batch_has_the_cpus_numbers() -> None:
    layer = MABN2d(64, warmup=1, renorm_start=2).to(DEVICE)
    exact = MABN2d(64, warmup=1, renorm_start=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        x, dy = (torch.randn(32, 64, 56, 56, generator=generator) for _ in range(2))
        expected = run_step(exact, x.double(), dy.double())
        for a, b in zip(run_step(layer, x.to(DEVICE), dy.to(DEVICE)), expected, strict=True):
            # The sums for weight and bias are over 100352 values of size 1, which cancel.
            torch.testing.assert_close(a.cpu().double(), b, rtol=OP_FLOAT32.rtol, atol=1e-4 * float(b.abs().max()))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within, whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_seen() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        torch.ones((), device=DEVICE).item()


@pytest.mark.parametrize("again", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_step_makes_the_host_wait(dtype: torch.dtype, again: bool | None) -> None:
    net = nn.Sequential(CenConv2d(C, C, 1), MABN2d(C, warmup=3, renorm_start=4), nn.ReLU()).to(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE)
    track_loss_scale(net, scaler)
    x = torch.randn(2, C, 16, 16, device=DEVICE)
    spoiled = torch.full_like(x, torch.inf)
    for step in range(8):
        leaf = (spoiled if step == 5 else x).clone().requires_grad_()
        with no_waiting(), torch.autocast(DEVICE, dtype=dtype, enabled=dtype == torch.float16):
            y = net(leaf) if again is None else checkpoint(net, leaf, use_reentrant=again, preserve_rng_state=False)
            loss = scaler.scale(y.float().square().mean())
            loss.backward()
    assert net[1].num_batches_tracked == 7
    with pytest.warns(UserWarning, match="1 batches"):
        net.eval()


def test_a_scale_that_changes_changes_no_gradient() -> None:
    net = trained_affine(MABN2d(C, **SHORT)).to(DEVICE)
    plain = copy.deepcopy(net)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    track_loss_scale(net, scaler)
    for x, dy in batches(14, (4, 4), range(2, 4)):
        x, dy = x.to(DEVICE), dy.to(DEVICE)
        got = run_step(net, x, dy * scaler.get_scale())
        for a, b in zip(got[1:], run_step(plain, x, dy)[1:], strict=True):
            torch.testing.assert_close(a / scaler.get_scale(), b, **EXACT.kwargs())
        scaler.update(scaler.get_scale() * 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # by the compiler
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointed"])
def test_a_compiled_step_trains_as_an_eager_one(again: bool, mode: str, require: Callable[[str], None]) -> None:
    require("compiler")
    net = nn.Sequential(*(trained_affine(MABN2d(C, **SHORT)) for _ in range(2))).to(DEVICE)
    plain = copy.deepcopy(net)

    def call(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(net, x, use_reentrant=False) if again else net(x)
        return out

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, mode=mode)
    for x, dy in batches(14, (4, 4), range(2, 3)):
        x, dy = x.to(DEVICE), dy.to(DEVICE)
        leaf, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(leaf).backward(dy)
        plain(expected).backward(dy)
        torch.testing.assert_close(leaf.grad, expected.grad, **FLOAT64.kwargs())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, **FLOAT64.kwargs(), msg=name)


def test_deterministic_mode_repeats_every_bit() -> None:
    layers = [trained_affine(MABN2d(C, **SHORT)).to(DEVICE) for _ in range(2)]
    torch.use_deterministic_algorithms(True)
    try:
        for x, dy in batches(12, (8, 8), range(2, 4)):
            results = [run_step(layer, x.to(DEVICE), dy.to(DEVICE)) for layer in layers]
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_recalibration_moves_batches_to_the_model() -> None:
    layer = MABN2d(C).to(DEVICE)
    x = torch.randn(8, C, 6, 6)
    recalibrate(layer, x.split(2))
    expected = x.double().square().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_var.cpu().double(), expected, **OP_FLOAT32.kwargs())
