"""The kernel on shapes, layouts and values that nobody thought of: always the same ones, so that CI is steady."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
from cases import NUMPY_DTYPES, NormCase, tolerance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import Array, Into, Kernel, ParallelFor

from deploynorm.contract import DTYPES
from deploynorm.reference import filter_response_norm

VALUES = ("normal", "tiny", "subnormal", "large", "mixed", "zeros", "outlier", "nan", "infinity", "any bits")
"""What a plane is filled with."""

# Whose square is a finite number of the arithmetic's type, also when many are added up.
SAFE = {"float32": 1e17, "float16": 65504.0, "bfloat16": 1e17, "float64": 1e150}


@dataclass(frozen=True)
class Example:
    """One call: everything is drawn, but the numbers, which come out of a generator with a drawn seed."""

    shape: tuple[int, ...]
    dtype: str
    block: int
    values: tuple[str, ...]
    threshold: str
    residual: str | None
    into: Into
    variant: int
    threads: int
    shift: int
    seed: int


sizes = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 3, 7, 8, 14, 16, 17, 31, 32, 33]))


@st.composite
def examples(draw: st.DrawFn) -> Example:
    rank = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 70)), *(draw(sizes) for _ in range(rank - 2))]
    if rank > 2 and draw(st.integers(0, 9)) == 0:
        # Past the sizes at which a plane is shared out among the threads.
        shape[1:] = [draw(st.integers(1, 20)), *[1] * (rank - 3), draw(st.integers(30_000, 100_000))]
    while prod(shape) > 200_000:
        shape[int(np.argmax(shape))] //= 2
    if draw(st.integers(0, 19)) == 0:
        shape[draw(st.integers(0, rank - 1))] = 0
    residual = draw(st.sampled_from([None, *VALUES]))
    block = draw(st.one_of(st.just(1), st.just(max(1, shape[1])), st.sampled_from([2, 3, 4, 5, 8, 16, 64, 67])))
    return Example(
        shape=tuple(shape),
        dtype=draw(st.sampled_from(DTYPES)),
        block=block,
        values=tuple(draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=4))),
        threshold=draw(st.sampled_from(["some", "none", "mixed", "nan"])),
        residual=residual,
        into=draw(st.sampled_from(get_args(Into) if residual is not None else ("y", "x"))),
        variant=draw(st.integers(0, 2)),
        threads=draw(st.integers(0, 4)),
        shift=draw(st.integers(0, 7)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def a_plane(kind: str, size: int, dtype: str, rng: np.random.Generator) -> Array:
    kind_of_number = ml_dtypes.finfo(NUMPY_DTYPES[dtype])
    x = rng.standard_normal(size)
    if kind == "any bits":
        return rng.integers(0, 256, size * NUMPY_DTYPES[dtype].itemsize, dtype=np.uint8).view(NUMPY_DTYPES[dtype])
    if kind == "tiny":
        x *= float(kind_of_number.smallest_normal) * 4
    elif kind == "subnormal":
        x = rng.integers(-100, 101, size) * float(kind_of_number.smallest_subnormal)
    elif kind == "large":
        x = np.clip(x, -3, 3) * SAFE[dtype] / 3
    elif kind == "mixed":
        x *= 10.0 ** rng.uniform(-12, np.log10(SAFE[dtype]) - 1, size)
    elif kind == "zeros":
        x = np.where(x < 0, -0.0, 0.0)
    elif size and kind in ("outlier", "nan", "infinity"):
        value = {"outlier": SAFE[dtype], "nan": np.nan, "infinity": np.inf}[kind]
        x[rng.integers(size)] = value * rng.choice([-1, 1])
    limit = float(kind_of_number.max)
    return np.where(np.isfinite(x), np.clip(x, -limit, limit), x).astype(NUMPY_DTYPES[dtype])


def a_tensor(shape: tuple[int, ...], kinds: tuple[str, ...], dtype: str, rng: np.random.Generator) -> Array:
    planes, size = prod(shape[:2]), prod(shape[2:])
    each = [a_plane(kinds[plane % len(kinds)], size, dtype, rng) for plane in range(planes)]
    return np.array(each, NUMPY_DTYPES[dtype]).reshape(shape)


def parameters_of(example: Example, rng: np.random.Generator) -> list[Array]:
    channels = example.shape[1]
    tau = rng.normal(0, 0.5, channels)
    if example.threshold == "none":
        tau[:] = -np.inf
    elif example.threshold == "mixed":
        tau[::2] = -np.inf
    elif example.threshold == "nan":
        tau[::3] = np.nan
    gamma = rng.normal(1, 0.5, channels)
    parameters = (gamma, rng.normal(0, 0.5, channels), tau, 10 ** rng.uniform(-12, 1, channels))
    return [p.astype(np.float64 if example.dtype == "float64" else np.float32) for p in parameters]


def check(example: Example, kernel: Kernel) -> None:
    rng = np.random.default_rng(example.seed)
    x = a_tensor(example.shape, example.values, example.dtype, rng)
    gamma, beta, tau, eps = parameters_of(example, rng)
    residual = None if example.residual is None else a_tensor(example.shape, (example.residual,), example.dtype, rng)
    options: dict[str, Any] = {"residual": residual, "block": example.block, "into": example.into}
    got = kernel(
        *(x, gamma, beta, tau, eps),
        **options,
        variant=kernel.variants[example.variant % len(kernel.variants)],
        parallel_for=ParallelFor(threads=example.threads) if example.threads else None,
        shift=example.shift,
    ).astype(np.float64)

    column = (1, -1) + (1,) * (x.ndim - 2)
    spatial = tuple(range(2, x.ndim))
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        # The square of a larger number may be an infinity in the kernel's arithmetic, and that of its scale 0: such a
        # plane is beta (and what is added) where x is finite, or the definition's where the sum held.
        overflows = (np.isfinite(wide) & (np.abs(wide) > SAFE[example.dtype])).any(axis=spatial, keepdims=True)
        none = np.full_like(tau, -np.inf)
        y = filter_response_norm(wide, *(p.astype(np.float64) for p in (gamma, beta, none, eps)))
        lost = np.where(np.isfinite(wide), beta.astype(np.float64).reshape(column), np.nan)
        wants = []
        for before in (y, lost):
            value = before if residual is None else before + residual.astype(np.float64)
            threshold = tau.astype(np.float64).reshape(column)
            wants.append(np.where(value < threshold, threshold, value))
    definition = is_near(got, wants[0], example.dtype)
    allowed = definition | (overflows & is_near(got, wants[1], example.dtype))
    if not allowed.all():
        at = tuple(int(i) for i in np.argwhere(~allowed)[0])
        raise AssertionError(f"{example}: at {at} of x {x[at]!r} got {got[at]!r}, want {wants[0][at]!r}")


def is_near(got: Array, wanted: Array, dtype: str) -> Array:
    """Within the type's tolerance; a number beyond the largest of the type may be that or an infinity."""
    bound = tolerance(NormCase("", got.shape, dtype))
    limit = float(ml_dtypes.finfo(NUMPY_DTYPES[dtype]).max)
    with np.errstate(all="ignore"):
        far = (np.abs(wanted) * (1 + bound.rtol) >= limit) & (np.abs(got) >= limit * (1 - bound.rtol))
        near = np.abs(got - wanted) <= bound.atol + bound.rtol * np.abs(wanted)
        same: Array = near | (far & (np.sign(got) == np.sign(wanted))) | (got == wanted)
        return same | (np.isnan(got) & np.isnan(wanted))


@pytest.mark.slow
@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(example=examples())
def test_any_call_is_the_definition_within_the_tolerance(example: Example, kernel: Kernel) -> None:
    check(example, kernel)
