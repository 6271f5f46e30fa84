from __future__ import annotations

import numpy as np
import pytest

from deploynorm.errors import InputError
from deploynorm.inputs import TensorSpec
from deploynorm.run.base import check_feeds

IMAGE = TensorSpec("image", ("N", 3, "S", "S"), "float32")
MASK = TensorSpec("mask", ("N", "?", "?"), "bool")


def image(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


ACCEPTED = {
    "sizes that change": {"image": image(2, 3, 8, 8), "mask": image(2, 5, 6, dtype="bool")},
    "an empty batch": {"image": image(0, 3, 8, 8), "mask": image(0, 5, 5, dtype="bool")},
    "another order": {"mask": image(1, 1, 1, dtype="bool"), "image": image(1, 3, 1, 1)},
    "strided": {"image": image(4, 3, 8, 8)[::2], "mask": image(2, 5, 6, dtype="bool")},
}


@pytest.mark.parametrize("feeds", ACCEPTED.values(), ids=ACCEPTED)
def test_feeds_that_fit_pass(feeds: dict[str, np.ndarray]) -> None:
    check_feeds("here", (IMAGE, MASK), feeds)


GOOD = ACCEPTED["sizes that change"]
REFUSED = {
    "missing": ({"image": GOOD["image"]}, r"inputs missing: \['mask'\]. Got \['image'\]; expected \['image', 'mask'\]"),
    "unknown": ({**GOOD, "extra": GOOD["mask"]}, r"unknown inputs: \['extra'\]"),
    "not an array": ({**GOOD, "mask": [True]}, "input 'mask' is not a NumPy array. Got list"),
    "float64": ({**GOOD, "image": image(2, 3, 8, 8, dtype="float64")}, "wrong dtype. Got float64; expected float32"),
    "float16": ({**GOOD, "image": image(2, 3, 8, 8, dtype="float16")}, "wrong dtype. Got float16; expected float32"),
    "foreign bytes": (
        {**GOOD, "image": image(2, 3, 8, 8).astype(np.dtype("f4").newbyteorder())},
        "Got float32 in foreign byte order",
    ),
    "rank": ({**GOOD, "image": image(3, 8, 8)}, r"wrong rank. Got \(3, 8, 8\); expected \(N, 3, S, S\)"),
    "fixed size": ({**GOOD, "image": image(2, 4, 8, 8)}, r"wrong size on axis 1. Got \(2, 4, 8, 8\).*network fixes it"),
    "one symbol in one input": ({**GOOD, "image": image(2, 3, 8, 9)}, "axis 3.*'S' is already 8 on axis 2 of input"),
    "one symbol in two inputs": (
        {**GOOD, "mask": image(3, 5, 6, dtype="bool")},
        "input 'mask' has the wrong size on axis 0.*'N' is already 2 on axis 0 of input 'image'",
    ),
}


@pytest.mark.parametrize(("feeds", "message"), REFUSED.values(), ids=REFUSED)
def test_feeds_that_do_not_fit_are_refused_with_what_was_expected(feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_feeds("here", (IMAGE, MASK), feeds)
    assert str(caught.value).startswith("here: ")
    assert "Fix: " in str(caught.value)
    assert caught.value.exit_code == 2
