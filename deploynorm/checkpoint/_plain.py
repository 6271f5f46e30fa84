"""Harmless stand-ins for what training scripts put beside the weights: numbers of NumPy, and their parsed options."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any, Final

import numpy as np


class NumberType:
    """Takes the place of numpy.dtype, whose own reading of a pickle trusts what it says."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _number(kind: NumberType, data: bytes) -> Any:
    """A number of NumPy's, as Python's."""
    if not re.fullmatch(r"[<>=|][biuf][1248]", f"{kind.order}{kind.code}"):
        raise ValueError(f"{kind.code!r} is not a type of numbers")
    (number,) = np.frombuffer(data, np.dtype(f"{kind.order}{kind.code}"))
    return number.item()


PLAIN: Final[dict[str, Callable[..., Any]]] = {
    "numpy.dtype": NumberType,
    "numpy._core.multiarray.scalar": _number,
    "numpy.core.multiarray.scalar": _number,  # as NumPy before 2.0 wrote it
    "argparse.Namespace": Namespace,
}
"""What a pickle may name besides tensors and networks, and what is called in its place."""
