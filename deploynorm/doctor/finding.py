"""One thing that is wrong or missing, and the remedies that several share."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from deploynorm.doctor.facts import Examination, Library
from deploynorm.libraries import ORT_LIBRARY, TENSORRT_LIBRARY, TENSORRT_REGISTER_LIBRARY, TORCH_LIBRARY

__all__ = ["BUILD", "BUILD_CUDA", "DRIVERS", "Finding", "dotted", "missing_exports", "sound"]


class Finding(NamedTuple):
    """A known failure, met on this machine."""

    level: Literal["broken", "note"]
    """Whether something that is installed does not work, or something would be faster or possible."""

    name: str
    problem: str
    remedy: str


BUILD: Final = {
    ORT_LIBRARY: "deploynorm plugins build",
    TORCH_LIBRARY: "deploynorm plugins build",
    TENSORRT_LIBRARY: "deploynorm plugins build --cuda",
    TENSORRT_REGISTER_LIBRARY: "deploynorm plugins build --cuda",
}
"""How to get each library. What is built goes into a cache, and is preferred to what is installed."""

BUILD_CUDA: Final = BUILD[TENSORRT_LIBRARY]

DRIVERS: Final = {11: "450.80", 12: "525.60", 13: "580.65"}
"""The first driver for Linux that runs programs of each major version of CUDA. Source: CUDA's release notes."""

_EXPORTS: Final = {
    ORT_LIBRARY: ("RegisterCustomOps",),
    TORCH_LIBRARY: ("deploynorm_frn_cpu", "deploynorm_frn_backward_cpu"),
    TENSORRT_LIBRARY: ("getCreators", "setLoggerFinder"),
    TENSORRT_REGISTER_LIBRARY: (),
}
"""What the hosts look for in each library."""


def missing_exports(library: Library) -> list[str]:
    return [name for name in _EXPORTS[library.name] if name not in library.exports]


def sound(library: Library | None, facts: Examination) -> bool:
    """Whether a library is there and nothing is wrong with it by itself."""
    if library is None or library.problem is not None or missing_exports(library):
        return False
    return facts.machine in (None, library.machine)


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
