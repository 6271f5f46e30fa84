"""The gradients of FRN with its threshold in NumPy, computed in float64, and how far others may be from them.

want = gradients(dy, x, gamma, beta, tau, eps)
check_gradients(got, want, sizes(dy, x, gamma, beta, tau, eps), tolerance)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tolerances import Tolerance

Array = npt.NDArray[Any]


class Gradients(NamedTuple):
    """Of a loss, by x (N, C, ...) and the parameters (C,); eps is the effective one."""

    dx: Array
    dgamma: Array
    dbeta: Array
    dtau: Array
    deps: Array


def gradients(dy: Array, x: Array, gamma: Array, beta: Array, tau: Array, eps: Array) -> Gradients:
    """With g = dy where y >= tau or y is NaN, and 0 elsewhere, and sums over the spatial positions:

        dx = gamma * rstd * g - x * gamma * rstd^3 * mean(g * x)
        dgamma = sum(rstd * sum(g * x))   deps = sum(-gamma * rstd^3 * sum(g * x) / 2)   over the samples
        dbeta = sum(sum(g))               dtau = sum(sum(dy - g))

    Args:
        dy: Gradient by the output, (N, C, ...).
        x: (N, C, ...).
        gamma: (C,).
        beta: (C,).
        tau: (C,); minus infinity for no threshold.
        eps: (C,), effective.

    Source: Singh & Krishnan, arXiv:1911.09737, eq. 4 to 7; eq. 7 lacks a factor 1 / spatial.
    """
    return _gradients(dy, x, gamma, beta, tau, eps, absolute=False)


def sizes(dy: Array, x: Array, gamma: Array, beta: Array, tau: Array, eps: Array) -> Gradients:
    """The sums of `gradients` over the absolute values of their terms: what a rounding error is relative to."""
    return _gradients(dy, x, gamma, beta, tau, eps, absolute=True)


def _gradients(*inputs: Array, absolute: bool) -> Gradients:
    with np.errstate(invalid="ignore", over="ignore"):  # an infinity in x, and inf * 0 after it, are the answer
        dy, x, *parameters = (each.astype(np.float64) for each in inputs)
        column = (1, -1, *(1,) * (x.ndim - 2))
        gamma, beta, tau, eps = (each.reshape(column) for each in parameters)
        axes, spatial = tuple(range(2, x.ndim)), max(1, int(np.prod(x.shape[2:])))
        rstd = 1 / np.sqrt(np.sum(x * x, axis=axes, keepdims=True) / spatial + eps)
        bounded = gamma * (x * rstd) + beta < tau
        if absolute:
            dy, x, gamma = np.abs(dy), np.abs(x), np.abs(gamma)
        g, rest = np.where(bounded, 0, dy), np.where(bounded, dy, 0)
        # rstd * x is of the size of 1, rstd^3 may be out of range.
        product = rstd * np.sum(g * x, axis=axes, keepdims=True)
        correction = x * (rstd * (product / spatial))
        dx = gamma * rstd * (g + correction if absolute else g - correction)
        deps = gamma * (rstd * product) * rstd / (2 if absolute else -2)
        others = (0, *range(2, x.ndim))
        # Thousands of samples, one after the other, would leave more of an error in float64 than the kernels may have.
        summed = (np.sum(each, axis=others, dtype=np.longdouble) for each in (product, g, rest, deps))
        return Gradients(dx, *(each.astype(np.float64) for each in summed))


def away_from_ties(dy: Array, x: Array, gamma: Array, beta: Array, tau: Array, eps: Array) -> Array:
    """dy with zeros where y is so near to tau that rounding decides which of the two the output is.

    An exact tie stays: a rule decides that.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        wide = x.astype(np.float64)
        column = (1, -1, *(1,) * (x.ndim - 2))
        g, b, t, e = (each.astype(np.float64).reshape(column) for each in (gamma, beta, tau, eps))
        spatial = max(1, int(np.prod(x.shape[2:])))
        scaled = g * wide / np.sqrt(np.sum(wide * wide, axis=tuple(range(2, x.ndim)), keepdims=True) / spatial + e)
        distance = np.abs(scaled + b - t)
        margin = (1e-12 if x.dtype == np.float64 else 1e-5) * (np.abs(scaled) + np.abs(b) + np.abs(t))
        return np.where((distance > 0) & (distance < margin), 0, dy).astype(dy.dtype)


def check_gradients(got: Gradients, want: Gradients, size: Gradients, summed: Tolerance, rounded: Tolerance) -> None:
    """Raises AssertionError where a gradient is off by more than a rounding of its terms and one of itself.

    Args:
        got: In the types of a form; dx is rounded to that of x.
        want: In float64.
        size: As `sizes` gives it.
        summed: rtol is relative to size.
        rounded: Of dx to its type, relative to itself.
    """
    for name, mine, right, terms in zip(Gradients._fields, got, want, size, strict=True):
        assert mine.shape == right.shape, name
        with np.errstate(over="ignore", invalid="ignore"):
            expected = np.where(
                np.isfinite(right.astype(mine.dtype).astype(np.float64)), right, right.astype(mine.dtype)
            )
            finite = np.isfinite(expected)
            allowed = summed.rtol * terms + summed.atol
            if name == "dx":
                allowed = allowed + rounded.rtol * np.abs(expected) + rounded.atol
            error = np.abs(mine.astype(np.float64) - expected)
        np.testing.assert_array_equal(mine.astype(np.float64)[~finite], expected[~finite], err_msg=name)
        wrong = finite & ~(error <= allowed)
        assert not wrong.any(), (
            f"{name}: {wrong.sum()} of {wrong.size} off, of {error[wrong]} {allowed[wrong]} is allowed"
        )
