"""Building the native libraries on this machine, from the sources that the package brings."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploynorm.errors import BackendError, InputError
from deploynorm.files import scratch_folder, sha256, staging
from deploynorm.libraries.find import LIBRARIES, ORT_LIBRARY, cache_of_these_sources, cache_root, source_folder
from deploynorm.libraries.tools import CudaTools, Tools, find_cuda, find_program, find_tools, run, tensorrt_headers
from deploynorm.libraries.trust import SUMS, damage, make_private
from deploynorm.tables import table


@dataclass(frozen=True)
class Build:
    """What was built, and with what. `print` shows it.

    Attributes:
        library: The operator library for ONNX Runtime.
        libraries: All libraries that were built, this one among them; they lie in one folder.
        facts: The compilers and options, as JSON has them.
    """

    library: Path
    libraries: tuple[Path, ...]
    facts: Mapping[str, str | list[str] | None]

    def __str__(self) -> str:
        rows = []
        for name, value in {**self.facts, "library": [str(path) for path in self.libraries]}.items():
            each = value if isinstance(value, list) else [value]
            rows += [(name.replace("_", " "), text) for text in each if text]
        return table("Built", ("", ""), rows)

    def to_dict(self) -> dict[str, Any]:
        return {"library": str(self.library), "libraries": [str(path) for path in self.libraries], **self.facts}


def build(
    folder: Path | None = None,
    *,
    cuda: bool = False,
    tensorrt: bool = True,
    architectures: Sequence[str] = (),
    sanitize: str = "",
) -> Build:
    """Builds the libraries from the sources that the package brings. Several processes may do so at once.

    Args:
        folder: Where they go; by default a cache, under a key of sources, compilers and flags, where `library_path`
            finds them.
        cuda: Build the CUDA kernels into the operator library, and the TensorRT plugin.
        tensorrt: With cuda, whether to build the plugin; its build needs TensorRT's headers.
        architectures: Of the GPUs, as CMake has them ("90", "86-real"); by default those of plugins/CMakeLists.txt,
            all since Turing. Only with cuda.
        sanitize: Sanitizers to build with, as for -fsanitize ("address,undefined"); only with a folder.

    Raises:
        InputError: An option of a build with CUDA was given without cuda.
        BackendError: CMake or a compiler is missing, the TensorRT headers cannot be had, the cache cannot be made or
            others may write to it, or the build failed or made nothing; the message ends with the compiler's words.
    """
    if not cuda and (architectures or not tensorrt):
        raise InputError("plugins build", "--no-tensorrt and --architectures are for a build with CUDA", fix="--cuda")
    tools = find_tools()
    cuda_tools = find_cuda() if cuda else None
    headers = tensorrt_headers(cache_root()) if cuda and tensorrt else None
    options = [f"-DDEPLOYNORM_SANITIZE={sanitize}"] if sanitize else []
    if cuda_tools is not None:
        options += ["-DDEPLOYNORM_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={cuda_tools.nvcc}"]
        options += [f"-DCMAKE_CUDA_HOST_COMPILER={tools.compiler}", *cuda_tools.flags]
    if architectures:
        options += [f"-DDEPLOYNORM_CUDA_ARCHITECTURES={';'.join(architectures)}"]
    if headers is not None:
        options += [f"-DTENSORRT_INCLUDE_DIR={headers}"]
    if folder is None:
        folder = cache_key(tools, cuda_tools, options)
        make_private(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder() as work:
        sources = source_folder().resolve()  # as pip finds them in a clone: a compiler's cache then serves both
        configure: list[str | Path] = [tools.cmake, "-S", sources, "-B", work, "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_CXX_COMPILER={tools.compiler}", *options]
        if (ninja := find_program("ninja")) is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        run(configure)
        run([tools.cmake, "--build", work])
        names = [row.file for row in LIBRARIES.values() if headers is not None or not row.needs_cuda]
        for name in names:
            if (problem := damage(work / name)) is not None:
                got = f"{tools.compiler} ({tools.compiler_version})"
                problem = f"the build ended without an error, but not with {name}: {problem}"
                raise BackendError("plugins build", problem, got=got, fix="choose another compiler with CXX")
        with staging(folder / ORT_LIBRARY) as staged:
            for name in names:
                shutil.copyfile(work / name, staged / name)
                (staged / name).chmod(0o755)
            sums = "".join(f"{sha256(staged / name)}  {name}\n" for name in names)
            (staged / SUMS).write_text(sums, encoding="utf-8")
    facts: dict[str, str | list[str] | None] = {
        "compiler": str(tools.compiler),
        "compiler_version": tools.compiler_version,
        "cmake": str(tools.cmake),
        "cuda_compiler": None if cuda_tools is None else str(cuda_tools.nvcc),
        "cuda_version": None if cuda_tools is None else cuda_tools.version,
        "options": options,
        "cxxflags": os.environ.get("CXXFLAGS", ""),
    }
    return Build(folder / ORT_LIBRARY, tuple(folder / name for name in sorted(names)), facts)


def cache_key(tools: Tools, cuda: CudaTools | None, options: Sequence[str]) -> Path:
    """The folder in the cache of what these tools build with these options."""
    parts = [str(tools.compiler), tools.compiler_version, os.environ.get("CXXFLAGS", "")]
    parts += [platform.machine(), sys.platform, "" if cuda is None else cuda.version, *options]
    return cache_of_these_sources() / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
