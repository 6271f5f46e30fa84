"""Compilers for tests that build our libraries and do not look at their speed: optimization is most of a build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploynorm import libraries


def unoptimized(folder: Path) -> str:
    """A C++ compiler, as $CXX takes it, that does not optimize."""
    script = folder / "unoptimized"
    script.write_text(f'#!/bin/sh\nexec {libraries.find_tools().compiler} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


@contextmanager
def unoptimized_kernels() -> Iterator[None]:
    """Builds inside the block optimize CUDA's kernels as little as they can; what stands around them is as ever."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NVCC_APPEND_FLAGS", "-Xcicc -O1 -Xptxas -O0")
        yield
