"""The CUDA kernels, the TensorRT plugin and a host for it, compiled for a machine without CUDA and TensorRT.

All are the sources as they are, over tests/emulation; the host also compiles for a GPU. The last two need TensorRT's
headers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deploynorm.libraries import find_tools, source_folder


def _compile(target: Path, *words: str | Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*map(str, words), "-shared", "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def _emulation(headers: Path | None = None) -> list[str | Path]:
    """A compiler, and its options for CUDA on the CPU."""
    options = [
        "-std=c++20",
        "-Og",  # compiles in less than half of the time of -O2, and runs nearly as fast
        "-fno-strict-aliasing",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    folders = [f"-I{Path(__file__).parent / 'emulation'}", *([] if headers is None else ["-isystem", str(headers)])]
    return [find_tools().compiler, *options, "-Wno-unknown-pragmas", *folders]


_CHECKS = ("-fsanitize=undefined", "-fno-sanitize-recover=all")
"""Of alignment, bounds and shifts; the first fault ends the process."""

KERNEL_SOURCES = ("frn.cu", "frn_backward.cu")


def build_kernels(folder: Path, sources: Sequence[Path] | None = None) -> Path:
    """The kernels and their C interface, with checks.

    Args:
        folder: Where the library goes.
        sources: Others than ours.
    """
    sources = [source_folder() / "kernels" / name for name in KERNEL_SOURCES] if sources is None else sources
    return _compile(folder / "libemulated.so", *_emulation(), "-x", "c++", *sources, *_CHECKS)


def build_broken_kernels(folder: Path, source: str, before: str, after: str) -> Path:
    """The kernels of one pass for float16 alone, which takes a third of the time, with a fault in their sources.

    Args:
        folder: Where the library goes.
        source: "frn.cu" or "frn_backward.cu".
        before: A text that stands once in all files of CUDA kernels.
        after: What stands there instead.
    """
    sources = folder / "kernels"
    sources.mkdir(parents=True)
    changed = 0
    for path in (source_folder() / "kernels").iterdir():
        text = path.read_text()
        if path.suffix in (".cu", ".cuh"):
            changed += text.count(before)
            text = text.replace(before, after)
            text = re.sub(r"return run\((float|double|__nv_bfloat16)\(\)\)", "return run(__half())", text)
        (sources / path.name).write_text(text)
    assert changed == 1, before
    return build_kernels(folder, [sources / source])


_FOR_EACH = """
import os, sys
from pathlib import Path
for library in sys.argv[1:]:
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        check(Path(library))
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def find_faults(libraries: Sequence[Path], check: str) -> list[bool]:
    """In which of the libraries a check finds a fault.

    Args:
        libraries: Each is looked at in a process of its own: some faults end it.
        check: Source of a function of this name, which raises an error if it finds one, and what it imports.
    """
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", check + _FOR_EACH, *map(str, libraries)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [status != "0" for status in done.stdout.split()]
    assert len(found) == len(libraries), done.stderr
    return found


def compile_for_the_cpu(target: Path, *words: str | Path) -> Path:
    """A program of these sources in CUDA C++, with checks."""
    command = [*_emulation(), "-x", "c++", *words, *_CHECKS, "-o", target]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def build_plugin(folder: Path, headers: Path) -> Path:
    """The plugin as it is, over the kernels in the emulation, with checks."""
    sources = [source_folder() / name for name in ("kernels/frn.cu", "tensorrt/frn_plugin.cpp")]
    exports = f"-Wl,--version-script={source_folder() / 'tensorrt' / 'exports.map'}"
    options = [*_CHECKS, exports, "-ldl"]
    return _compile(folder / "libdeploynorm_trt.so", *_emulation(headers), "-x", "c++", *sources, *options)


def build_host(folder: Path, headers: Path, name: str = "libnvinfer.so.10", nvcc: Path | None = None) -> Path:
    """The host, as a library of this name, since that is how a plugin knows in whom it is.

    Args:
        folder: Where it goes.
        headers: Folder of NvInferRuntime.h.
        name: Of the library.
        nvcc: The CUDA compiler, for a host with the memory of a GPU; None for the emulation.
    """
    source = Path(__file__).parent / "plugins" / "tensorrt_host.cpp"
    if nvcc is None:
        return _compile(folder / name, *_emulation(headers), source, "-ldl")
    options: list[str | Path] = [
        "-std=c++17",
        "-O2",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-cudart=static",
        "-isystem",
        headers,
    ]
    return _compile(folder / name, nvcc, *options, source, "-ldl")
