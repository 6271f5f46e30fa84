"""The CUDA kernels as the compiler leaves them, without a GPU: what each case of gpu.py launches on an H100, and how.

    PYTHONPATH=. python benchmarks/gpu_code.py --before OLD/plugins/kernels --out benchmarks/results/gpu_code.json

For ResNet-50's shapes with 32 images, a row has the kernel, how many vectors a thread holds or blocks a cluster has,
the threads of a block, their registers and the bytes they spill, how many blocks have room on a multiprocessor, the
instructions before the first load of a tensor, and how often the bytes of x are moved, by all tensors together. Nothing
is timed.
Needs nvcc and, for the instructions, nvdisasm (`pip install nvidia-cuda-nvdisasm`).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from deploynorm import libraries
from deploynorm.libraries.kernels import TYPES, Backward, Forward, open_kernels

__all__ = ["Compiled", "Launch", "Resources", "compile_kernels", "rows"]

SHAPES = ((64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 28, 28), (512, 28, 28), (256, 14, 14), (1024, 14, 14),
          (512, 7, 7), (2048, 7, 7))  # fmt: skip
BATCH = 32
DTYPES = ("float32", "bfloat16")
SOURCES = ("frn.cu", "frn_backward.cu")

# Of a multiprocessor of compute capability 9.0.
REGISTERS: Final = 65536
THREADS: Final = 2048
BLOCKS: Final = 32
SHARED_BYTES: Final = 228 * 1024
SHARED_BYTES_OF_A_BLOCK: Final = 1024
"""Which the system takes of each."""


class Resources:
    """Of a kernel, by ptxas.

    Attributes:
        first_load: Instructions before the first load of a tensor; None without nvdisasm.
    """

    def __init__(self, name: str, report: str) -> None:
        self.name = name
        self.registers = int(_found(r"Used (\d+) registers", report))
        self.spilled = int(_found(r"(\d+) bytes spill stores", report))
        self.shared = int(_found(r"(\d+) bytes smem", report, "0"))
        self.first_load: int | None = None

    def blocks(self, threads: int, dynamic: int) -> int:
        """How many, with so many bytes of dynamic shared memory, have room on a multiprocessor at once."""
        warps = threads // 32
        by_registers = REGISTERS // (math.ceil(self.registers * 32 / 256) * 256) // warps
        by_shared = SHARED_BYTES // (self.shared + dynamic + SHARED_BYTES_OF_A_BLOCK)
        return min(BLOCKS, THREADS // threads, by_registers, by_shared)


class Launch(NamedTuple):
    """Of a kernel.

    Attributes:
        cluster: Blocks of a cluster; 1 without any.
        dynamic: Bytes of dynamic shared memory of a block.
    """

    kernel: Resources
    threads: int
    cluster: int
    dynamic: int

    @property
    def blocks(self) -> int:
        """How many have room on a multiprocessor at once."""
        return self.kernel.blocks(self.threads, self.dynamic)


class Compiled:
    """The kernels of a folder of sources: `resources` by mangled name, and what a call launches."""

    def __init__(self, library: Path, resources: dict[str, Resources]) -> None:
        self.resources = resources
        self._functions = open_kernels(library)
        self._functions.take_launches.restype = ctypes.c_char_p

    def launches(self, which: str, shape: tuple[int, ...], layout: str, dtype: str) -> Iterator[Launch]:
        """What a call launches."""
        sizes = (shape[0], shape[1], math.prod(shape[2:]), shape[1] if layout == "nhwc" else 1, TYPES[dtype])
        somewhere = 4096  # no kernel runs, so that nothing is there
        fields = (Forward if which == "forward" else Backward)._fields_
        given = {name: somewhere for name, kind in fields if kind is ctypes.c_void_p and name != "residual"}
        call = (Forward if which == "forward" else Backward)(*sizes, **given)
        function = "deploynorm_frn_cuda" if which == "forward" else "deploynorm_frn_backward_cuda"
        code = getattr(self._functions, function)(ctypes.byref(call), somewhere, None, None)
        if code != 0:
            raise RuntimeError(f"CUDA error {code} for {shape} {layout} {dtype}")
        for line in self._functions.take_launches().decode().splitlines():
            name, *sizes = line.split()
            yield Launch(self.resources[name], *map(int, sizes))


def _found(pattern: str, text: str, otherwise: str | None = None) -> str:
    match = re.search(pattern, text)
    if match is None and otherwise is not None:
        return otherwise
    assert match is not None, pattern
    return match[1]


def compile_kernels(sources: Path, folder: Path) -> Compiled:
    """Compiles for sm_90, as plugins/CMakeLists.txt does."""
    nvcc = libraries.find_cuda().nvcc
    words = ["-std=c++17", "-O3", "-arch=sm_90", "-Xcompiler=-fPIC", "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
    resources: dict[str, Resources] = {}
    objects = [folder / f"{name}.o" for name in SOURCES]
    running = [
        subprocess.Popen(
            [str(nvcc), *words, "-c", str(sources / name), "-o", str(target)], stderr=subprocess.PIPE, text=True
        )
        for name, target in zip(SOURCES, objects, strict=True)
    ]
    for process in running:
        report = process.communicate()[1]
        if process.returncode != 0:
            sys.exit(report)
        for part in report.split("Compiling entry function ")[1:]:
            name = part.split("'")[1]
            resources[name] = Resources(name, part)
    for cubin in folder.glob("*.cubin"):
        for name, first in _first_loads(cubin).items():
            resources[name].first_load = first
    library = folder / "libcode.so"
    recorder = Path(__file__).with_name("gpu_code.cpp")
    command = [nvcc, "-shared", "-cudart=none", "-Xcompiler=-fPIC", recorder, *objects, "-o", library]
    subprocess.run([*map(str, command)], check=True)
    return Compiled(library, resources)


def _first_loads(cubin: Path) -> dict[str, int]:
    """Kernel -> instructions before its first load of a tensor: one of 16 bytes, where it has any. Empty without
    nvdisasm."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    nvdisasm = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=str(packaged))
    if nvdisasm is None:
        return {}
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
    found = {}
    for part in re.split(r"^\.text\.", done.stdout, flags=re.MULTILINE)[1:]:
        loads = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?LDG\.E(\S*)", part)
        wide = [address for address, kind in loads if kind.startswith(".128")]
        if loads:
            found[part.partition(":")[0]] = int(wide[0] if wide else loads[0][0], 16) // 16
    return found


