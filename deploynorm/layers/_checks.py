"""Checks of arguments and inputs that the layers share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeGuard

import torch
from torch import Tensor

from deploynorm.errors import InputError
from deploynorm.layers._composed import recorded


def check_input(layer: str, x: Tensor, num_features: int, ranks: Sequence[int] = ()) -> None:
    """Raises InputError unless x has one of the ranks (by default any) and num_features channels on axis 1."""
    if not isinstance(x, Tensor):
        raise InputError(layer, "the input is not a tensor", got=type(x).__name__, fix="torch.from_numpy makes one")
    shape = _sizes(x)
    got = f"a tensor of shape {shape}"
    if x.dim() < 2 or (ranks and x.dim() not in ranks):
        expected = " or ".join(f"{rank}-D" for rank in ranks) or f"(N, {num_features}, ...)"
        fix = "use the 1d, 2d or 3d layer that matches the data, channels on axis 1" if ranks else None
        raise InputError(layer, "wrong rank", got=got, expected=expected, fix=fix)
    if shape[1] != num_features:
        fix = "set num_features to the channels of the layer before"
        raise InputError(layer, "wrong number of channels", got=got, expected=f"{num_features} on axis 1", fix=fix)
    if not x.is_floating_point():
        raise InputError(layer, "the input is not floating point", got=x.dtype, fix="convert it with x.float()")


def check_residual(layer: str, residual: object, x: Tensor) -> None:
    """Raises InputError unless the residual can be added to a result like x without broadcasting or promotion."""
    like_x = isinstance(residual, Tensor) and (_sizes(residual), residual.dtype) == (_sizes(x), x.dtype)
    if not like_x:
        got = f"{tuple(residual.shape)} {residual.dtype}" if isinstance(residual, Tensor) else type(residual).__name__
        expected = f"{tuple(x.shape)} {x.dtype}, as the input"
        fix = "FRN2d(..., tlu=False), an addition and TLU take others"
        raise InputError(layer, "the residual is not like the input", got=got, expected=expected, fix=fix)


def _sizes(x: Tensor) -> tuple[int, ...]:
    """The shape, in numbers also where torch.jit.trace has tensors in it, of which each comparison warns."""
    if not recorded():
        return tuple(x.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return tuple(map(int, x.shape))


def check_positive(layer: str, name: str, value: object) -> None:
    """Raises InputError unless value is a finite number above 0."""
    if not (_is_number(value) and 0 < value < math.inf):
        raise InputError(layer, f"{name} must be positive", got=repr(value), expected="a finite number above 0")


def check_range(layer: str, name: str, value: object, low: float, high: float, expected: str) -> None:
    """Raises InputError unless value is a number from low to high."""
    if not (_is_number(value) and low <= value <= high):
        raise InputError(layer, f"{name} is out of range", got=repr(value), expected=expected)


def check_dtype(layer: str, dtype: object) -> None:
    """Raises InputError unless dtype is None or a floating point type of torch."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(layer, "dtype is not floating point", got=repr(dtype), expected="such as torch.float32")


def check_count(layer: str, name: str, value: object, least: int = 1) -> None:
    """Raises InputError unless value is a whole number of at least 1, or 0."""
    if not (_is_number(value) and isinstance(value, Integral) and value >= least):
        problem = f"{name} must be {'positive' if least else 'a whole number'}"
        raise InputError(layer, problem, got=repr(value), expected=f"a whole number of at least {least}")


def _is_number(value: object) -> TypeGuard[float]:
    # NumPy's numbers are Real too; True is no size.
    return isinstance(value, Real) and not isinstance(value, bool)
