"""The native libraries: where they are, and building them on this machine.

`pip install` builds the operator library for ONNX Runtime where there is a compiler, and the wheel brings it. What is
built here later, with CUDA and the TensorRT plugin if asked for, goes into a cache and is preferred, as long as the
sources that this package brings are the ones it was built from.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from deploynorm.errors import BackendError
from deploynorm.files import staging
from deploynorm.libraries.tools import CudaTools, Tools, find_cuda, find_program, find_tools, run, tensorrt_headers

__all__ = [
    "LIBRARIES",
    "ORT_LIBRARY",
    "TORCH_LIBRARY",
    "TENSORRT_LIBRARY",
    "TENSORRT_REGISTER_LIBRARY",
    "build",
    "cpu_variants",
    "cuda_variants",
    "find_cuda",
    "find_library",
    "find_tools",
    "library_path",
    "source_folder",
]

ORT_LIBRARY: Final = "libdeploynorm_ort.so"
"""The operators for ONNX Runtime; built with CUDA, for its CUDA provider too."""

TORCH_LIBRARY: Final = "libdeploynorm_torch.so"
"""The kernels for training, behind `deploynorm.layers`; built with CUDA, for GPUs too."""

TENSORRT_LIBRARY: Final = "libdeploynorm_trt.so"
"""The TensorRT plugin, for hosts that load plugin libraries."""

TENSORRT_REGISTER_LIBRARY: Final = "libdeploynorm_trt_register.so"
"""Registers the plugin that lies beside it, for hosts that only open a library."""

LIBRARIES: Final = (ORT_LIBRARY, TORCH_LIBRARY, TENSORRT_LIBRARY, TENSORRT_REGISTER_LIBRARY)

_REMEDIES: Final = {
    ORT_LIBRARY: "install a C++ compiler (g++ or clang++) and run: deploynorm plugins build",
    TORCH_LIBRARY: "install a C++ compiler (g++ or clang++) and run: deploynorm plugins build",
    TENSORRT_LIBRARY: "pip install 'deploynorm[build,cuda]', then: deploynorm plugins build --cuda",
    TENSORRT_REGISTER_LIBRARY: "pip install 'deploynorm[build,cuda]', then: deploynorm plugins build --cuda",
}


def library_path(name: str = ORT_LIBRARY) -> Path:
    """A library of ours; by default that for `SessionOptions.register_custom_ops_library`.

    Raises:
        BackendError: It was neither installed nor built on this machine.
    """
    library = find_library(name)
    if library is None:
        raise BackendError("deploynorm.libraries", f"{name} is not built on this machine", fix=_REMEDIES[name])
    return library


def find_library(name: str = ORT_LIBRARY) -> Path | None:
    """As library_path, with None for a library that is not there."""
    built = sorted(_cache_of_these_sources().glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    return built[-1] if built else _installed_library(name)


def build(
    folder: Path | None = None,
    *,
    cuda: bool = False,
    tensorrt: bool = True,
    architectures: Sequence[str] = (),
    sanitize: str = "",
) -> Path:
    """Builds the libraries from the sources that the package brings.

    Several processes may build at once: each works in a folder of its own and moves the finished files into their
    place.

    Args:
        folder: Where they go; by default a cache, under a key of sources, compilers and flags, where `library_path`
            finds them.
        cuda: Build the CUDA kernels into the operator library, and the TensorRT plugin.
        tensorrt: With cuda, whether to build the plugin; its build needs TensorRT's headers.
        architectures: Of the GPUs, as CMake has them ("90", "86-real"); by default all from Turing to Blackwell.
        sanitize: Sanitizers to build with, as for -fsanitize ("address,undefined"); only with a folder.

    Returns:
        The operator library for ONNX Runtime. The others lie beside it.

    Raises:
        BackendError: CMake or a compiler is missing, the TensorRT headers cannot be had, or the build failed; the
            message ends with the compiler's words.
    """
    tools = find_tools()
    cuda_tools = find_cuda() if cuda else None
    headers = tensorrt_headers(_cache_root()) if cuda and tensorrt else None
    options: list[str] = [f"-DDEPLOYNORM_SANITIZE={sanitize}"]
    if cuda_tools is not None:
        options += ["-DDEPLOYNORM_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={cuda_tools.nvcc}"]
        options += [f"-DCMAKE_CUDA_HOST_COMPILER={tools.compiler}", *cuda_tools.flags]
    if architectures:
        options += [f"-DDEPLOYNORM_CUDA_ARCHITECTURES={';'.join(architectures)}"]
    if headers is not None:
        options += [f"-DTENSORRT_INCLUDE_DIR={headers}"]
    target = (_cache_key(tools, cuda_tools, options) if folder is None else folder) / ORT_LIBRARY
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="deploynorm-build-") as work:
        configure: list[str | Path] = [tools.cmake, "-S", source_folder(), "-B", work, "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_CXX_COMPILER={tools.compiler}", *options]
        if (ninja := find_program("ninja")) is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        run(configure)
        run([tools.cmake, "--build", work])
        with staging(target) as staged:
            for library in Path(work).glob("*.so"):
                shutil.copy2(library, staged / library.name)
    return target


def cpu_variants(library: Path) -> list[str]:
    """The compiled variants of the CPU kernel that this processor runs, the best first.

    Raises:
        BackendError: The library cannot be loaded.
    """
    return _names(library, "deploynorm_cpu_variants")


def cuda_variants(library: Path) -> list[str]:
    """The variants of the CUDA kernel; none in a library that was built without CUDA.

    Raises:
        BackendError: The library cannot be loaded.
    """
    return _names(library, "deploynorm_cuda_variants") if b"deploynorm_cuda_variants" in library.read_bytes() else []


def _names(library: Path, function: str) -> list[str]:
    """What a function of the library returns that gives an array of names with a null behind the last."""
    try:
        names = getattr(ctypes.CDLL(str(library)), function)
    except (OSError, AttributeError) as error:
        raise BackendError(str(library), f"cannot be loaded: {error}", fix="deploynorm plugins build") from error
    names.restype = ctypes.POINTER(ctypes.c_char_p)
    array = names()
    found: list[str] = []
    while array[len(found)] is not None:
        found.append(array[len(found)].decode())
    return found


def _installed_library(name: str) -> Path | None:
    """Where pip has put the library. An editable installation has it elsewhere than its modules."""
    for distribution in importlib.metadata.distributions(name="deploynorm"):
        path = Path(str(distribution.locate_file(f"deploynorm/{name}")))
        if path.is_file():
            return path
    return None


def source_folder() -> Path:
    """The folder of the C++ sources; in a clone it is a link to the one at the top of the repository."""
    return Path(__file__).parents[1] / "plugins"


@cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(source_folder().rglob("*")):
        if path.suffix in (".txt", ".h", ".cpp", ".cuh", ".cu", ".map"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deploynorm"


def _cache_of_these_sources() -> Path:
    return _cache_root() / "plugins" / _source_digest()


def _cache_key(tools: Tools, cuda: CudaTools | None, options: Sequence[str]) -> Path:
    parts = [str(tools.compiler), tools.compiler_version, os.environ.get("CXXFLAGS", "")]
    parts += [platform.machine(), sys.platform, "" if cuda is None else cuda.version, *options]
    return _cache_of_these_sources() / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
