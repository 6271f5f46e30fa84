"""What the tests of the doctor share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deploynorm.libraries import find_tools


@pytest.fixture
def compile_library(require: Callable[[str], None], tmp_path: Path) -> Callable[..., Path]:
    """compile_library("libname.so.1", source, *options): a shared library of C, in a folder of its own."""
    require("compiler")

    def compile_library(name: str, source: str, *options: str, folder: Path = tmp_path / "lib") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source.c").write_text(source)
        words = ["-shared", "-fPIC", "-x", "c", tmp_path / "source.c", "-x", "none", *options, "-o", folder / name]
        subprocess.run([str(word) for word in (find_tools().compiler, *words)], check=True)
        return folder / name

    return compile_library
