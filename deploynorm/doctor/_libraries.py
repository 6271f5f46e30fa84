"""Findings about our own libraries."""

from __future__ import annotations

from collections.abc import Iterator

from deploynorm.doctor.facts import Examination, Library
from deploynorm.doctor.finding import BUILD_CUDA, ROWS, Finding, missing_exports
from deploynorm.libraries import TENSORRT_REGISTER_LIBRARY

__all__ = ["libraries"]


def libraries(facts: Examination) -> Iterator[Finding]:
    for library in facts.libraries:
        rebuild = _rebuild(library)
        missing = missing_exports(library)
        if library.machine and facts.machine and library.machine != facts.machine:
            yield Finding(
                "broken",
                "library-machine",
                f"{library.path} is for {library.machine}, and this Python is for {facts.machine}",
                rebuild,
            )
        elif not library.machine:
            yield Finding("broken", "library-unreadable", f"{library.path}: {library.problem}", rebuild)
        elif missing:
            yield Finding(
                "broken",
                "library-not-ours",
                f"{library.path} does not export {' and '.join(missing)}: it is not our {library.name}",
                rebuild,
            )
        elif library.problem is not None:
            yield Finding(
                "broken", "library-does-not-load", f"{library.path} cannot be loaded: {library.problem}", rebuild
            )
        if library.outdated:
            yield Finding(
                "note",
                "library-stale",
                f"{library.path} was installed before the sources in this clone were last changed",
                rebuild,
            )
    for row in ROWS.values():
        if row.file == TENSORRT_REGISTER_LIBRARY or facts.library(row.file) is not None:
            continue
        needs = []
        if facts.compiler is None:
            needs.append("install g++ or clang++, pip install cmake ninja")
        if row.needs_cuda and facts.nvcc is None:
            needs.append("pip install 'deploynorm[cuda]'")
        stale = "; what was built here is of other sources and is not used" if facts.stale else ""
        yield Finding(
            "note",
            "library-missing",
            f"{row.file} is not built: it brings {row.brings}{stale}",
            ", then ".join([*needs, row.command]),
        )


def _rebuild(library: Library) -> str:
    """A new build, with CUDA where there was some."""
    return BUILD_CUDA if library.code else ROWS[library.name].command