def rows(compiled: Compiled) -> Iterator[dict[str, Any]]:
    """Of each case, the kernel that reads x and writes the output. A split's two are two rows."""
    for which in ("forward", "backward"):
        for shape in SHAPES:
            for layout in ("nchw", "nhwc"):
                for dtype in DTYPES:
                    for launch in compiled.launches(which, (BATCH, *shape), layout, dtype):
                        kernel = launch.kernel
                        short = re.search(r"frn_(packed|partial_sums|from_partial_sums|in_[a-z_]+)I", kernel.name)
                        if short is None:  # the sums over the samples
                            continue
                        held = re.search(r"in_(?:registers|runs).*Li(\d+)EEEv", kernel.name)
                        number = launch.cluster if launch.cluster > 1 else held[1] if held else ""
                        yield {
                            "pass": which,
                            "shape": "x".join(map(str, shape)),
                            "layout": layout,
                            "dtype": dtype,
                            "kernel": f"{short[1].removeprefix('in_')} {number}".rstrip(),
                            "threads": launch.threads,
                            "registers": kernel.registers,
                            "spilled": kernel.spilled,
                            "blocks": launch.blocks,
                            "first_load": kernel.first_load,
                            "moved": _moved(which, short[1]),
                        }


def _moved(which: str, kernel: str) -> int:
    """How often the bytes of x are read or written by such a kernel, of all tensors."""
    inputs = 1 if which == "forward" else 2
    return {"partial_sums": inputs, "in_two_passes": 2 * inputs + 1}.get(kernel, inputs + 1)


def show(row: dict[str, Any], before: list[dict[str, Any]]) -> str:
    case = [row[key] for key in ("pass", "shape", "layout", "dtype")]
    facts = ("kernel", "threads", "registers", "spilled", "blocks", "first_load", "moved")
    old = "".join(f" (before: {', '.join(str(each[key]) for key in facts)})" for each in before)
    return f"{' '.join(case):<40} {', '.join(str(row[key]) for key in facts)}{old}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="kernels of another commit, to be set beside these")
    options = parser.parse_args()
    sources = {"rows": libraries.source_folder() / "kernels"}
    if options.before is not None:
        sources = {"before": options.before} | sources
    results: dict[str, Any] = {"compiler": libraries.find_cuda().version}
    for name, folder in sources.items():
        with tempfile.TemporaryDirectory() as work:
            results[name] = list(rows(compile_kernels(folder, Path(work))))
    for row in results["rows"]:
        same = ("pass", "shape", "layout", "dtype")
        print(show(row, [each for each in results.get("before", []) if all(each[key] == row[key] for key in same)]))
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
