"""MABN against a literal loop over its formulas, and what else a layer with statistics owes.

The backward pass of MABN is not the gradient of its forward pass and must not be: nothing here checks it with
gradcheck after the warm-up, where the two differ. The loop below is the measure.
"""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import EXACT, FLOAT64, FOLD_FLOAT32, MABN_LOOP, OP_BFLOAT16, OP_FLOAT16, OP_FLOAT32
from torch import nn
from torch.utils.checkpoint import checkpoint

from deploynorm.layers import MABN1d, MABN2d, MABN3d
from deploynorm.layers.mabn import _MABN

Array = np.ndarray[Any, Any]
C = 3
SHORT: dict[str, Any] = {"warmup": 5, "renorm_start": 8, "moving_batch_size": 8, "dtype": torch.float64}
SPATIAL: dict[type[_MABN], list[tuple[int, ...]]] = {MABN1d: [(), (5,)], MABN2d: [(3, 2)], MABN3d: [(2, 1, 3)]}
RANKS = [(kind, spatial) for kind, shapes in SPATIAL.items() for spatial in shapes]
RANK_IDS = ["n_c", "1d", "2d", "3d"]


class Loop:
    """The docstring of MABN1d, word by word, on plain lists of all past iterations."""

    def __init__(
        self, momentum: float, moving_batch_size: int, warmup: int, renorm_start: int, max_renorm: float, eps: float
    ) -> None:
        self.momentum, self.window, self.eps = momentum, moving_batch_size, eps
        self.warmup, self.renorm_start, self.max_renorm = warmup, renorm_start, max_renorm
        self.iteration = 0
        self.R = np.ones(C)
        self.past_chi2: list[tuple[int, Array]] = []
        self.past_psi: list[tuple[int, Array]] = []
        self.clipped = {"low": 0, "high": 0, "not": 0}

    def average(self, past: list[tuple[int, Array]]) -> Array:
        samples, total = 0, np.zeros(C)
        for n, statistic in reversed(past):
            if samples and samples + n > self.window:
                break
            samples, total = samples + n, total + n * statistic
        return total / samples

    def step(self, x: Array, w: Array, b: Array, dy: Array) -> tuple[Array, Array, Array, Array]:
        """y, dx, dw and db; x is (N, C, length)."""
        self.iteration += 1
        self.past_chi2.append((len(x), (x**2).mean((0, 2))))
        warm = self.iteration <= self.warmup
        chi2 = self.past_chi2[-1][1] if warm else self.average(self.past_chi2)
        ratio = np.sqrt(chi2 + self.eps) / np.sqrt(self.R + self.eps)
        r = np.ones(C)
        if self.iteration > max(self.warmup, self.renorm_start):
            r = np.clip(ratio, 1 / self.max_renorm, self.max_renorm)
            self.clipped["low"] += int((ratio < 1 / self.max_renorm).sum())
            self.clipped["high"] += int((ratio > self.max_renorm).sum())
            self.clipped["not"] += int((r == ratio).sum())
        self.R = chi2 if self.iteration == 1 else (1 - self.momentum) * self.R + self.momentum * chi2

        root = np.sqrt(chi2 + self.eps)[None, :, None]
        w, b, r = (v[None, :, None] for v in (w, b, r))
        z = x / root
        y = w * r * z + b
        g = dy * w * r
        self.past_psi.append((len(x), (g * z).mean((0, 2))))
        psi = (self.past_psi[-1][1] if warm else self.average(self.past_psi))[None, :, None]
        dx = (g - z * psi) / root
        return y, dx, (dy * r * z).sum((0, 2)), dy.sum((0, 2))


class LoopOfIterations(Loop):
    """The authors' window: the last m iterations, whatever their size."""

    m = 4

    def average(self, past: list[tuple[int, Array]]) -> Array:
        return np.mean([statistic for _, statistic in past[-self.m :]], axis=0)


def loop_for(layer: _MABN, kind: type[Loop] = Loop) -> Loop:
    return kind(layer.momentum, layer.moving_batch_size, layer.warmup, layer.renorm_start, layer.max_renorm, layer.eps)


