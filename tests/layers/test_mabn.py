"""MABN against a literal loop over its formulas."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from mabn_steps import (
    SHORT,
    Array,
    C,
    Loop,
    assert_step_agrees,
    batches,
    new_layer,
    plain,
    run_step,
    trained_affine,
)
from tolerances import EXACT, FLOAT64, FOLD_FLOAT32, OP_FLOAT32
from torch import nn

from deploynorm.layers import MABN1d, MABN2d, MABN3d
from deploynorm.layers.mabn import _MABN

SPATIAL: dict[type[_MABN], list[tuple[int, ...]]] = {MABN1d: [(), (5,)], MABN2d: [(3, 2)], MABN3d: [(2, 1, 3)]}
RANKS = [(kind, spatial) for kind, shapes in SPATIAL.items() for spatial in shapes]
RANK_IDS = ["n_c", "1d", "2d", "3d"]


class LoopOfIterations(Loop):
    """The authors' window: the last 4 iterations, whatever their size."""

    def average(self, past: list[tuple[int, Array]]) -> Array:
        return np.mean([statistic for _, statistic in past[-4:]], axis=0)


@pytest.mark.parametrize(("kind", "spatial"), RANKS, ids=RANK_IDS)
def test_300_steps_of_changing_size_follow_the_formulas_and_two_resumes(
    kind: type[_MABN], spatial: tuple[int, ...]
) -> None:
    settings = {"warmup": 20, "renorm_start": 40, "dtype": torch.float64}
    layer = trained_affine(kind(C, **settings))
    loop = Loop(layer)
    for step, (x, dy) in enumerate(batches(300, spatial, range(1, 41))):
        if step in (3, 151):
            state = copy.deepcopy(layer.state_dict())
            layer = kind(C, **settings)
            layer.load_state_dict(state)
        assert_step_agrees(layer, loop, x, dy)
    assert min(loop.clipped.values()) > 3, loop.clipped


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_with_one_batch_size_the_window_is_the_authors_m_iterations(batch: int) -> None:
    layer = trained_affine(MABN2d(C, warmup=6, renorm_start=10, moving_batch_size=4 * batch, dtype=torch.float64))
    loop = LoopOfIterations(layer)
    for x, dy in batches(60, (2, 2), range(batch, batch + 1)):
        assert_step_agrees(layer, loop, x, dy)


@pytest.mark.parametrize(("kind", "spatial"), RANKS, ids=RANK_IDS)
def test_warm_up_is_mean_free_batch_normalization_with_its_true_gradients(
    kind: type[_MABN], spatial: tuple[int, ...]
) -> None:
    layer = trained_affine(kind(C, **SHORT))
    for x, dy in batches(layer.warmup, spatial, range(1, 4)):
        expected_x = x.clone().requires_grad_()
        y = plain(expected_x, layer)
        expected = (y, *torch.autograd.grad(y, [expected_x, layer.weight, layer.bias], dy))
        torch.testing.assert_close(run_step(layer, x, dy), expected, **FLOAT64.kwargs())
    # The step after it is another.
    got, want = layer(2 * x), plain(2 * x, layer)
    assert (got - want).abs().max() > 0.1


def test_after_the_warm_up_the_gradient_is_the_methods_and_not_that_of_the_forward_pass() -> None:
    layer = new_layer()
    for x, dy in batches(20, (3, 2), range(2, 3), scaled=False):
        R = layer.running_var.clone()
        dy = dy + x
        got = run_step(layer, x, dy)[1]
    # The forward pass was w * x / sqrt(R + eps) + b with constant R, and this is its gradient.
    true = dy * (layer.weight.detach() / (R + layer.eps).sqrt()).reshape(C, 1, 1)
    difference = (got - true).norm() / true.norm()
    assert difference > 0.1, "somebody corrected the gradient of MABN; see the docstring of MABN2d"


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
    state = {name: layer.state_dict().get(name, torch.zeros(C)) for name in plain_bn.state_dict()}
    plain_bn.load_state_dict(state)
    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), plain_bn(x), **FLOAT64.kwargs())
    torch.testing.assert_close(layer.state_dict(), before, **EXACT.kwargs())


