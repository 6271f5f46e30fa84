"""The operator library, and its kernel through the C interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from foreign import ForeignKernel
from kernels import Kernel

from deploynorm.libraries import library_path


@pytest.fixture(scope="session")
def library(require: Callable[[str], None]) -> Path:
    """Skips the test where the library is not built, or fails it where DEPLOYNORM_REQUIRE names native."""
    require("native")
    return library_path()


@pytest.fixture(scope="session")
def foreign() -> Iterator[Kernel | None]:
    """The kernels of both passes for another processor, where .ci/aarch64 says how to run them."""
    command = os.environ.get("DEPLOYNORM_FOREIGN_KERNELS")
    kernel = ForeignKernel(command) if command else None
    yield kernel
    if kernel is not None:
        kernel.close()


@pytest.fixture(scope="session")
def kernel(library: Path, foreign: Kernel | None) -> Kernel:
    return foreign or Kernel(library)
