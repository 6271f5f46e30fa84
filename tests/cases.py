"""The cases that every implementation of an operator or layer must pass: reference, eager, ONNX Runtime, TensorRT.

for case in CASES:
    inputs = make_inputs(case)      # NumPy arrays, named as in deploynorm/contract.py
    want(case)                      # the answer, in float64, unrounded
    tolerance(case)                 # how close the implementation must be
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import ml_dtypes
import numpy as np
import torch
from frn_gradient import away_from_ties
from tolerances import FLOAT64, OP_BFLOAT16, OP_FLOAT16, OP_FLOAT32, Tolerance

from deploynorm import reference
from deploynorm.contract import DTYPES, INPUTS, RESIDUAL

Layout = Literal["contiguous", "channels_last", "sliced"]
Values = Literal["normal", "zeros", "one_zero_map", "outlier", "nan", "inf"]
Eps = float | Literal["per_channel", "learned_layer", "learned_channel"]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in DTYPES
}
# Near the largest number of the type; where its square overflows in float32 arithmetic, near the square root of that.
_HUGE = {"float16": 6e4, "bfloat16": 1e18, "float32": 1e18, "float64": 1e150}


@dataclass(frozen=True)
class NormCase:
    """One call of the FRN operator.

    Attributes:
        name: Readable and unique for each dtype.
        shape: Of X.
        dtype: Of X; the parameters are float32, or float64 with it.
        eps: Effective epsilon of every channel. "per_channel" spreads 1e-12 to 10 over them; "learned_layer" and
            "learned_channel" are 1e-6 + |eps_l| as training might leave it.
        tlu: False makes tau minus infinity.
        layout: Of X in memory.
        values: What X is filled with; "normal" is N(0, scale).
        scale: "huge" is the largest size that the type's arithmetic allows.
        residual: Whether the operator is the one that adds a residual, filled as X is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    eps: Eps = 1e-6
    tlu: bool = True
    layout: Layout = "contiguous"
    values: Values = "normal"
    scale: float | Literal["huge"] = 1.0
    residual: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


_SITUATIONS = (
    NormCase("plain", (2, 8, 16, 16)),
    NormCase("map_1x1", (3, 5, 1, 1)),
    NormCase("map_1x1_learned_eps", (3, 5, 1, 1), eps="learned_layer"),
    NormCase("odd_7x7", (2, 16, 7, 7)),
    NormCase("odd_13x5", (3, 6, 13, 5)),
    NormCase("one_channel", (2, 1, 9, 9)),
    NormCase("one_value", (1, 1, 1, 1)),
    NormCase("no_samples", (0, 4, 5, 5)),
    NormCase("no_rows", (2, 4, 0, 5)),
    NormCase("no_rows_nor_columns", (2, 4, 0, 0)),
    NormCase("channels_last", (2, 6, 8, 10), layout="channels_last"),
    NormCase("channels_last_odd", (2, 5, 7, 7), layout="channels_last"),
    NormCase("sliced", (2, 4, 9, 11), layout="sliced"),
    NormCase("zeros", (2, 4, 6, 6), values="zeros"),
    NormCase("zeros_eps_1e-12", (2, 4, 6, 6), values="zeros", eps=1e-12),
    NormCase("one_zero_map", (2, 4, 6, 6), values="one_zero_map"),
    NormCase("huge", (2, 4, 14, 14), scale="huge"),
    NormCase("above_256", (2, 4, 14, 14), scale=300.0),
    NormCase("outlier", (1, 3, 64, 64), values="outlier"),
    NormCase("off_vector_width_17", (1, 3, 1, 17)),
    NormCase("off_vector_width_3x33", (2, 3, 3, 33)),
    NormCase("off_vector_width_channels", (1, 67, 3, 3)),
    NormCase("eps_1e-12", (2, 4, 5, 5), eps=1e-12),
    NormCase("eps_1e-5", (2, 4, 5, 5), eps=1e-5),
    NormCase("eps_10", (2, 4, 5, 5), eps=10.0),
    NormCase("eps_per_channel", (2, 14, 5, 5), eps="per_channel"),
    NormCase("eps_learned_per_layer", (2, 4, 5, 5), eps="learned_layer"),
    NormCase("eps_learned_per_channel", (2, 4, 5, 5), eps="learned_channel"),
    NormCase("no_tlu", (2, 4, 5, 5), tlu=False),
    NormCase("no_tlu_zeros", (2, 4, 5, 5), tlu=False, values="zeros"),
    NormCase("n_c", (4, 6)),
    NormCase("n_c_learned_eps", (4, 6), eps="learned_layer"),
    NormCase("n_c_no_samples", (0, 6)),
    NormCase("1d", (2, 3, 40)),
    NormCase("1d_of_length_1", (2, 3, 1), eps="learned_channel"),
    NormCase("1d_sliced", (2, 3, 21), layout="sliced"),
    NormCase("3d", (2, 3, 4, 5, 6)),
    NormCase("3d_channels_last", (2, 3, 4, 5, 6), layout="channels_last"),
    NormCase("nan", (2, 4, 5, 5), values="nan"),
    NormCase("inf", (2, 4, 5, 5), values="inf"),
    NormCase("big_plane", (1, 2, 512, 512)),
    NormCase("tiny", (2, 4, 7, 7), scale=1e-4),
    NormCase("below_eps", (2, 4, 7, 7), scale=1e-5),
    NormCase("tiny_eps_1e-12", (2, 4, 7, 7), scale=1e-5, eps=1e-12),
)