def trained_affine(layer: _MABN) -> _MABN:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.7, -1.3, 1.1]))
        layer.bias.copy_(torch.tensor([0.2, 0.0, -0.4]))
    return layer


def run_step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y and the gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy))


def assert_step_agrees(layer: _MABN, loop: Loop, x: torch.Tensor, dy: torch.Tensor) -> None:
    def columns(t: torch.Tensor) -> Array:
        return t.detach().double().numpy().reshape(len(t), C, -1)

    got = run_step(layer, x, dy)
    expected = loop.step(columns(x), layer.weight.detach().numpy(), layer.bias.detach().numpy(), columns(dy))
    for name, a, b in zip(("y", "dx", "dw", "db"), got, expected, strict=True):
        np.testing.assert_allclose(a.numpy().reshape(b.shape), b, **MABN_LOOP.kwargs(), err_msg=name)
    np.testing.assert_allclose(layer.running_var.numpy(), loop.R, **MABN_LOOP.kwargs())


def batches(steps: int, spatial: tuple[int, ...], sizes: range, *, scaled: bool = True) -> Any:
    """Random batches and gradients, whose scale jumps by a factor of ten every fifty steps and back."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        n = int(torch.randint(sizes.start, sizes.stop, (), generator=generator))
        scale = 10.0 if scaled and step // 50 % 2 else 1.0
        x, dy = (torch.randn(n, C, *spatial, generator=generator, dtype=torch.float64) for _ in range(2))
        yield x * scale * torch.tensor([0.1, 1.0, 3.0]).reshape(C, *(1,) * len(spatial)), dy


@pytest.mark.parametrize(("kind", "spatial"), RANKS, ids=RANK_IDS)
@pytest.mark.parametrize("resume_at", [3, 151])
def test_300_steps_of_changing_size_follow_the_formulas_and_a_resume(
    kind: type[_MABN], spatial: tuple[int, ...], resume_at: int
) -> None:
    settings = {"warmup": 20, "renorm_start": 40, "dtype": torch.float64}
    layer = trained_affine(kind(C, **settings))
    loop = loop_for(layer)
    for step, (x, dy) in enumerate(batches(300, spatial, range(1, 41))):
        if step == resume_at:
            state = copy.deepcopy(layer.state_dict())
            layer = kind(C, **settings)
            layer.load_state_dict(state)
        assert_step_agrees(layer, loop, x, dy)
    assert min(loop.clipped.values()) > 3, loop.clipped


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_with_one_batch_size_the_window_is_the_authors_m_iterations(batch: int) -> None:
    layer = trained_affine(MABN2d(C, warmup=6, renorm_start=10, moving_batch_size=4 * batch, dtype=torch.float64))
    loop = loop_for(layer, LoopOfIterations)
    for x, dy in batches(60, (2, 2), range(batch, batch + 1)):
        assert_step_agrees(layer, loop, x, dy)


def test_a_batch_of_the_window_or_more_is_its_own_average() -> None:
    layer = MABN2d(C, **SHORT)
    for x, dy in batches(12, (2, 2), range(8, 20), scaled=False):
        run_step(layer, x, dy)
        moment = x.square().mean((0, 2, 3))
        assert layer.num_batches_tracked <= 5 or layer.recent_x2_samples[-1] == len(x)
        torch.testing.assert_close(layer.recent_x2[-1], moment, **FLOAT64.kwargs())
    before = layer.running_var.clone()
    layer(x * 2)
    torch.testing.assert_close(layer.running_var, before.lerp(4 * moment, layer.momentum), **FLOAT64.kwargs())


def plain(x: torch.Tensor, layer: _MABN) -> torch.Tensor:
    """Mean-free batch normalization, for autograd to differentiate."""
    reduced = [0, *range(2, x.dim())]
    shape = (1, C, *(1,) * (x.dim() - 2))
    z = x * torch.rsqrt(x.square().mean(reduced, keepdim=True) + layer.eps)
    return layer.weight.reshape(shape) * z + layer.bias.reshape(shape)


@pytest.mark.parametrize(("kind", "spatial"), RANKS, ids=RANK_IDS)
def test_warm_up_is_mean_free_batch_normalization_with_its_true_gradients(
    kind: type[_MABN], spatial: tuple[int, ...]
) -> None:
    layer = trained_affine(kind(C, **SHORT))
    for x, dy in batches(layer.warmup, spatial, range(1, 4)):
        expected_x = x.clone().requires_grad_()
        y = plain(expected_x, layer)
        expected = (y, *torch.autograd.grad(y, [expected_x, layer.weight, layer.bias], dy))
        for got, want in zip(run_step(layer, x, dy), expected, strict=True):
            torch.testing.assert_close(got, want, **FLOAT64.kwargs())
    # And not a step longer.
    got, want = layer(2 * x), plain(2 * x, layer)
    assert (got - want).abs().max() > 0.1


def test_after_the_warm_up_training_equals_evaluation_with_the_statistics_of_the_step_before() -> None:
    layer = trained_affine(MABN2d(C, **SHORT))
    for step, (x, dy) in enumerate(batches(30, (3, 2), range(2, 5), scaled=False)):
        before = copy.deepcopy(layer).eval()(x)
        y = run_step(layer, x, dy)[0]
        if step >= layer.renorm_start:
            torch.testing.assert_close(y, before, **FLOAT64.kwargs())


def test_after_the_warm_up_the_gradient_is_the_methods_and_not_that_of_the_forward_pass() -> None:
    layer = trained_affine(MABN2d(C, **SHORT))
    for x, dy in batches(20, (3, 2), range(2, 3), scaled=False):
        R = layer.running_var.clone()
        dy = dy + x
        got = run_step(layer, x, dy)[1]
    # The forward pass was w * x / sqrt(R + eps) + b with constant R, and this is its gradient.
    true = dy * (layer.weight.detach() / (R + layer.eps).sqrt()).reshape(C, 1, 1)
    difference = (got - true).norm() / true.norm()
    assert difference > 0.1, "somebody mended the gradient of MABN; see the docstring of MABN1d"


@pytest.mark.parametrize(
    ("kind", "bn", "spatial"),
    [(MABN1d, nn.BatchNorm1d, (5,)), (MABN2d, nn.BatchNorm2d, (3, 2)), (MABN3d, nn.BatchNorm3d, (2, 1, 3))],
    ids=["1d", "2d", "3d"],
)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_evaluation_is_batch_normalization_with_mean_zero_and_variance_r(
    kind: type[_MABN], bn: type[nn.Module], spatial: tuple[int, ...], affine: bool
) -> None:
    layer = kind(C, affine=affine, **SHORT)
    if affine:
        trained_affine(layer)
    for x, dy in batches(7, spatial, range(2, 5)):
        run_step(layer, x, dy)
    plain_bn = bn(C, eps=layer.eps, affine=affine, dtype=torch.float64).eval()
    state = {k: v for k, v in layer.state_dict().items() if k in ("weight", "bias", "running_var")}
    plain_bn.load_state_dict({**state, "running_mean": torch.zeros(C), "num_batches_tracked": torch.tensor(0)})
    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), plain_bn(x), **FLOAT64.kwargs())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_evaluation_has_the_true_gradient() -> None:
    layer = trained_affine(MABN2d(C, **SHORT)).eval()
    layer.running_var.copy_(torch.tensor([0.3, 1.0, 5.0]))
    x = torch.randn(2, C, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_the_first_batch_sets_the_running_statistic() -> None:
    layer = MABN2d(C)
    x = torch.randn(2, C, 4, 4) * 0.1
    layer(x)
    torch.testing.assert_close(layer.running_var, x.square().mean((0, 2, 3)), **FOLD_FLOAT32.kwargs())
    layer(10 * x)
    expected = (0.98 + 0.02 * 100) * x.square().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_var, expected, **FOLD_FLOAT32.kwargs())


def test_momentum_is_the_weight_of_the_new_value() -> None:
    x = torch.ones(2, C, 2, 2)
    for momentum in (0.0, 0.25, 1.0):
        layer = MABN2d(C, momentum=momentum)
        layer(x)
        layer(3 * x)
        torch.testing.assert_close(layer.running_var, torch.full((C,), 1 + 8 * momentum), **FOLD_FLOAT32.kwargs())


def test_a_layer_used_twice_before_backward_has_the_gradients_of_both_uses() -> None:
    layer = trained_affine(MABN2d(C, warmup=100, dtype=torch.float64))
    first, second = (torch.randn(n, C, 3, 3, dtype=torch.float64, requires_grad=True) for n in (2, 5))
    layer(layer(first)[:1] + layer(second)).sin().sum().backward()
    expected_first, expected_second = (t.detach().clone().requires_grad_() for t in (first, second))
    plain(plain(expected_first, layer)[:1] + plain(expected_second, layer), layer).sin().sum().backward()
    for got, want in ((first, expected_first), (second, expected_second)):
        assert got.grad is not None
        torch.testing.assert_close(got.grad, want.grad, **FLOAT64.kwargs())
    assert layer.num_batches_tracked == 3
    assert (layer.recent_gz_samples > 0).sum() == 3


@pytest.mark.parametrize("batch", [(0, C, 3, 3), (2, C, 0, 3)], ids=["no_samples", "no_rows"])
@pytest.mark.parametrize(("steps_before", "size"), [(0, 2), (10, 2), (10, 12)], ids=["first", "later", "wide_before"])
def test_an_empty_batch_warns_and_leaves_everything_alone(batch: tuple[int, ...], steps_before: int, size: int) -> None:
    layer = MABN2d(C, **SHORT)
    for x, dy in batches(steps_before, (3, 3), range(size, size + 1)):
        run_step(layer, x, dy)
    before = copy.deepcopy(layer.state_dict())
    empty = torch.zeros(batch, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"^MABN2d: an empty batch of shape .* added nothing"):
        y, dx, dw, db = run_step(layer, empty, empty)
    assert y.shape == dx.shape == batch
    assert dw.tolist() == db.tolist() == [0] * C
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.eval()
    assert layer(empty).shape == batch


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e200])
@pytest.mark.parametrize("steps_before", [0, 10])
def test_a_batch_that_is_not_finite_is_left_out_and_told_of_at_eval(bad: float, steps_before: int) -> None:
    layer, clean = MABN2d(C, **SHORT), MABN2d(C, **SHORT)
    data = list(batches(steps_before + 5, (3, 3), range(2, 3)))
    for step, (x, dy) in enumerate(data):
        if step == steps_before:
            spoiled = x.clone()
            spoiled[0, 1, 2, 2] = bad
            run_step(layer, spoiled, dy)
        run_step(layer, x, dy)
        run_step(clean, x, dy)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, clean.state_dict()[name]), name
    with pytest.warns(UserWarning, match=r"^MABN2d: 1 batches with values that were not finite"):
        layer.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.train().eval()
        clean.eval()


def test_a_gradient_that_is_not_finite_does_not_reach_the_next_step() -> None:
    layer, clean = MABN2d(C, **SHORT), MABN2d(C, **SHORT)
    for step, (x, dy) in enumerate(batches(20, (3, 3), range(2, 3))):
        expected = run_step(clean, x, dy)
        if step == 12:
            # The loss scale was too large, and its step is thrown away; the clean run has a gradient there.
            layer_before = copy.deepcopy(layer.recent_gz)
            run_step(layer, x, dy * math.inf)
            assert torch.equal(layer.recent_gz, layer_before)
            clean = copy.deepcopy(layer)
            continue
        for got, want in zip(run_step(layer, x, dy), expected, strict=True):
            torch.testing.assert_close(got, want, **EXACT.kwargs())
            assert got.isfinite().all()


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_data_of_size_300_stays_finite_and_in_its_type(autocast: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, exact = (trained_affine(MABN2d(C, **{**SHORT, "dtype": dtype})) for dtype in (None, torch.float64))
    kwargs = {torch.float16: OP_FLOAT16, torch.bfloat16: OP_BFLOAT16}[autocast].kwargs()
    for _ in range(12):
        x, dy = (torch.randn(2, C, 6, 6).to(autocast) for _ in range(2))
        x = x * 300
        with torch.autocast("cpu", dtype=autocast):
            got = run_step(layer, x, dy)
        assert [t.dtype for t in got] == [autocast, autocast, torch.float32, torch.float32]
        y, dx, *_ = run_step(exact, x.double(), dy.double())
        torch.testing.assert_close(got[0].double(), y, **kwargs)
        torch.testing.assert_close(got[1].double() * 300, dx * 300, **kwargs)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, **OP_FLOAT32.kwargs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_cast_to_half_keeps_its_statistics_in_float32(dtype: torch.dtype) -> None:
    layer = MABN2d(C, warmup=3, renorm_start=4)
    layer(torch.randn(2, C, 3, 3))
    layer.running_var.fill_(1 / 3)
    third = layer.running_var.clone()
    layer.to(dtype)
    types = {name: value.dtype for name, value in layer.state_dict().items()}
    assert types == {
        "weight": dtype,
        "bias": dtype,
        "running_var": torch.float32,
        "num_batches_tracked": torch.int64,
        "recent_x2": torch.float32,
        "recent_x2_samples": torch.float32,
        "recent_gz": torch.float32,
        "recent_gz_samples": torch.float32,
    }
    assert torch.equal(layer.running_var, third)
    for _ in range(6):
        out = run_step(layer, (torch.randn(2, C, 3, 3) * 300).to(dtype), torch.randn(2, C, 3, 3).to(dtype))
        assert all(t.dtype == dtype and t.isfinite().all() for t in out)
    assert {name: value.dtype for name, value in layer.state_dict().items()} == types
    assert MABN2d(C, dtype=dtype).running_var.dtype == torch.float32


def test_a_layer_cast_to_double_has_everything_in_double() -> None:
    layer = trained_affine(MABN2d(C, **{**SHORT, "dtype": None})).double()
    assert {value.dtype for value in layer.state_dict().values()} == {torch.float64, torch.int64}
    loop = loop_for(layer)
    for x, dy in batches(15, (3, 2), range(1, 5)):
        assert_step_agrees(layer, loop, x, dy)


def test_a_float32_layer_stays_with_the_formulas() -> None:
    layer, exact = (trained_affine(MABN2d(C, **{**SHORT, "dtype": dtype})) for dtype in (None, torch.float64))
    for x, dy in batches(60, (4, 4), range(1, 12), scaled=False):
        for got, want in zip(run_step(layer, x.float(), dy.float()), run_step(exact, x, dy), strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, **OP_FLOAT32.kwargs())


def test_the_second_moment_of_a_million_values_keeps_float32s_digits() -> None:
    x = torch.randn(64, 2, 112, 112, generator=torch.Generator().manual_seed(0))
    layer = MABN2d(2)
    layer(x)
    expected = x.double().square().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_var.double(), expected, **FOLD_FLOAT32.kwargs())


def test_channels_last_data_gives_the_same_numbers() -> None:
    layer, other = (trained_affine(MABN2d(C, **SHORT)) for _ in range(2))
    for x, dy in batches(12, (4, 5), range(2, 4)):
        expected = run_step(layer, x, dy)
        got = run_step(other, *(t.to(memory_format=torch.channels_last) for t in (x, dy)))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, **FLOAT64.kwargs())


def test_sliced_data_gives_the_same_numbers() -> None:
    layer, other = (trained_affine(MABN2d(C, **SHORT)) for _ in range(2))
    for x, dy in batches(12, (4, 5), range(2, 4)):
        sliced = x[..., ::2], dy[..., ::2]
        expected = run_step(other, *(t.contiguous() for t in sliced))
        for a, b in zip(run_step(layer, *sliced), expected, strict=True):
            torch.testing.assert_close(a, b, **FLOAT64.kwargs())


def test_without_affine_there_are_no_parameters_and_the_numbers_are_those_of_weight_one() -> None:
    layer, other = MABN2d(C, affine=False, **SHORT), MABN2d(C, **SHORT)
    assert list(layer.parameters()) == []
    assert "weight" not in layer.state_dict()
    for x, dy in batches(12, (3, 3), range(2, 4)):
        y, dx = run_step(layer, x, dy)
        expected_y, expected_dx, *_ = run_step(other, x, dy)
        torch.testing.assert_close(y, expected_y, **EXACT.kwargs())
        torch.testing.assert_close(dx, expected_dx, **EXACT.kwargs())
    layer.reset_parameters()


@pytest.mark.parametrize("steps", [2, 30])
def test_resuming_from_a_state_dict_is_bitwise(steps: int) -> None:
    settings = {**SHORT, "dtype": torch.float32}
    layer = MABN2d(C, **settings)
    data = [(x.float(), dy.float()) for x, dy in batches(steps + 12, (3, 3), range(1, 6))]
    for x, dy in data[:steps]:
        run_step(layer, x, dy)
    resumed = MABN2d(C, **settings)
    resumed.load_state_dict(copy.deepcopy(layer.state_dict()))
    for x, dy in data[steps:]:
        for a, b in zip(run_step(layer, x, dy), run_step(resumed, x, dy), strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in layer.state_dict().items())


def test_layer_survives_copying_and_pickling_and_shows_how_it_was_made() -> None:
    layer = MABN2d(C, **SHORT)
    for x, dy in batches(9, (3, 3), range(2, 3)):
        run_step(layer, x, dy)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        before = layer.running_var.clone()
        for a, b in zip(run_step(copy.deepcopy(layer), x, dy), run_step(twin, x, dy), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(layer.running_var, before)
    assert repr(layer) == "MABN2d(3, eps=1e-05, momentum=0.02, moving_batch_size=8, warmup=5, affine=True)"


def test_resetting_forgets_everything() -> None:
    layer, fresh = MABN2d(C, **SHORT), MABN2d(C, **SHORT)
    for x, dy in batches(9, (3, 3), range(2, 3)):
        run_step(trained_affine(layer), x, dy)
    run_step(layer, x * math.inf, dy)
    layer.reset_parameters()
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in layer.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), fresh.buffers(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.eval()


def test_a_training_step_never_reads_a_value_which_the_meta_device_does_not_have() -> None:
    # On a GPU, reading one would make the host wait for the device in every layer of every step.
    layer = MABN2d(C, device="meta")
    y, dx, dw, _ = run_step(layer, *(torch.empty(2, C, 3, 3, device="meta") for _ in range(2)))
    assert (y.shape, dx.shape, dw.shape) == ((2, C, 3, 3), (2, C, 3, 3), (C,))
    layer.eval()
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.num_batches_tracked == 0


def test_differentiating_twice_is_refused() -> None:
    layer = MABN2d(C)
    x = torch.randn(2, C, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    assert not layer.recent_gz.requires_grad


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_activation_checkpointing_counts_a_batch_once(reentrant: bool) -> None:
    # The layer is used twice in a step, and its inputs are made by itself: recomputed in the order of backward.
    layer, checkpointed = (trained_affine(MABN2d(C, **SHORT)) for _ in range(2))

    def again(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(module, x, use_reentrant=reentrant)

    for x, dy in batches(16, (3, 3), range(2, 4)):
        results = []
        for module, call in ((layer, nn.Module.__call__), (checkpointed, again)):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = call(module, call(module, leaf).tanh())
            y.backward(dy)
            results.append((y, leaf.grad, module.weight.grad, module.bias.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **FLOAT64.kwargs())
        for name, value in checkpointed.state_dict().items():
            torch.testing.assert_close(value, layer.state_dict()[name], **FLOAT64.kwargs(), msg=name)
    assert layer.num_batches_tracked == 32


def test_checkpointing_finds_the_right_step_again_beside_zeros_and_nan() -> None:
    layer, checkpointed = (trained_affine(MABN2d(C, **SHORT)) for _ in range(2))
    data = list(batches(14, (3, 3), range(2, 3)))
    for zeros in (1, 9):
        data[zeros] = (torch.zeros_like(data[zeros][0]), data[zeros][1])
    data[10] = (data[10][0] * math.nan, data[10][1])
    for step, (x, dy) in enumerate(data):
        expected = run_step(layer, x, dy)
        leaf = x.clone().requires_grad_()
        y = checkpoint(checkpointed, leaf, use_reentrant=False)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        if step != 10:
            torch.testing.assert_close(dx, expected[1], **EXACT.kwargs())


@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be instantiated")  # by dynamo
@pytest.mark.parametrize("uses", [1, 2])
def test_compiled_training_step_agrees_with_eager_in_numbers_and_statistics(uses: int) -> None:
    def step(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for _ in range(uses):
            x = layer(x).tanh()
        return x

    layer, other = (trained_affine(MABN2d(C, **{**SHORT, "warmup": 3 * uses})) for _ in range(2))
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for x, dy in batches(12, (3, 3), range(2, 3)):
        results = []
        for call, module in ((step, layer), (compiled, other)):
            leaf = x.clone().requires_grad_()
            y = call(module, leaf)
            results.append((y, *torch.autograd.grad(y, [leaf, module.weight, module.bias], dy)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **FLOAT64.kwargs())
        for name, value in other.state_dict().items():
            torch.testing.assert_close(value, layer.state_dict()[name], **FLOAT64.kwargs(), msg=name)


WORKER = """
import sys, warnings
import torch
import torch.distributed as dist
from deploynorm.layers import MABN2d

