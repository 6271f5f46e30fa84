"""What a kernel must give for each case of cases.py, computed once, and how close it must come.

check_forward(y, case)              y in the type and shape of the case's X
check_backward(gradients, case)     for backward_inputs(case)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from cases import NormCase, make_dy, make_inputs, make_rstd, tolerance, want
from frn_gradient import Gradients, check_gradients, gradients, sizes
from tolerances import GRADIENT_ROUNDED, GRADIENT_SUMMED

from deploynorm.contract import INPUTS

Array = npt.NDArray[Any]


@cache
def inputs_of(case: NormCase) -> dict[str, Array]:
    return make_inputs(case)


@cache
def want_of(case: NormCase) -> Array:
    return want(case)


@cache
def backward_inputs(case: NormCase) -> tuple[Array, ...]:
    """dy, x, rstd, gamma, beta and tau, as the kernels of the backward pass take them."""
    x, gamma, beta, tau, _ = inputs_of(case).values()
    return make_dy(case), x, make_rstd(case), gamma, beta, tau


@cache
def gradients_of(case: NormCase) -> tuple[Gradients, Gradients]:
    """In float64, and what an error is relative to."""
    call = (backward_inputs(case)[0], *inputs_of(case).values())
    return gradients(*call), sizes(*call)


def check_forward(y: Array, case: NormCase, message: str = "") -> None:
    assert y.shape == case.shape, message
    assert y.dtype == inputs_of(case)[INPUTS[0]].dtype, message
    np.testing.assert_allclose(y.astype(np.float64), want_of(case), **tolerance(case).kwargs(), err_msg=message)


def check_backward(got: Gradients, case: NormCase) -> None:
    summed = GRADIENT_SUMMED["float64" if case.dtype == "float64" else "float32"]
    check_gradients(got, *gradients_of(case), summed, GRADIENT_ROUNDED[case.dtype])
