"""A compiler for tests that build our libraries and do not look at what is in them."""

from __future__ import annotations

from pathlib import Path

from deploynorm import libraries

__all__ = ["unoptimized"]


def unoptimized(folder: Path) -> str:
    """A C++ compiler, as $CXX takes it, that leaves out the optimization, which is most of the time of a build."""
    script = folder / "unoptimized"
    script.write_text(f'#!/bin/sh\nexec {libraries.find_tools().compiler} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)
