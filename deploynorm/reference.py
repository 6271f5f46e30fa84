"""The numbers that everything else is held against: each layer and operator in NumPy, computed in float64.

Written for reading and not for speed, from the papers and not from the layers. The result has the shape of the first
argument, and is rounded at the end to its type: float32, float16, float64 or the bfloat16 of ml_dtypes (which casts by
way of float32). A wrong type, rank or shape is an InputError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from deploynorm.contract import DTYPES, INPUTS, PARAMETERS, RESIDUAL
from deploynorm.errors import InputError

Array = npt.NDArray[Any]


def filter_response_norm(
    x: Array, gamma: Array, beta: Array, tau: Array, eps: Array, residual: Array | None = None
) -> Array:
    """The operators of deploynorm/contract.py; their ONNX definition is this function.

        nu2 = mean(x**2 over all axes >= 2);  y = gamma * x / sqrt(nu2 + eps) + beta [+ residual];  z = max(y, tau)

    Args:
        x: (N, C, D1..Dk), k >= 0. With k = 0 every value is its own mean. A size may be 0.
        gamma, beta: (C,).
        tau: (C,); minus infinity for no TLU.
        eps: (C,), the effective epsilon, greater than 0 (else InputError).
        residual: Of the shape and type of x, nothing broadcast; None for the operator without one.

    A NaN in x makes the map that it stands in NaN, and no other; one in the residual makes its own place NaN.

    Source: Singh & Krishnan, arXiv:1911.09737, eq. 1 to 3 and section 3.3.
    """
    where = "reference.filter_response_norm"
    _check_x(where, INPUTS[0], x)
    parameters = dict(zip(PARAMETERS, (gamma, beta, tau, eps), strict=True))
    g, b, t, e = (_per_channel(where, name, value, x) for name, value in parameters.items())
    if not (e > 0).all():
        raise InputError(where, "eps must be positive", got=eps)
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        got, expected = (f"{each.shape} {each.dtype}" for each in (residual, x))
        raise InputError(where, f"{RESIDUAL} does not have the shape and type of X", got=got, expected=expected)
    if x.size == 0:
        return x.copy()
    v = x.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # an infinity in x, and inf * 0 after it, are the answer
        nu2 = np.mean(v * v, axis=tuple(range(2, x.ndim)), keepdims=True)
        y = g * (v / np.sqrt(nu2 + e)) + b
        if residual is not None:
            y = y + residual.astype(np.float64)
    return _rounded(_threshold(y, t), x.dtype)


def tlu(x: Array, tau: Array) -> Array:
    """Thresholded linear unit: max(x, tau), x (N, C, ...), with one threshold per channel, tau (C,). NaN stays NaN.

    Source: Singh & Krishnan, arXiv:1911.09737, eq. 3.
    """
    _check_x("reference.tlu", "x", x)
    t = _per_channel("reference.tlu", "tau", tau, x)
    return _rounded(_threshold(x.astype(np.float64), t), x.dtype)


def mabn_eval(x: Array, second_moment: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    """Moving average batch normalization in evaluation: y = weight * x / sqrt(second_moment + eps) + bias.

    Args:
        x: (N, C, ...).
        second_moment: (C,), the running E[x^2], in checkpoints under the name running_var.
        weight, bias: (C,), or None for 1 and 0.
        eps: Added to the second moment.

    Source: Yan et al., ICLR 2020, arXiv:2001.06838, Algorithm 1 (inference); megvii-model/MABN@995e8f5, MABN.py.
    """
    where = "reference.mabn_eval"
    _check_x(where, "x", x)
    m = _per_channel(where, "second_moment", second_moment, x)
    w = 1.0 if weight is None else _per_channel(where, "weight", weight, x)
    b = 0.0 if bias is None else _per_channel(where, "bias", bias, x)
    return _rounded(w * x.astype(np.float64) / np.sqrt(m + eps) + b, x.dtype)


def center_weight(weight: Array, groups: int = 1, transposed: bool = False) -> Array:
    """Weight centralisation: each output filter less the mean over its fan-in, W - mean(W).

    Args:
        weight: (out, in/groups, ...) of a convolution or linear layer; (in, out/groups, ...) when transposed.
        groups: Read for a transposed convolution alone, whose first axis holds the inputs of every group.
        transposed: Whether the weight is that of a transposed convolution.

    Source: Yan et al., ICLR 2020, arXiv:2001.06838, section 4.3; megvii-model/MABN@995e8f5, MABN.py, CenConv2d.
    """
    where = "reference.center_weight"
    _check_x(where, "weight", weight)
    w = weight.astype(np.float64)
    if not transposed:
        return _rounded(w - w.mean(axis=tuple(range(1, w.ndim)), keepdims=True), weight.dtype)
    if groups < 1 or w.shape[0] % groups:
        raise InputError(where, "groups do not divide the input channels", got=f"{groups} and {w.shape[0]}")
    # Output filter j of a group takes from that group's inputs: slices along axis 0.
    parts = [part - part.mean(axis=(0, *range(2, w.ndim)), keepdims=True) for part in np.split(w, groups)]
    return _rounded(np.concatenate(parts), weight.dtype)


def _check_x(where: str, name: str, x: Array) -> None:
    if x.dtype.name not in DTYPES:
        raise InputError(where, f"{name} has the wrong type", got=x.dtype, expected=" or ".join(DTYPES))
    if x.ndim < 2:
        raise InputError(where, f"{name} has the wrong rank", got=f"shape {x.shape}", expected="at least 2 axes")


def _per_channel(where: str, name: str, parameter: Array, x: Array) -> Array:
    channels = x.shape[1]
    if parameter.shape != (channels,):
        raise InputError(where, f"{name} has the wrong shape", got=parameter.shape, expected=(channels,))
    return parameter.astype(np.float64).reshape((1, channels) + (1,) * (x.ndim - 2))


def _threshold(v: Array, t: Array) -> Array:
    # Not np.maximum, which would let a NaN in tau through as well: the contract is v < t ? t : v.
    return np.where(v < t, t, v)


def _rounded(y: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):  # past the largest number of the type lies infinity
        return y.astype(dtype)
