"""Compilers for tests that build our libraries and do not look at their speed: optimization is most of a build."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

from deploynorm import libraries

_COMPILER = """#!/bin/sh
case "$*" in
*" -c {sources}/"*)
    for word; do test "$before" != -o || object=$word; before=$word; done
    kept=$0-$(echo "$*" | md5sum | cut -c1-32).o
    exec 9> "$kept.lock" && flock 9 || exit
    if test -e "$kept"; then cp "$kept" "$object"; exit; fi
    {compiler} "$@" -O0 && cp "$object" "$kept.new" && mv "$kept.new" "$kept" ;;
*) exec {compiler} "$@" -O0 ;;
esac
"""


def unoptimized(folder: Path) -> None:
    """Puts `compiler` there, a C++ compiler that does not optimize, and compiles each of our sources once."""
    script = folder / "compiler"
    script.write_text(_COMPILER.format(compiler=libraries.find_tools().compiler, sources=libraries.source_folder()))
    script.chmod(0o755)


def build_cuda_libraries(folder: Path) -> None:
    """Our libraries with CUDA, and with PTX for one GPU, which compiles fastest; its kernels are hardly optimized."""
    with mock.patch.dict(os.environ, NVCC_APPEND_FLAGS="-Xcicc -O1 -Xptxas -O0"):
        libraries.build(folder, cuda=True, architectures=["90-virtual"])
