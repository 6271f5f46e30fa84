"""The reference against numbers worked out by hand, plain loops, and its own contract."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from cases import ADD_CASES, CASES, NUMPY_DTYPES, NormCase, make_inputs, want
from tolerances import EXACT, FLOAT64

from deploynorm import reference
from deploynorm.contract import INPUTS, RESIDUAL
from deploynorm.errors import InputError

FLOAT64_CASES = [case for case in (*CASES, *ADD_CASES) if case.dtype == "float64"]


def test_frn_by_hand() -> None:
    # E[x^2] of (3, 4, 0, 5) is 50 / 4; with eps 3.5 the root is 4.
    x = np.array([3.0, 4.0, 0.0, -5.0]).reshape(1, 1, 2, 2)
    y = reference.filter_response_norm(x, *(np.array([v]) for v in (2.0, 1.0, -0.5, 3.5)))
    assert y.ravel().tolist() == [2.5, 3.0, 1.0, -0.5]


def test_frn_of_single_values_is_their_sign_when_eps_is_small() -> None:
    x = np.array([[2.0, -3.0], [0.5, 0.0]])
    y = reference.filter_response_norm(x, np.ones(2), np.zeros(2), np.full(2, -np.inf), np.full(2, 1e-30))
    assert y.tolist() == [[1.0, -1.0], [1.0, 0.0]]


@pytest.mark.parametrize("case", [c for c in FLOAT64_CASES if c.name not in ("big_plane", "outlier")], ids=str)
def test_frn_equals_a_loop_over_every_value(case: NormCase) -> None:
    inputs = make_inputs(case)
    residual = inputs.pop(RESIDUAL, np.zeros(case.shape))
    x, gamma, beta, tau, eps = inputs.values()
    expected = np.empty(x.shape)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = [float(v) for v in x[n, c].ravel()]
            if not values:
                continue
            mean = math.fsum(v * v for v in values) / len(values)
            root = math.sqrt(mean + eps[c])
            out = [gamma[c] * (v / root) + beta[c] + r for v, r in zip(values, residual[n, c].ravel(), strict=True)]
            expected[n, c] = np.reshape([tau[c] if v < tau[c] else v for v in out], x.shape[2:])
    np.testing.assert_allclose(want(case), expected, **FLOAT64.kwargs())


@pytest.mark.parametrize("case", [*CASES, *ADD_CASES], ids=str)
def test_frn_keeps_shape_and_type_and_rounds_once(case: NormCase) -> None:
    inputs = make_inputs(case)
    y = reference.filter_response_norm(**_by_position(inputs))
    assert (y.shape, y.dtype) == (case.shape, NUMPY_DTYPES[case.dtype])
    with np.errstate(over="ignore"):
        rounded = want(case).astype(y.dtype)
    np.testing.assert_array_equal(y.astype(float), rounded.astype(float))


def test_frn_leaves_its_inputs_alone() -> None:
    inputs = make_inputs(ADD_CASES[0])
    before = {name: array.copy() for name, array in inputs.items()}
    reference.filter_response_norm(**_by_position(inputs))
    for name in (*INPUTS, RESIDUAL):
        np.testing.assert_array_equal(inputs[name], before[name])


def test_a_nan_spoils_its_own_map_and_no_other() -> None:
    case = next(c for c in FLOAT64_CASES if c.name == "nan")
    bad = np.isnan(want(case))
    assert bad[0, 1].all()
    bad[0, 1] = False
    assert not bad.any()


def test_a_nan_in_the_residual_spoils_its_own_place_alone() -> None:
    case = next(c for c in FLOAT64_CASES if c.name == "add_nan")
    bad = np.isnan(want(case))
    assert bad[0, 1].all()
    assert bad[0, 0, 1, 1]
    assert bad.sum() == bad[0, 1].size + 1


def test_an_infinity_gives_nan_at_its_place_and_the_rest_of_its_map_is_the_bias() -> None:
    case = next(c for c in FLOAT64_CASES if c.name == "inf")
    _, _, beta, tau, _ = make_inputs(case).values()
    y = want(case)[0, 1].ravel()
    at = 2 * case.shape[3] + 3
    assert math.isnan(y[at])
    assert set(np.delete(y, at)) == {max(beta[1], tau[1])}


@pytest.mark.parametrize("dtype", NUMPY_DTYPES.values(), ids=NUMPY_DTYPES)
def test_tlu_takes_the_larger_and_keeps_nan_and_type(dtype: np.dtype) -> None:
    x = np.array([[[1.0, -2.0, np.nan]], [[-np.inf, 0.5, 3.0]]]).astype(dtype)
    y = reference.tlu(x, np.array([0.5]))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.astype(float), [[[1.0, 0.5, np.nan]], [[0.5, 0.5, 3.0]]])


def test_a_threshold_of_nan_or_minus_infinity_is_no_threshold() -> None:
    x = np.array([[1.0, -np.inf, -1e300, 5.0, -1.0]])
    tau = np.array([np.nan, -np.inf, -np.inf, -np.inf, 0.0])
    assert reference.tlu(x, tau).tolist() == [[1.0, -np.inf, -1e300, 5.0, 0.0]]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES.values(), ids=NUMPY_DTYPES)
def test_mabn_by_hand(dtype: np.dtype) -> None:
    x = np.array([[[2.0, -4.0], [6.0, 0.0]]]).astype(dtype)
    y = reference.mabn_eval(x, np.array([3.5, 8.0]), np.array([1.0, -2.0]), np.array([0.0, 1.0]), 0.5)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(float)[0, 0], [1.0, -2.0], **EXACT.kwargs())
    np.testing.assert_allclose(y.astype(float)[0, 1], (np.array([-12 / math.sqrt(8.5) + 1, 1])).astype(dtype))


def test_mabn_without_affine_is_weight_one_and_bias_zero() -> None:
    x = np.random.default_rng(0).normal(size=(3, 2, 4))
    moment = np.array([0.3, 2.0])
    np.testing.assert_array_equal(
        reference.mabn_eval(x, moment, None, None, 1e-5),
        reference.mabn_eval(x, moment, np.ones(2), np.zeros(2), 1e-5),
    )


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6, 5, 3, 2), (6, 5, 2, 3, 2)], ids=str)
def test_centring_takes_each_filters_own_mean(shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(1).normal(2, 1, shape)
    centred = reference.center_weight(w, groups=3)
    for o in range(shape[0]):
        np.testing.assert_allclose(centred[o], w[o] - math.fsum(w[o].ravel()) / w[o].size, **FLOAT64.kwargs())


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_transposed_centring_takes_the_mean_over_the_inputs_of_the_group(groups: int) -> None:
    w = np.random.default_rng(2).normal(2, 1, (6, 5, 3, 2))
    centred = reference.center_weight(w, groups=groups, transposed=True)
    for g in range(groups):
        rows = slice(g * 6 // groups, (g + 1) * 6 // groups)
        for o in range(5):
            block = w[rows, o]
            np.testing.assert_allclose(
                centred[rows, o], block - math.fsum(block.ravel()) / block.size, **FLOAT64.kwargs()
            )


def test_centring_rounds_once() -> None:
    w = (np.random.default_rng(3).normal(size=(4, 512, 3, 3)) + 1).astype(np.float16)
    expected = w.astype(float) - w.astype(float).mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_array_equal(reference.center_weight(w), expected.astype(np.float16))


ONES = np.ones(3)
REFUSED = {
    "integer_x": (lambda: reference.filter_response_norm(np.ones((2, 3), int), *[ONES] * 4), "X has the wrong type"),
    "x_of_one_axis": (lambda: reference.filter_response_norm(ONES, *[ONES] * 4), "X has the wrong rank"),
    "gamma_of_one_for_many": (
        lambda: reference.filter_response_norm(np.ones((2, 3)), np.ones(1), *[ONES] * 3),
        r"gamma has the wrong shape. Got \(1,\); expected \(3,\)",
    ),
    "scalar_eps": (lambda: reference.filter_response_norm(np.ones((2, 3)), *[ONES] * 3, np.array(1.0)), "eps has the"),
    "eps_with_a_zero": (
        lambda: reference.filter_response_norm(np.ones((2, 3)), *[ONES] * 3, np.array([1.0, 0.0, 1.0])),
        "eps must be positive",
    ),
    "residual_to_broadcast": (
        lambda: reference.filter_response_norm(np.ones((2, 3)), *[ONES] * 4, np.ones((1, 3))),
        r"residual does not have the shape and type of X. Got \(1, 3\) float64; expected \(2, 3\) float64",
    ),
    "residual_of_another_type": (
        lambda: reference.filter_response_norm(np.ones((2, 3)), *[ONES] * 4, np.ones((2, 3), np.float32)),
        "residual does not have the shape and type of X",
    ),
    "tlu_shape": (lambda: reference.tlu(np.ones((2, 3)), np.ones(4)), "tau has the wrong shape"),
    "mabn_shape": (lambda: reference.mabn_eval(np.ones((2, 3)), np.ones(2), None, None, 1e-5), "second_moment has"),
    "weight_of_one_axis": (lambda: reference.center_weight(ONES), "weight has the wrong rank"),
    "groups": (lambda: reference.center_weight(np.ones((4, 2, 1)), groups=3, transposed=True), "groups do not divide"),
}


@pytest.mark.parametrize(("call", "match"), REFUSED.values(), ids=REFUSED)
def test_wrong_arguments_are_refused(call: Callable[[], object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        call()


def _by_position(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip(("x", *INPUTS[1:], RESIDUAL), inputs.values(), strict=False))
