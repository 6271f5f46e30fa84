"""One thing that is wrong or missing, and the remedies that several share."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from deploynorm.doctor.facts import Examination, Library
from deploynorm.libraries import LIBRARIES, TENSORRT_LIBRARY

__all__ = ["BUILD_CUDA", "DRIVERS", "ROWS", "Finding", "dotted", "missing_exports", "sound"]


class Finding(NamedTuple):
    """A known failure, met on this machine."""

    level: Literal["broken", "note"]
    """Whether something that is installed does not work, or something would be faster or possible."""

    name: str
    problem: str
    remedy: str


ROWS: Final = {row.file: row for row in LIBRARIES.values()}
"""What is known of each library of ours, by its file name."""

BUILD_CUDA: Final = ROWS[TENSORRT_LIBRARY].command

DRIVERS: Final = {11: "450.80", 12: "525.60", 13: "580.65"}
"""The first driver for Linux that runs programs of each major version of CUDA. Source: CUDA's release notes."""


def missing_exports(library: Library) -> list[str]:
    """What its host looks for in the library, and does not find."""
    return [name for name in ROWS[library.name].exports if name not in library.exports]


def sound(library: Library | None, facts: Examination) -> bool:
    """Whether a library is there and nothing is wrong with it by itself."""
    if library is None or library.problem is not None or missing_exports(library):
        return False
    return facts.machine in (None, library.machine)


def dotted(version: tuple[int, int]) -> str:
    """12.8 for (12, 8)."""
    return f"{version[0]}.{version[1]}"