CASES = tuple(replace(case, dtype=dtype) for case in _SITUATIONS for dtype in DTYPES)
"""Every situation in every type."""

_ADDED = (
    *("plain", "odd_7x7", "map_1x1", "one_channel", "off_vector_width_3x33", "off_vector_width_channels", "sliced"),
    *("no_samples", "no_rows", "channels_last_odd", "n_c", "1d", "3d", "no_tlu", "above_256", "nan", "inf"),
)
ADD_CASES = tuple(
    replace(case, name=f"add_{case.name}", residual=True) for name in _ADDED for case in CASES if case.name == name
)
"""Situations of the operator that adds a residual, in every type."""


def make_inputs(case: NormCase) -> dict[str, np.ndarray[Any, Any]]:
    """The operator's inputs as NumPy arrays, seeded by the name of the case: equal in every run and type."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    dtype = NUMPY_DTYPES[case.dtype]
    channels = case.shape[1]
    x = rng.standard_normal(case.shape)
    # Gamma of both signs: below 0 the largest x gives the smallest y.
    gamma = rng.uniform(0.5, 1.5, channels) * np.where(np.arange(channels) % 3 == 2, -1, 1)
    beta = rng.normal(0, 0.5, channels)
    tau = rng.normal(0, 0.5, channels) if case.tlu else np.full(channels, -np.inf)

    x *= _HUGE[case.dtype] / 4 if case.scale == "huge" else case.scale
    if case.scale == "huge" and x.size:
        x[0].flat[0] = _HUGE[case.dtype]
        x[0].flat[1] = -_HUGE[case.dtype]
        x = np.clip(x, -_HUGE[case.dtype], _HUGE[case.dtype])
    if case.values == "zeros":
        x[...] = 0
    elif case.values == "one_zero_map":
        x[0, 1] = 0
    elif case.values == "outlier":
        x[..., 0, 0] = 300
    elif case.values in ("nan", "inf"):
        x[0, 1, 2, 3] = float(case.values)

    values = (_laid_out(x.astype(dtype), case.layout), gamma, beta, tau, _effective_eps(case.eps, channels, rng))
    parameter = np.float64 if case.dtype == "float64" else np.float32
    named = zip(INPUTS, values, strict=True)
    inputs = {name: value if name == INPUTS[0] else value.astype(parameter) for name, value in named}
    if case.residual:
        residual = rng.standard_normal(case.shape)
        if case.values in ("nan", "inf"):
            residual[0, 0, 1, 1] = float(case.values)  # in another map
        inputs[RESIDUAL] = _laid_out(residual.astype(dtype), case.layout)
    return inputs


def want(case: NormCase) -> np.ndarray[Any, Any]:
    """The expected output in float64: not rounded to the case's type, so that the implementation's rounding shows."""
    inputs = make_inputs(case)
    return reference.filter_response_norm(*(value.astype(np.float64) for value in inputs.values()))


def tolerance(case: NormCase) -> Tolerance:
    """The allowed error of the operator in the case's type."""
    return {"float32": OP_FLOAT32, "float16": OP_FLOAT16, "bfloat16": OP_BFLOAT16, "float64": FLOAT64}[case.dtype]


def to_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The array as a tensor that shares its memory and strides; torch does not accept NumPy's bfloat16 itself."""
    if array.dtype == NUMPY_DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_float64(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's values in float64, which represents those of every type exactly."""
    return tensor.detach().double().numpy()


def _effective_eps(eps: Eps, channels: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    if eps == "per_channel":
        return np.logspace(-12, 1, channels)
    if eps == "learned_layer":
        return np.full(channels, 1e-6 + abs(rng.normal(0, 1e-2)))
    if eps == "learned_channel":
        return 1e-6 + np.abs(rng.normal(0, 1e-2, channels))
    return np.full(channels, eps)


def _laid_out(x: np.ndarray[Any, Any], layout: Layout) -> np.ndarray[Any, Any]:
    if layout == "channels_last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    if layout == "sliced":
        # Every second column of a larger array, whose other values would change the mean.
        larger = np.full((*x.shape[:-1], 2 * x.shape[-1] + 3), 7, dtype=x.dtype)
        larger[..., 3::2] = x
        return larger[..., 3::2]
    return x


def make_dy(case: NormCase) -> np.ndarray[Any, Any]:
    """A gradient of the output that does not depend on the rounding of y."""
    x, *parameters = make_inputs(case).values()
    dy = np.random.default_rng(1).standard_normal(x.shape).astype(x.dtype)
    return away_from_ties(dy, x, *parameters)


def make_rstd(case: NormCase) -> np.ndarray[Any, Any]:
    """The value that the forward pass saves for backward, computed in float64."""
    x, *_, eps = (make_inputs(case)[name] for name in INPUTS)
    wide = x.astype(np.float64).reshape(*x.shape[:2], prod(x.shape[2:]))
    with np.errstate(over="ignore", invalid="ignore"):
        rstd: np.ndarray[Any, Any] = (1 / np.sqrt((wide * wide).sum(axis=2) / max(1, wide.shape[2]) + eps)).astype(
            eps.dtype
        )
    return rstd
