"""Building the native libraries on this machine, from the sources that the package brings."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploynorm.errors import InputError
from deploynorm.files import staging
from deploynorm.libraries.find import ORT_LIBRARY, cache_of_these_sources, cache_root, source_folder
from deploynorm.libraries.tools import CudaTools, Tools, find_cuda, find_program, find_tools, run, tensorrt_headers
from deploynorm.tables import table


@dataclass(frozen=True)
class Build:
    """What was built, and with what. `print` shows it.

    Attributes:
        library: The operator library for ONNX Runtime.
        libraries: All libraries that were built, this one among them; they lie in one folder.
        tools, cuda: The compilers; cuda is None for a build without CUDA.
        options, flags: What CMake was given, and $CXXFLAGS, which CMake adds.
    """

    library: Path
    libraries: tuple[Path, ...]
    tools: Tools
    cuda: CudaTools | None
    options: tuple[str, ...]
    flags: str = ""

    def __str__(self) -> str:
        rows = [("compiler", f"{self.tools.compiler} ({self.tools.compiler_version})"), ("CMake", self.tools.cmake)]
        rows += [] if self.cuda is None else [("CUDA compiler", f"{self.cuda.nvcc} ({self.cuda.version})")]
        rows += [("options", option) for option in self.options] + ([("CXXFLAGS", self.flags)] if self.flags else [])
        return table("Built", ("", ""), [*rows, *(("library", path) for path in self.libraries)])

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "library": str(self.library),
            "libraries": [str(path) for path in self.libraries],
            "compiler": str(self.tools.compiler),
            "compiler_version": self.tools.compiler_version,
            "cmake": str(self.tools.cmake),
            "cuda_compiler": None if self.cuda is None else str(self.cuda.nvcc),
            "cuda_version": None if self.cuda is None else self.cuda.version,
            "options": list(self.options),
            "cxxflags": self.flags,
        }


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
        BackendError: CMake or a compiler is missing, the TensorRT headers cannot be had, or the build failed; the
            message ends with the compiler's words.
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
    target = (cache_key(tools, cuda_tools, options) if folder is None else folder) / ORT_LIBRARY
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="deploynorm-build-") as work:  # of this process alone
        configure: list[str | Path] = [tools.cmake, "-S", source_folder(), "-B", work, "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_CXX_COMPILER={tools.compiler}", *options]
        if (ninja := find_program("ninja")) is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        run(configure)
        run([tools.cmake, "--build", work])
        with staging(target) as staged:
            for library in Path(work).glob("*.so"):
                shutil.copy2(library, staged / library.name)
    built = tuple(sorted(target.parent.glob("*.so")))
    return Build(target, built, tools, cuda_tools, tuple(options), os.environ.get("CXXFLAGS", ""))


def cache_key(tools: Tools, cuda: CudaTools | None, options: Sequence[str]) -> Path:
    """The folder in the cache of what these tools build with these options."""
    parts = [str(tools.compiler), tools.compiler_version, os.environ.get("CXXFLAGS", "")]
    parts += [platform.machine(), sys.platform, "" if cuda is None else cuda.version, *options]
    return cache_of_these_sources() / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
