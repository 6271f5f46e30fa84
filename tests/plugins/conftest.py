"""The operator library, and its kernel through the C interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kernels import Kernel

from deploynorm.libraries import library_path


@pytest.fixture(scope="session")
def library(require: Callable[[str], None]) -> Path:
    """Skips the test where the library is not built, or fails it where DEPLOYNORM_REQUIRE names native."""
    require("native")
    return library_path()


@pytest.fixture(scope="session")
def kernel(library: Path) -> Kernel:
    return Kernel(library)
