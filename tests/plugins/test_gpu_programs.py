"""The program that compute-sanitizer runs on a GPU: nvcc compiles it, and the emulation runs it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated import compile_for_the_cpu

from deploynorm import libraries

EVERY_VARIANT = Path(__file__).parents[1] / "gpu" / "every_variant.cu"
KERNELS = libraries.source_folder() / "kernels"


@pytest.mark.slow
def test_every_variant_runs_on_the_emulation(emulated_library: Path, tmp_path: Path) -> None:
    linked = [f"-I{KERNELS}", "-x", "none", emulated_library, f"-Wl,-rpath,{emulated_library.parent}"]
    program = compile_for_the_cpu(tmp_path / "every_variant", EVERY_VARIANT, *linked)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" backward\n")


def test_every_variant_compiles_for_a_gpu(require: Callable[[str], None], tmp_path: Path) -> None:
    require("nvcc")
    words = [libraries.find_cuda().nvcc, "-std=c++17", "-lineinfo", "-arch=sm_90", f"-I{KERNELS}", "-c", EVERY_VARIANT]
    done = subprocess.run([*map(str, words), "-o", str(tmp_path / "every_variant.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