def test_evaluation_has_the_true_gradient() -> None:
    layer = new_layer().eval()
    layer.running_var.copy_(torch.tensor([0.3, 1.0, 5.0]))
    x = torch.randn(2, C, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("momentum", [0.0, 0.02, 0.25, 1.0])
def test_the_first_batch_sets_the_running_statistic_and_momentum_is_the_weight_of_a_new_value(momentum: float) -> None:
    layer = MABN2d(C, momentum=momentum)
    x = torch.randn(2, C, 4, 4) * 0.1
    moment = x.square().mean((0, 2, 3))
    layer(x)
    torch.testing.assert_close(layer.running_var, moment, **FOLD_FLOAT32.kwargs())
    layer(10 * x)
    torch.testing.assert_close(layer.running_var, (1 + 99 * momentum) * moment, **FOLD_FLOAT32.kwargs())


def test_a_layer_cast_to_double_has_everything_in_double() -> None:
    layer = new_layer(dtype=None).double()
    assert {value.dtype for value in layer.state_dict().values()} == {torch.float64, torch.int64}
    loop = Loop(layer)
    for x, dy in batches(15, (3, 2), range(1, 5)):
        assert_step_agrees(layer, loop, x, dy)


def test_a_float32_layer_stays_with_the_formulas() -> None:
    layer, exact = (new_layer(dtype=dtype) for dtype in (None, torch.float64))
    for x, dy in batches(60, (4, 4), range(1, 12), scaled=False):
        want = [t.float() for t in run_step(exact, x, dy)]
        torch.testing.assert_close(run_step(layer, x.float(), dy.float()), want, **OP_FLOAT32.kwargs())


@pytest.mark.parametrize("layer_dtype", [torch.float32, torch.float64], ids=str)
def test_data_of_another_precision_than_the_layer_keep_their_type(layer_dtype: torch.dtype) -> None:
    data_dtype = torch.float32 if layer_dtype == torch.float64 else torch.float64
    layer, exact = (new_layer(dtype=dtype) for dtype in (layer_dtype, torch.float64))
    for x, dy in batches(12, (4, 4), range(1, 4), scaled=False):
        got = run_step(layer, x.to(data_dtype), dy.to(data_dtype))
        assert [t.dtype for t in got] == [data_dtype, data_dtype, layer_dtype, layer_dtype]
        torch.testing.assert_close([t.double() for t in got], run_step(exact, x, dy), **OP_FLOAT32.kwargs())


def test_the_second_moment_of_a_million_values_keeps_float32s_digits() -> None:
    x = torch.randn(64, 2, 112, 112, generator=torch.Generator().manual_seed(0))
    layer = MABN2d(2)
    layer(x)
    expected = x.double().square().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_var.double(), expected, **FOLD_FLOAT32.kwargs())


def test_without_affine_there_are_no_parameters_and_the_numbers_are_those_of_weight_one() -> None:
    layer, other = MABN2d(C, affine=False, **SHORT), MABN2d(C, **SHORT)
    assert list(layer.parameters()) == []
    assert "weight" not in layer.state_dict()
    for x, dy in batches(12, (3, 3), range(2, 4)):
        torch.testing.assert_close(run_step(layer, x, dy), run_step(other, x, dy)[:2], **EXACT.kwargs())
    layer.reset_parameters()


def test_resetting_forgets_everything() -> None:
    layer, fresh = MABN2d(C, **SHORT), MABN2d(C, **SHORT)
    for x, dy in batches(9, (3, 3), range(2, 3)):
        run_step(trained_affine(layer), x, dy)
    run_step(layer, x * math.inf, dy)
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), fresh.state_dict(), **EXACT.kwargs())
    torch.testing.assert_close(list(layer.buffers()), list(fresh.buffers()), **EXACT.kwargs())
    layer.eval()  # and warns of nothing


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_a_large_plane_loses_no_digits(memory_format: torch.memory_format, mean: float) -> None:
    x = (torch.randn(1, 2, 1024, 1024) + mean).to(memory_format=memory_format)
    norm, exact = MABN2d(2), MABN2d(2).double()
    norm(x)
    exact(x.double())
    torch.testing.assert_close(norm.running_var.double(), exact.running_var, rtol=1e-6, atol=0)
