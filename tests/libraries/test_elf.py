"""Reading shared libraries, against what the compilers were asked for."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploynorm import libraries
from deploynorm.libraries.elf import CudaCode, _fat_binaries, machine_here, read_library, read_needed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ELF")

SOURCE = """
#include <math.h>
double imported(double);
static double internal(double x) { return x + 1; }
__attribute__((visibility("hidden"))) double hidden(double x) { return internal(x); }
double exported(double x) { return hidden(cos(x)); }
__attribute__((weak)) double exported_weakly(double x) { return imported(x); }
int a_variable = 3;
"""

KERNEL = """
#include <cuda_runtime.h>
__global__ void kernel_NAME(float* x) { x[threadIdx.x] *= 2; }
extern "C" int run_NAME(float* x) {
  void* arguments[] = {&x};
  return cudaLaunchKernel((void*)kernel_NAME, 1, 32, arguments, 0, 0);
}
"""


@pytest.fixture
def library(compile_library: Callable[..., Path]) -> Path:
    """One that exports and needs what SOURCE says."""
    return compile_library("lib.so", SOURCE, "-Wl,--no-as-needed", "-lm")


def test_what_a_library_needs_and_exports(library: Path) -> None:
    found = read_library(library)
    assert {"exported", "exported_weakly", "a_variable"} <= set(found.exports)
    assert not {"imported", "internal", "hidden", "cos"} & set(found.exports)
    assert {name.partition(".so")[0] for name in found.needed} >= {"libm", "libc"}
    assert found.needed == read_needed(library)
    assert found.machine == machine_here()
    assert found.code == ()


def test_the_same_as_readelf_says_of_our_own_library(require: Callable[[str], None]) -> None:
    require("native")
    path = libraries.library_path()
    try:
        found = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("readelf is not installed")
    needed = [line.partition("[")[2].rstrip("]") for line in found.splitlines() if "(NEEDED)" in line]
    assert list(read_library(path).needed) == needed
    assert "RegisterCustomOps" in read_library(path).exports


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["-Xfatbin=-compress-all"]], ids=["plain", "compressed"])
def test_code_for_gpus_is_that_which_nvcc_was_asked_for(
    options: list[str], require: Callable[[str], None], tmp_path: Path
) -> None:
    require("nvcc")
    cuda = libraries.find_cuda()
    sources = []
    for name in ("first", "second"):  # two files, so two containers in the section
        sources.append(tmp_path / f"{name}.cu")
        sources[-1].write_text(KERNEL.replace("NAME", name))
    asked = [("80", "sm_80"), ("90", "sm_90"), ("90", "compute_90"), ("120", "sm_120")]
    words = [f"-gencode=arch=compute_{virtual},code={real}" for virtual, real in asked]
    path = tmp_path / "lib.so"
    linked = ["-shared", "-cudart=static", "-Xcompiler=-fPIC", f"-L{cuda.nvcc.resolve().parents[1] / 'lib'}"]
    command = [cuda.nvcc, *linked, *options, *words, *sources, "-o", path]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read_library(path).code
    assert [code.name for code in found] == ["sm_80", "sm_90", "sm_120", "compute_90"]
    release = cuda.version.partition("release ")[2].partition(".")[0]
    assert [code.cuda for code in found] == [None, None, None, int(release)]


@pytest.mark.parametrize(
    ("kind", "made_for", "device", "runs"),
    [
        ("sm", (8, 0), (8, 0), True),
        ("sm", (8, 0), (8, 9), True),
        ("sm", (8, 6), (8, 0), False),
        ("sm", (8, 0), (9, 0), False),
        ("sm", (10, 0), (9, 0), False),
        ("sm", (10, 0), (12, 0), False),
        ("compute", (9, 0), (9, 0), True),
        ("compute", (9, 0), (12, 1), True),
        ("compute", (9, 0), (8, 9), False),
    ],
)
def test_which_code_runs_on_which_device(
    kind: str, made_for: tuple[int, int], device: tuple[int, int], runs: bool
) -> None:
    assert CudaCode(kind, made_for).runs_on(device) is runs  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"text", b"text " * 100, b"\x7fELF\x01\x01" + bytes(100)])
def test_what_is_no_library_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(content)
    for read in (read_library, read_needed):
        with pytest.raises(ValueError, match="no shared library"):
            read(path)
    with pytest.raises(OSError, match="missing"):
        read_library(tmp_path / "missing")


def test_a_damaged_library_is_refused_or_read_and_nothing_else(library: Path, tmp_path: Path) -> None:
    """Cut at many places, and with random bytes changed, in its header and its tables above all."""
    whole, damaged = library.read_bytes(), tmp_path / "damaged.so"
    refused = 0
    chance = random.Random(0)
    cuts = [whole[: len(whole) * i // 60] for i in range(60)]
    changed = []
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(8):
            limit = chance.choice([64, 4096, len(whole)])
            content[chance.randrange(limit)] = chance.randrange(256)
        changed.append(bytes(content))
    for content in (*cuts, *changed):
        damaged.write_bytes(content)
        try:
            read_library(damaged)
        except ValueError:
            refused += 1
    assert refused > len(cuts) - 5, "a file that was cut short has lost its table of sections"


def test_a_library_for_another_processor_is_read(library: Path, tmp_path: Path) -> None:
    content = bytearray(library.read_bytes())
    for number, name in ((183, "aarch64"), (62, "x86-64"), (243, "ELF machine 243")):
        content[18] = number
        path = tmp_path / "other.so"
        path.write_bytes(content)
        assert read_library(path).machine == name


@pytest.mark.parametrize(
    "damage", [(0, b"\xff\xff\xff\xff"), (6, b"\0\0"), (8, b"\xff" * 8), (20, b"\0\0\0\0"), (24, b"\xff" * 8)]
)
def test_damaged_code_for_gpus_is_refused_or_passed_over(damage: tuple[int, bytes]) -> None:
    entry = struct.pack("<HHIQQHHI", 2, 257, 64, 0, 0, 8, 1, 90).ljust(64, b"\0")
    content = bytearray(struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entry)) + entry)
    assert list(_fat_binaries(bytes(content))) == [CudaCode("sm", (9, 0))]
    at, value = damage
    content[at : at + len(value)] = value
    try:
        found = list(_fat_binaries(bytes(content)))
    except (ValueError, struct.error):
        return
    assert found in ([], [CudaCode("sm", (9, 0))])