rank, folder = int(sys.argv[1]), sys.argv[2]
warnings.filterwarnings("ignore", "MABN2d: an empty batch")
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
layer = MABN2d(3, warmup=3, renorm_start=4, moving_batch_size=8, dtype=torch.float64)
results = []
for x, dy in torch.load(f"{folder}/batches{rank}.pt"):
    x.requires_grad_()
    y = layer(x)
    results.append((y.detach(), *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)))
torch.save((results, layer.state_dict()), f"{folder}/results{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_fault_23_two_processes_have_the_statistics_of_one_with_both_their_batches(tmp_path: Path) -> None:
    """The listing kept each process's own statistics, and saved those of process 0."""
    sizes = [(2, 2), (2, 2), (1, 3), (2, 2), (0, 3), (2, 2), (4, 0), (2, 2), (5, 1), (2, 2)]
    data = [[tuple(torch.randn(n, C, 3, 2, dtype=torch.float64) for _ in range(2)) for n in pair] for pair in sizes]
    for rank in range(2):
        torch.save([pair[rank] for pair in data], tmp_path / f"batches{rank}.pt")
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    (of_0, state_0), (of_1, state_1) = (torch.load(tmp_path / f"results{rank}.pt") for rank in range(2))

    layer = MABN2d(C, warmup=3, renorm_start=4, moving_batch_size=8, dtype=torch.float64)
    for pair, first, second in zip(data, of_0, of_1, strict=True):
        both = (torch.cat(parts) for parts in zip(*pair, strict=True))
        y, dx, dw, db = run_step(layer, *both)
        torch.testing.assert_close(torch.cat([first[0], second[0]]), y, **FLOAT64.kwargs())
        torch.testing.assert_close(torch.cat([first[1], second[1]]), dx, **FLOAT64.kwargs())
        torch.testing.assert_close(first[2] + second[2], dw, **FLOAT64.kwargs())
        torch.testing.assert_close(first[3] + second[3], db, **FLOAT64.kwargs())
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(state_0[name], value, **FLOAT64.kwargs(), msg=name)
        assert torch.equal(state_0[name], state_1[name]), name
