"""MABN in all that people do with a layer in training, and what breaks other implementations."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from mabn_steps import SHORT, C, batches, new_layer, plain, run_step, trained_affine
from tolerances import EXACT, FLOAT64, OP_BFLOAT16, OP_FLOAT16, OP_FLOAT32, Tolerance
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deploynorm.errors import InputError
from deploynorm.layers import MABN2d, MABN3d
from deploynorm.layers.freeze import freeze_mabn
from deploynorm.layers.mabn import _MABN

Map = Callable[[torch.Tensor], torch.Tensor]


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
    assert (layer.recent_gz[:, -1] > 0).sum() == 3


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
    torch.testing.assert_close(layer.state_dict(), before, **EXACT.kwargs())
    layer.eval()
    assert layer(empty).shape == batch


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [*((bad, torch.float64) for bad in (math.inf, -math.inf, math.nan, 1e200)), (math.inf, torch.float16)],
)
@pytest.mark.parametrize("steps_before", [0, 10])
def test_a_batch_that_is_not_finite_is_left_out_and_warned_of_at_eval(
    bad: float, dtype: torch.dtype, steps_before: int
) -> None:
    layer, clean = new_layer(dtype=dtype), new_layer(dtype=dtype)
    for step, data in enumerate(batches(steps_before + 5, (3, 3), range(2, 3), scaled=False)):
        x, dy = (t.to(dtype) for t in data)
        if step == steps_before:
            spoiled = x.clone()
            spoiled[0, 1, 2, 2] = bad
            y, dx, *_ = run_step(layer, spoiled, dy)
            assert (~y.isfinite()).sum() == (not math.isfinite(bad)), "it must be seen, and spread no further"
            assert dx[:, [0, 2]].isfinite().all()
        torch.testing.assert_close(run_step(layer, x, dy), run_step(clean, x, dy), **EXACT.kwargs())
    torch.testing.assert_close(layer.state_dict(), clean.state_dict(), **EXACT.kwargs())
    with pytest.warns(UserWarning, match=r"^MABN2d: 1 batches with values that were not finite"):
        layer.eval()
    for module in (layer.train(), clean):
        module.eval()  # warns of nothing


def test_a_gradient_that_is_not_finite_does_not_reach_the_next_step() -> None:
    layer, clean = MABN2d(C, **SHORT), MABN2d(C, **SHORT)
    for step, (x, dy) in enumerate(batches(20, (3, 3), range(2, 3))):
        want = run_step(clean, x, dy)
        if step == 12:
            # The loss scale was too large, and its step is thrown away; the clean run has a gradient there.
            before = layer.recent_gz.clone()
            run_step(layer, x, dy * math.inf)
            assert torch.equal(layer.recent_gz, before)
            clean = copy.deepcopy(layer)
            continue
        torch.testing.assert_close(run_step(layer, x, dy), want, **EXACT.kwargs())
        assert all(t.isfinite().all() for t in want)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_data_of_size_300_stays_finite_and_in_its_type(autocast: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, exact = (new_layer(dtype=dtype) for dtype in (None, torch.float64))
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
        **dict.fromkeys(("weight", "bias"), dtype),
        **dict.fromkeys(("running_var", "recent_x2", "recent_gz"), torch.float32),
        "num_batches_tracked": torch.int64,
    }
    assert torch.equal(layer.running_var, third)
    for _ in range(6):
        out = run_step(layer, (torch.randn(2, C, 3, 3) * 300).to(dtype), torch.randn(2, C, 3, 3).to(dtype))
        assert all(t.dtype == dtype and t.isfinite().all() for t in out)
    assert {name: value.dtype for name, value in layer.state_dict().items()} == types
    assert MABN2d(C, dtype=dtype).running_var.dtype == torch.float32


def deterministic(layer: MABN2d, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch.use_deterministic_algorithms(True)
    try:
        return run_step(layer, x, dy)
    finally:
        torch.use_deterministic_algorithms(False)


def evaluated_between(layer: MABN2d, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    run_step(layer.eval(), 100 * x, dy)
    with torch.inference_mode():
        layer(x)
    return run_step(layer.train(), x, dy)


WAYS: dict[str, tuple[Callable[..., tuple[torch.Tensor, ...]], Tolerance]] = {
    "channels last": (
        lambda layer, *data: run_step(layer, *(t.to(memory_format=torch.channels_last) for t in data)),
        FLOAT64,
    ),
    "sliced": (lambda layer, *data: run_step(layer, *(torch.stack([t, t + 1], -1)[..., 0] for t in data)), FLOAT64),
    "deterministic": (deterministic, EXACT),
    "evaluated between steps": (evaluated_between, EXACT),
}


@pytest.mark.parametrize(("step", "tolerance"), WAYS.values(), ids=WAYS)
def test_a_step_gives_the_same_numbers(step: Callable[..., tuple[torch.Tensor, ...]], tolerance: Tolerance) -> None:
    layer, other = new_layer(), new_layer()
    for x, dy in batches(14, (4, 5), range(2, 4)):
        torch.testing.assert_close(step(layer, x, dy), run_step(other, x, dy), **tolerance.kwargs())


def loaded(layer: MABN2d) -> MABN2d:
    twin = new_layer(dtype=layer.weight.dtype)
    twin.load_state_dict(copy.deepcopy(layer.state_dict()))
    return twin


@pytest.mark.parametrize(
    "twin_of",
    [loaded, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["loaded", "copy", "pickle"],
)
@pytest.mark.parametrize("steps", [2, 30])
def test_a_twin_goes_on_bitwise(steps: int, twin_of: Callable[[MABN2d], MABN2d]) -> None:
    layer = new_layer(dtype=torch.float32)
    data = [(x.float(), dy.float()) for x, dy in batches(steps + 12, (3, 3), range(1, 6))]
    for x, dy in data[:steps]:
        run_step(layer, x, dy)
    twin = twin_of(layer)
    for x, dy in data[steps:]:
        torch.testing.assert_close(run_step(layer, x, dy), run_step(twin, x, dy), **EXACT.kwargs())
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), **EXACT.kwargs())


def test_layer_shows_how_it_was_made() -> None:
    shown = "MABN2d(3, eps=1e-05, momentum=0.02, moving_batch_size=8, warmup=5, affine=True)"
    assert repr(MABN2d(C, **SHORT)) == shown


def test_a_training_step_never_reads_a_value_which_the_meta_device_does_not_have() -> None:
    # On a GPU, reading one would make the host wait for the device in every layer of every step.
    layer = MABN2d(C, device="meta")
    y, dx, dw, _ = run_step(layer, *(torch.empty(2, C, 3, 3, device="meta") for _ in range(2)))
    assert (y.shape, dx.shape, dw.shape) == ((2, C, 3, 3), (2, C, 3, 3), (C,))
    layer.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "last"), [(MABN2d, torch.channels_last), (MABN3d, torch.channels_last_3d)], ids=["2d", "3d"]
)
@pytest.mark.parametrize("in_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("grad_in_layout", [True, False], ids=["grad_alike", "grad_other"])
def test_output_and_gradient_have_the_layout_of_the_input(
    kind: type[_MABN], last: torch.memory_format, in_last: bool, grad_in_layout: bool, dtype: torch.dtype
) -> None:
    layer = kind(C, warmup=1, renorm_start=1, dtype=dtype)
    layouts = (last, torch.contiguous_format) if in_last else (torch.contiguous_format, last)
    shape = (2, C, 4, 5) if kind is MABN2d else (2, C, 2, 4, 5)
    for _ in range(3):
        x = torch.randn(shape, dtype=dtype).to(memory_format=layouts[0]).requires_grad_()
        for y in (layer(x), layer.eval()(x)):
            assert y.is_contiguous(memory_format=layouts[0])
        y = layer.train()(x)
        dy = torch.randn(shape, dtype=dtype).to(memory_format=layouts[not grad_in_layout])
        (dx,) = torch.autograd.grad(y, x, dy)
        assert dx.is_contiguous(memory_format=layouts[0])
        assert dx.dtype == y.dtype == dtype


@pytest.mark.parametrize("steps_before", [2, 10], ids=["warm_up", "later"])
def test_functional_call_moves_the_buffers_that_it_is_given_and_no_others(steps_before: int) -> None:
    layer, expected = (new_layer() for _ in range(2))
    data = list(batches(steps_before + 1, (3, 3), range(2, 4)))
    for x, dy in data[:-1]:
        for module in (layer, expected):
            run_step(module, x, dy)
    x, dy = data[-1]
    parameters = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    buffers = {name: value.clone() for name, value in layer.named_buffers()}
    before = copy.deepcopy(layer.state_dict())
    leaf = x.clone().requires_grad_()
    y = torch.func.functional_call(layer, (parameters, buffers), leaf)
    got = (y.detach(), *torch.autograd.grad(y, [leaf, *parameters.values()], dy))
    torch.testing.assert_close(got, run_step(expected, x, dy), **EXACT.kwargs())
    torch.testing.assert_close(layer.state_dict(), before, **EXACT.kwargs())
    torch.testing.assert_close(buffers, dict(expected.named_buffers()), **EXACT.kwargs())


TRANSFORMS: dict[str, Callable[[Map, torch.Tensor], torch.Tensor]] = {
    "grad": lambda layer, x: torch.func.grad(lambda t: layer(t).sin().sum())(x),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x[None]),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x),
    "forward_mode": lambda layer, x: tangent(layer, x),
}


def tangent(function: Map, x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        y = function(forward_ad.make_dual(x, torch.ones_like(x)))
        along: torch.Tensor = forward_ad.unpack_dual(y).tangent.clone()
    return along


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own forward mode
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused_in_training_and_right_in_evaluation_and_frozen(transform: str) -> None:
    layer = new_layer()
    for x, dy in batches(3, (2, 2), range(1, 2)):
        run_step(layer, x, dy)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(InputError, match=r"^MABN2d: it cannot train under a transform .* Fix: put the layer in eval"):
        TRANSFORMS[transform](layer, x)
    torch.testing.assert_close(layer.state_dict(), before, **EXACT.kwargs())
    scale = (layer.weight / (layer.running_var + layer.eps).sqrt()).detach().reshape(C, 1, 1)
    expected = TRANSFORMS[transform](lambda t: t * scale + layer.bias.detach().reshape(C, 1, 1), x)
    frozen = copy.deepcopy(layer)
    freeze_mabn(frozen)
    for fixed in (layer.eval(), frozen):
        torch.testing.assert_close(TRANSFORMS[transform](fixed, x), expected, **FLOAT64.kwargs())


def test_a_second_derivative_is_refused_in_training_and_right_in_evaluation() -> None:
    layer = new_layer()
    x = torch.randn(2, C, 3, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    before = layer.recent_gz.clone()
    with pytest.raises(InputError, match=r"^MABN2d: the gradient of a training step has no derivative"):
        torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    assert torch.equal(layer.recent_gz, before)
    assert torch.autograd.gradgradcheck(copy.deepcopy(layer).eval(), x)


@pytest.mark.parametrize("wanted", [c for n in range(4) for c in itertools.combinations(("x", "weight", "bias"), n)])
def test_each_choice_of_trained_inputs_gets_its_gradients_and_the_same_statistics(wanted: tuple[str, ...]) -> None:
    layer, whole = (new_layer() for _ in range(2))
    layer.weight.requires_grad_("weight" in wanted)
    layer.bias.requires_grad_("bias" in wanted)
    for x, dy in batches(12, (3, 3), range(2, 4)):
        x = x.clone().requires_grad_("x" in wanted)
        y = layer(x)
        expected = dict(zip(("y", "x", "weight", "bias"), run_step(whole, x.detach(), dy), strict=True))
        assert torch.equal(y, expected["y"])
        assert y.requires_grad == bool(wanted)
        if wanted:
            inputs = {"x": x, "weight": layer.weight, "bias": layer.bias}
            got = torch.autograd.grad(y, [inputs[name] for name in wanted], dy)
            torch.testing.assert_close(got, [expected[name] for name in wanted], **EXACT.kwargs())
            assert torch.equal(layer.recent_gz, whole.recent_gz)
        assert torch.equal(layer.running_var, whole.running_var)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_forward_pass_without_gradient_in_training_counts_as_a_batch(
    mode: Callable[[], AbstractContextManager[object]],
) -> None:
    layer, other = (new_layer() for _ in range(2))
    for step, (x, dy) in enumerate(batches(20, (3, 3), range(2, 4))):
        if step % 3 == 1:
            with mode():
                y = layer(x)
            assert torch.equal(y, other(x))
            assert layer.num_batches_tracked == step + 1
        else:
            torch.testing.assert_close(run_step(layer, x, dy), run_step(other, x, dy), **EXACT.kwargs())


def test_a_copy_made_between_forward_and_backward_goes_its_own_way() -> None:
    layer, expected = (new_layer() for _ in range(2))
    for x, dy in batches(10, (3, 3), range(2, 4)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        before = [copy.deepcopy(twin.state_dict()) for twin in twins]
        (dx,) = torch.autograd.grad(y, leaf, dy)
        assert torch.equal(dx, run_step(expected, x, dy)[1])
        for twin, state in zip(twins, before, strict=True):
            assert [name for name, _ in twin.named_buffers()] == [name for name, _ in layer.named_buffers()]
            torch.testing.assert_close(twin.state_dict(), state, **EXACT.kwargs())


@pytest.mark.parametrize("use_buffers", [False, True], ids=["copied", "averaged"])
def test_an_averaged_model_evaluates_as_its_layer(use_buffers: bool) -> None:
    layer = new_layer()
    averaged = AveragedModel(layer, use_buffers=use_buffers, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for x, dy in batches(8, (3, 3), range(2, 4)):
        run_step(layer, x, dy)
        averaged.update_parameters(layer)
        if not use_buffers:
            torch.testing.assert_close(list(averaged.module.buffers()), list(layer.buffers()), **EXACT.kwargs())
    assert averaged.module.num_batches_tracked.dtype == torch.int64
    y = copy.deepcopy(layer).eval()(x)
    assert torch.equal(averaged.eval()(x), y) != use_buffers


def test_a_step_leaves_nothing_of_its_data_alive() -> None:
    layer = MABN2d(C)
    x = torch.randn(2, C, 3, 3, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    alive = [weakref.ref(t) for t in (x, y)]
    del x, y
    assert [ref() for ref in alive] == [None, None]


def test_a_model_made_on_meta_starts_like_any_other() -> None:
    with torch.device("meta"):
        layer = MABN2d(C, warmup=2)
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    layer.to_empty(device="cpu").reset_parameters()
    fresh = MABN2d(C, warmup=2)
    for x, dy in batches(5, (3, 3), range(2, 4)):
        x, dy = x.float(), dy.float()
        torch.testing.assert_close(run_step(layer, x, dy), run_step(fresh, x, dy), **EXACT.kwargs())
