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

HEIGHT = TensorSpec("x", (2, 3, "H"), "float32")

CASES: dict[str, tuple[tuple[TensorSpec, ...], dict[str, Any], dict[str, Range]]] = {
    "all three": (
        (X,),
        {"minimum": {"x": SMALL}, "optimum": {"x": MIDDLE}, "maximum": {"x": LARGE}},
        {"x": Range(SMALL, MIDDLE, LARGE)},
    ),
    "the only input needs no name": (
        (X,),
        {"minimum": {"": SMALL}, "maximum": {"": LARGE}},
        {"x": Range(SMALL, LARGE, LARGE)},
    ),
    "opt alone": ((X,), {"optimum": {"x": MIDDLE}}, {"x": Range((1, 3, 16, 16), MIDDLE, MIDDLE)}),
    "max alone": ((X,), {"maximum": {"x": LARGE}}, {"x": Range((1, 3, 32, 32), LARGE, LARGE)}),
    "min alone": ((X,), {"minimum": {"x": MIDDLE}}, {"x": Range(MIDDLE, MIDDLE, MIDDLE)}),
    "fixed inputs need nothing": ((FIXED,), {}, {"fixed": Range((2, 3), (2, 3), (2, 3))}),
    "and may have it": ((FIXED,), {"optimum": {"": (2, 3)}}, {"fixed": Range((2, 3), (2, 3), (2, 3))}),
    "a batch that is fixed stays": (
        (HEIGHT,),
        {"optimum": {"x": (2, 3, 9)}},
        {"x": Range((2, 3, 9), (2, 3, 9), (2, 3, 9))},
    ),
    "an unnamed axis is free of all others": (
        (X, Z),
        {"maximum": {"x": LARGE, "z": (8, 5)}},
        {"x": Range((1, 3, 32, 32), LARGE, LARGE), "z": Range((1, 5), (8, 5), (8, 5))},
    ),
}


@pytest.mark.parametrize(("specs", "shapes", "want"), CASES.values(), ids=CASES)
def test_what_is_not_given_follows_from_what_is(
    specs: tuple[TensorSpec, ...], shapes: dict[str, Any], want: dict[str, Range]
) -> None:
    assert call(specs, **shapes) == want


REFUSED: dict[str, tuple[tuple[TensorSpec, ...], dict[str, Any], str]] = {
    "no range": (
        (X,),
        {},
        "input x: some of its axes are dynamic, and no range.*Nx3xHxW.*--min-shapes.* x:8x3x8x8",
    ),
    "no range for the second": ((X, Z), {"maximum": {"x": LARGE}}, "input z: some of its axes are dynamic"),
    "another rank": ((X,), {"optimum": {"x": (1, 3, 8)}}, "--opt-shapes: does not fit input x. Got 1x3x8"),
    "another channel count": ((X,), {"optimum": {"x": (1, 4, 8, 8)}}, "input x. Got 1x4x8x8; expected Nx3xHxW"),
    "a fixed input of another shape": ((FIXED,), {"maximum": {"": (2, 4)}}, "--max-shapes: does not fit input fixed"),
    "upside down": (
        (X,),
        {"minimum": {"x": LARGE}, "maximum": {"x": SMALL}},
        "Got min 8x3x32x32, opt 1x3x8x8",
    ),
    "opt past max": ((X,), {"optimum": {"x": LARGE}, "maximum": {"x": MIDDLE}}, "not in order.*min <= opt <= max"),
    "an unknown input": ((X,), {"optimum": {"q": SMALL}}, r"--opt-shapes: no input is called 'q'.*expected \['x'\]"),
    "no name and two inputs": ((X, Z), {"maximum": {"": SMALL}}, "a shape without a name, but several inputs"),
    "two sizes of one name": (
        (X, Z),
        {"minimum": {"x": SMALL, "z": (1, 5)}, "maximum": {"x": LARGE, "z": (4, 5)}},
        "two sizes for 'N'. Got 8 and 4 of input z",
    ),
}


@pytest.mark.parametrize(("specs", "shapes", "message"), REFUSED.values(), ids=REFUSED)
def test_ranges_that_cannot_be_are_refused(specs: tuple[TensorSpec, ...], shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(specs, **shapes)
