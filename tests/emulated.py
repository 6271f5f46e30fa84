"""The CUDA kernels, the TensorRT plugin and hosts for it, compiled for a machine without CUDA and TensorRT.

All are the sources as they are, over tests/emulation. The plugin and the hosts need TensorRT's headers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deploynorm.libraries import TENSORRT_LIBRARY, find_tools, source_folder


def _compile(target: Path, *words: str | Path, shared: bool = True) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*map(str, words), *(["-shared"] if shared else []), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def _emulation() -> list[str | Path]:
    """A compiler, and its options for CUDA on the CPU."""
    # -Og compiles in less than half of the time of -O2, and runs nearly as fast.
    options = "-std=c++20 -Og -fno-strict-aliasing -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas"
    return [find_tools().compiler, *options.split(), f"-I{Path(__file__).parent / 'emulation'}"]


_CHECKS = ("-fsanitize=undefined", "-fno-sanitize-recover=all")
"""Of alignment, bounds and shifts; the first fault ends the process."""

_FEWER_CHECKS = ("-fsanitize=alignment", "-fno-sanitize-recover=all")
"""Without those that no broken kernel needs: an unaligned vector alone may go unseen."""

KERNEL_SOURCES = ("frn.cu", "frn_backward.cu")


def build_kernels(folder: Path, sources: Sequence[Path] = (), checks: Sequence[str] = _CHECKS) -> Path:
    """The kernels and their C interface, with checks: a library in the folder, of other sources than ours if given."""
    sources = sources or [source_folder() / "kernels" / name for name in KERNEL_SOURCES]

    def compiled(source: Path) -> Path:
        return _compile(folder / f"{source.stem}.o", *_emulation(), *checks, "-c", "-x", "c++", source, shared=False)

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, sources))
    return _compile(folder / "libemulated.so", *_emulation(), *checks, *objects)


def build_broken_kernels(folder: Path, source: str, before: str, after: str, *, residual: bool = False) -> Path:
    """The kernels of frn.cu or frn_backward.cu for float16, always or never with a residual, fewer checks and a fault.

    That is a text `before`, which stands once in all files of CUDA kernels, replaced by `after`.
    """
    sources = folder / "kernels"
    sources.mkdir(parents=True)
    changed = 0
    for path in (source_folder() / "kernels").iterdir():
        text = path.read_text()
        if path.suffix in (".cu", ".cuh"):
            changed += text.count(before)
            text = text.replace(before, after)
            text = re.sub(r"return run\((float|double|__nv_bfloat16)\(\), ", "return run(__half(), ", text)
            text = re.sub("run<Forward<Storage, (true|false)>>", f"run<Forward<Storage, {residual:d}>>", text)
        (sources / path.name).write_text(text)
    assert changed == 1, before
    return build_kernels(folder, [sources / source], _FEWER_CHECKS)


_FOR_EACH = """
import os, sys
from pathlib import Path
for library in sys.argv[1:]:
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        found = 1
        try:
            check(Path(library))
            found = 0
        finally:
            os._exit(found)  # at once: to tear down all that is imported takes longer than the check
    print(os.waitpid(child, 0)[1], flush=True)
"""


def find_faults(libraries: Sequence[Path], check: str) -> list[bool]:
    """In which of the libraries a check finds a fault: each in a process of its own, since some faults end it.

    `check` is the source of a function of this name, which raises an error if it finds one, and of what it imports.
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
    return _compile(target, *_emulation(), "-x", "c++", *words, *_CHECKS, shared=False)


HOSTS = ("libnvinfer.so.10", "libtensorrt_rtx.so.1")
"""A plugin knows by the library's name in whom it is."""


def build_hosts(folder: Path) -> None:
    """A host of each name."""
    for name in HOSTS:
        source = Path(__file__).parent / "plugins" / "tensorrt_host.cpp"
        _compile(folder / name, *_emulation(), "-isystem", os.environ["TENSORRT_INCLUDE_DIR"], source, "-ldl")


def build_plugin(folder: Path, kernels: Path) -> None:
    """The plugin as it is, over the library that build_kernels gave, with checks, and its hosts."""
    source = source_folder() / "tensorrt"
    compiler = [*_emulation(), "-isystem", os.environ["TENSORRT_INCLUDE_DIR"], '-DDEPLOYNORM_KERNELS="a digest"']
    linked = [kernels, f"-Wl,-rpath,{kernels.parent}", f"-Wl,--version-script={source / 'exports.map'}", "-ldl"]
    _compile(folder / TENSORRT_LIBRARY, *compiler, source / "frn_plugin.cpp", *linked, *_CHECKS)
    build_hosts(folder)
