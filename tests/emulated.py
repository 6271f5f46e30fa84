"""The CUDA kernels, the TensorRT plugin and a host for it, compiled for a machine without CUDA and TensorRT.

All are the sources as they are, over tests/emulation; the host also compiles for a GPU. The last two need TensorRT's
headers.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from deploynorm.plugins import find_tools, source_folder


def _compile(target: Path, *words: str | Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*map(str, words), "-shared", "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def _emulation(headers: Path | None = None) -> list[str | Path]:
    """A compiler, and its options for CUDA on the CPU."""
    options = [
        "-std=c++20",
        "-O2",
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


def build_kernels(folder: Path, source: Path | None = None) -> Path:
    """The kernels and their C interface, with checks.

    Args:
        folder: Where the library goes.
        source: Another frn.cu than ours.
    """
    source = source_folder() / "kernels" / "frn.cu" if source is None else source
    return _compile(folder / "libemulated.so", *_emulation(), "-x", "c++", source, *_CHECKS)


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
