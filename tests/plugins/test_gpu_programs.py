"""The programs of tests/gpu, which no GPU was there to run: they compile with nvcc, and run on the emulation."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated import build_host, compile_for_the_cpu

from deploynorm import libraries

EVERY_VARIANT = Path(__file__).parents[1] / "gpu" / "every_variant.cu"
KERNELS = libraries.source_folder() / "kernels"


@pytest.fixture
def nvcc(require: Callable[[str], None]) -> str:
    require("nvcc")
    return str(libraries.find_cuda().nvcc)


def test_every_variant_runs_on_the_emulation(emulated_library: Path, tmp_path: Path) -> None:
    linked = [f"-I{KERNELS}", "-x", "none", emulated_library, f"-Wl,-rpath,{emulated_library.parent}"]
    program = compile_for_the_cpu(tmp_path / "every_variant", EVERY_VARIANT, *linked)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" backward\n")


def test_every_variant_compiles_for_a_gpu(nvcc: str, tmp_path: Path) -> None:
    command = [nvcc, "-std=c++17", "-lineinfo", "-arch=sm_90", f"-I{KERNELS}", "-c", str(EVERY_VARIANT)]
    done = subprocess.run([*command, "-o", str(tmp_path / "every_variant.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_host_of_the_plugin_compiles_for_a_gpu(nvcc: str, require: Callable[[str], None], tmp_path: Path) -> None:
    require("trt-headers")
    assert build_host(tmp_path, Path(os.environ["TENSORRT_INCLUDE_DIR"]), nvcc=Path(nvcc)).is_file()
