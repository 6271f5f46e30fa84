"""The functions under the layers, and FRN as a torch operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CASES, NormCase, make_inputs, to_float64, to_torch, tolerance, want
from tolerances import EXACT, FLOAT64, OP_FLOAT16

from deploynorm import reference
from deploynorm.layers import functional
from deploynorm.layers._handwritten import dense

OP = torch.ops.deploynorm.filter_response_norm
X_SHAPES = [(3, 4), (2, 4, 5), (2, 4, 3, 5), (2, 4, 2, 3, 2), (0, 4, 3, 3), (2, 4, 0, 3)]


def operands(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> list[torch.Tensor]:
    """X, gamma, beta, tau and eps; tau is such that about half of y is below it, and none of y near it."""
    torch.manual_seed(sum(shape))
    channels = shape[1]
    x = torch.randn(shape, dtype=dtype)
    parameters = [torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.1]
    tensors = [x, *(p.to(torch.float64 if dtype == torch.float64 else torch.float32) for p in parameters)]
    return [t.requires_grad_(grad) for t in tensors]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_equals_the_reference(case: NormCase) -> None:
    tensors = [to_torch(array) for array in make_inputs(case).values()]
    y = OP(*tensors)
    assert (y.shape, y.dtype, y.stride()) == (tensors[0].shape, tensors[0].dtype, dense(tensors[0]).stride())
    np.testing.assert_allclose(to_float64(y), want(case), **tolerance(case).kwargs())


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in X_SHAPES]
    + [(X_SHAPES[2], dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)],
    ids=str,
)
def test_operator_keeps_the_rules_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Tracing takes most of the time and does not depend on the type. For maps of no size, what a tracer finds in the
    # operator has other gradients.
    rules = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    rules = rules if dtype == torch.float32 and 0 not in shape[2:] else rules[:3]
    torch.library.opcheck(OP.default, operands(*shape, dtype=dtype, grad=True), test_utils=rules)


def test_operator_keeps_the_rules_of_torch_for_channels_last_and_no_threshold() -> None:
    x, gamma, beta, _, eps = operands(2, 4, 3, 5, dtype=torch.float32)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(OP.default, [x, gamma, beta, torch.full_like(beta, -torch.inf), eps])


@pytest.mark.parametrize("shape", X_SHAPES, ids=str)
def test_gradients_of_the_operators_five_inputs_are_the_numerical_ones(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(OP, operands(*shape, grad=True))


@pytest.mark.parametrize("shape", X_SHAPES[:4], ids=str)
@pytest.mark.parametrize("learned", ["layer", "channel"])
@pytest.mark.parametrize("tlu", [True, False], ids=["tlu", "no_tlu"])
def test_gradients_of_frn_are_the_numerical_ones(shape: tuple[int, ...], learned: str, tlu: bool) -> None:
    x, weight, bias, tau, eps_l = operands(*shape, grad=True)
    if learned == "layer":
        eps_l = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        x, weight, bias, tau, eps_l = tensors
        return functional.filter_response_norm(x, weight, bias, tau if tlu else None, 1e-6 + eps_l.abs())

    inputs = (x, weight, bias, tau if tlu else tau.detach(), eps_l)
    assert torch.autograd.gradcheck(call, inputs)


def test_at_a_tie_the_gradient_goes_to_y_and_none_to_the_threshold() -> None:
    x = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for frn in (functional.filter_response_norm, OP):
        beta, tau = (zero.clone().requires_grad_() for _ in range(2))
        frn(x, one, beta, tau, one).sum().backward()
        assert beta.grad is not None
        assert tau.grad is not None
        assert (beta.grad.tolist(), tau.grad.tolist()) == ([4, 4], [0, 0])


@pytest.mark.parametrize("shape", X_SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_mabn_in_evaluation_equals_the_reference(shape: tuple[int, ...], affine: bool) -> None:
    x, weight, bias, _, moment = operands(*shape)
    tensors = (x, moment, weight, bias) if affine else (x, moment, None, None)
    y = functional.normalize_by_second_moment(*tensors, 1e-5)
    expected = reference.mabn_eval(*(None if t is None else t.numpy() for t in tensors), 1e-5)
    np.testing.assert_allclose(y.numpy(), expected, **FLOAT64.kwargs())


def test_mabn_of_half_precision_data_takes_its_statistics_in_float32() -> None:
    x = (torch.randn(2, 4, 3, 3) * 2e4).half()
    moment, weight, bias = torch.full((4,), 4e8), torch.rand(4) + 0.5, torch.randn(4)
    y = functional.normalize_by_second_moment(x, moment, weight, bias, 1e-5)
    assert y.dtype == torch.float16
    expected = reference.mabn_eval(x.double().numpy(), moment.numpy(), weight.numpy(), bias.numpy(), 1e-5)
    np.testing.assert_allclose(to_float64(y), expected, **OP_FLOAT16.kwargs())


@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 3), (6, 2, 3, 2), (6, 2, 2, 3, 2)], ids=str)
@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, False), (1, True), (2, True), (3, True)])
def test_centring_equals_the_reference(shape: tuple[int, ...], groups: int, transposed: bool) -> None:
    w = torch.randn(shape, dtype=torch.float64) + 1
    np.testing.assert_allclose(
        functional.center_weight(w, groups=groups, transposed=transposed).numpy(),
        reference.center_weight(w.numpy(), groups=groups, transposed=transposed),
        **FLOAT64.kwargs(),
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_centring_twice_is_centring_once(transposed: bool) -> None:
    once = functional.center_weight(torch.randn(6, 4, 3, 3, dtype=torch.float64), groups=2, transposed=transposed)
    twice = functional.center_weight(once, groups=2, transposed=transposed)
    torch.testing.assert_close(twice, once, **FLOAT64.kwargs())


def test_centring_a_half_precision_weight_rounds_once() -> None:
    w = (torch.randn(4, 512, 3, 3) + 1).half()
    got = functional.center_weight(w)
    assert got.dtype == torch.float16
    exact = w.double() - w.double().mean((1, 2, 3), keepdim=True)
    # float32 sums may put a value on the other side of a rounding boundary, and then it is one step off.
    assert (got == exact.half()).double().mean() > 0.99
    np.testing.assert_allclose(to_float64(got), exact.numpy(), **OP_FLOAT16.kwargs())


def test_threshold_of_minus_infinity_changes_nothing() -> None:
    x = torch.tensor([[-torch.inf, -3e38, float("nan")]])
    torch.testing.assert_close(functional.tlu(x, torch.full((3,), -torch.inf)), x, **EXACT.kwargs(), equal_nan=True)
