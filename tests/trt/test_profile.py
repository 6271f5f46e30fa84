"""The range of shapes that an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from deploynorm.errors import InputError
from deploynorm.inputs import TensorSpec
from deploynorm.trt.settings import Range, ranges

X = TensorSpec("x", ("N", 3, "H", "W"), "float32")
Z = TensorSpec("z", ("N", "?"), "float32")
FIXED = TensorSpec("fixed", (2, 3), "float32")


def call(specs: tuple[TensorSpec, ...], **shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Range]:
    return ranges(specs, **{key: shapes.get(key, {}) for key in ("minimum", "optimum", "maximum")})


SMALL, MIDDLE, LARGE = (1, 3, 8, 8), (4, 3, 16, 16), (8, 3, 32, 32)

CASES: dict[str, tuple[dict[str, Any], Range]] = {
    "all three": (
        {"minimum": {"x": SMALL}, "optimum": {"x": MIDDLE}, "maximum": {"x": LARGE}},
        Range(SMALL, MIDDLE, LARGE),
    ),
    "the only input needs no name": ({"minimum": {"": SMALL}, "maximum": {"": LARGE}}, Range(SMALL, LARGE, LARGE)),
    "opt alone": ({"optimum": {"x": MIDDLE}}, Range((1, 3, 16, 16), MIDDLE, MIDDLE)),
    "max alone": ({"maximum": {"x": LARGE}}, Range((1, 3, 32, 32), LARGE, LARGE)),
    "min alone": ({"minimum": {"x": MIDDLE}}, Range(MIDDLE, MIDDLE, MIDDLE)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_given_follows_from_what_is(name: str) -> None:
    shapes, want = CASES[name]
    assert call((X,), **shapes) == {"x": want}


def test_fixed_inputs_need_nothing() -> None:
    assert call((FIXED,)) == {"fixed": Range((2, 3), (2, 3), (2, 3))}
    assert call((FIXED,), optimum={"": (2, 3)}) == call((FIXED,))


def test_a_batch_that_is_fixed_stays() -> None:
    spec = TensorSpec("x", (2, 3, "H"), "float32")
    assert call((spec,), optimum={"x": (2, 3, 9)}) == {"x": Range((2, 3, 9), (2, 3, 9), (2, 3, 9))}


def test_an_unnamed_axis_is_free_of_all_others() -> None:
    found = call((X, Z), maximum={"x": LARGE, "z": (8, 5)})
    assert found["z"] == Range((1, 5), (8, 5), (8, 5))


REFUSED: dict[str, tuple[tuple[TensorSpec, ...], dict[str, Any], str]] = {
    "no range": (
        (X,),
        {},
        r"input x: some of its axes are dynamic, and no range was given.*Nx3xHxW.*--min-shapes.* x:8x3x8x8",
    ),
    "no range for the second": ((X, Z), {"maximum": {"x": LARGE}}, r"input z: some of its axes are dynamic"),
    "another rank": (
        (X,),
        {"optimum": {"x": (1, 3, 8)}},
        r"--min-shapes|--opt-shapes: does not fit input x. Got 1x3x8",
    ),
    "another channel count": (
        (X,),
        {"optimum": {"x": (1, 4, 8, 8)}},
        r"does not fit input x. Got 1x4x8x8; expected Nx3xHxW",
    ),
    "a fixed input of another shape": ((FIXED,), {"maximum": {"": (2, 4)}}, r"--max-shapes: does not fit input fixed"),
    "upside down": (
        (X,),
        {"minimum": {"x": LARGE}, "maximum": {"x": SMALL}},
        r"not in order. Got min 8x3x32x32, opt 1x3x8x8",
    ),
    "opt past max": ((X,), {"optimum": {"x": LARGE}, "maximum": {"x": MIDDLE}}, r"not in order.*min <= opt <= max"),
    "an unknown input": (
        (X,),
        {"optimum": {"q": SMALL}},
        r"--opt-shapes: no input is called 'q'. Got 'q'; expected \['x'\]",
    ),
    "no name and two inputs": ((X, Z), {"maximum": {"": SMALL}}, r"a shape without a name, but several inputs"),
    "two sizes of one name": (
        (X, Z),
        {"minimum": {"x": SMALL, "z": (1, 5)}, "maximum": {"x": LARGE, "z": (4, 5)}},
        r"two sizes for 'N'. Got 8 and 4 of input z",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ranges_that_cannot_be_are_refused(name: str) -> None:
    specs, shapes, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        call(specs, **shapes)
