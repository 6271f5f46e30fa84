"""Where the native libraries are, and what is in them.

`pip install` builds the libraries for ONNX Runtime and for training where there is a compiler. What `deploynorm plugins
build` builds later, with CUDA and the TensorRT plugin if asked for, goes into a cache and is preferred, as long as it
was built from the sources of this package, is whole, and nobody else could have put it there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import os
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from deploynorm.errors import BackendError
from deploynorm.libraries.kernels import open_kernels
from deploynorm.libraries.trust import objection

ORT_LIBRARY: Final = "libdeploynorm_ort.so"
TORCH_LIBRARY: Final = "libdeploynorm_torch.so"
TENSORRT_LIBRARY: Final = "libdeploynorm_trt.so"
TENSORRT_REGISTER_LIBRARY: Final = "libdeploynorm_trt_register.so"


class NativeLibrary(NamedTuple):
    """One of our native libraries.

    Attributes:
        file: Its file name.
        brings: What it is for, and what happens without it.
        needs_cuda: Whether it is built with CUDA only.
        exports: What its host looks for in it.
    """

    file: str
    brings: str
    needs_cuda: bool
    exports: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What builds it."""
        return "deploynorm plugins build" + (" --cuda" if self.needs_cuda else "")


LIBRARIES: Final[Mapping[str, NativeLibrary]] = {
    "onnxruntime": NativeLibrary(
        ORT_LIBRARY,
        "the fused FRN kernel for onnxruntime; without it FRN runs as several operators, slower",
        needs_cuda=False,
        exports=("RegisterCustomOps",),
    ),
    "torch": NativeLibrary(
        TORCH_LIBRARY,
        "FRN's kernels for training; without it the layers run in plain PyTorch, slower",
        needs_cuda=False,
        exports=("deploynorm_frn_cpu", "deploynorm_frn_backward_cpu"),
    ),
    "tensorrt": NativeLibrary(
        TENSORRT_LIBRARY,
        "FRN in TensorRT as one plugin; without it TensorRT builds the operator's body",
        needs_cuda=True,
        exports=("getCreators", "setLoggerFinder"),
    ),
    "tensorrt-register": NativeLibrary(
        TENSORRT_REGISTER_LIBRARY,
        "the plugin beside it, for hosts that only open a library",
        needs_cuda=True,
    ),
}
"""Our libraries by the names of their hosts. Built with CUDA, the first two serve GPUs too."""


def library_path(name: str = ORT_LIBRARY) -> Path:
    """The path of a library of ours, by its file name or its host's name in `LIBRARIES`.

    The default is that for `SessionOptions.register_custom_ops_library`. BackendError where it was neither installed
    nor built on this machine.
    """
    library = find_library(name)
    if library is None:
        row = next(row for key, row in LIBRARIES.items() if name in (key, row.file))
        first = "pip install 'deploynorm[build,cuda]'" if row.needs_cuda else "install a C++ compiler (g++ or clang++)"
        problem = f"{row.file} is not built on this machine"
        raise BackendError("deploynorm.libraries", problem, fix=f"{first}, then: {row.command}")
    return library


def find_library(name: str = ORT_LIBRARY) -> Path | None:
    """As library_path, but None for a library that is not there."""
    file = LIBRARIES[name].file if name in LIBRARIES else name
    for path in built_libraries(file):
        if (reason := objection(path)) is None:
            return path
        text = f"{path} is not used: {reason}. Fix: deploynorm plugins build"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return installed_library(file)


def built_libraries(file: str) -> list[Path]:
    """Those of this file name that were built on this machine from these sources, the newest first."""
    try:
        return sorted(cache_of_these_sources().glob(f"*/{file}"), key=lambda path: path.stat().st_mtime, reverse=True)
    except (BackendError, OSError):  # there is no cache, or it cannot be read
        return []


def installed_library(file: str) -> Path | None:
    """Where pip has put the library. An editable installation does not have it beside its modules."""
    distributions = importlib.metadata.distributions(name="deploynorm")
    paths = (Path(str(distribution.locate_file(f"deploynorm/{file}"))) for distribution in distributions)
    return next((path for path in paths if path.is_file()), None)


def cpu_variants(library: Path) -> list[str]:
    """The compiled variants of the CPU kernel that this processor runs, the best first."""
    return _names(library, "deploynorm_cpu_variants")


def cuda_variants(library: Path) -> list[str]:
    """The variants of the CUDA kernel; none in a library that was built without CUDA."""
    return _names(library, "deploynorm_cuda_variants") if b"deploynorm_cuda_variants" in library.read_bytes() else []


def _names(library: Path, function: str) -> list[str]:
    """The names that a function of the library returns, as an array that ends with a null pointer."""
    try:
        array = getattr(open_kernels(library, function), function)()
    except (OSError, AttributeError) as error:
        raise BackendError(str(library), f"cannot be loaded: {error}", fix="deploynorm plugins build") from error
    return [name.decode() for name in itertools.takewhile(lambda name: name is not None, array)]


def source_folder() -> Path:
    """The folder of the C++ sources; in a clone it is a link to the one at the top of the repository."""
    return Path(__file__).parents[1] / "plugins"


@cache
def source_digest() -> str:
    """Of the C++ sources, as hexadecimal text."""
    digest = hashlib.sha256()
    for path in sorted(source_folder().rglob("*")):
        if path.suffix in (".txt", ".h", ".cpp", ".cuh", ".cu", ".map"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_root() -> Path:
    """The folder of what is built here, in $XDG_CACHE_HOME or ~/.cache; BackendError where there is no home either."""
    try:
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # A relative one is to be ignored, says the XDG Base Directory Specification.
        return (named if named.is_absolute() else Path.home() / ".cache") / "deploynorm"
    except RuntimeError as error:
        problem = "this user has no home folder for a cache"
        raise BackendError(
            "deploynorm.libraries", problem, fix="set XDG_CACHE_HOME to a folder of this user"
        ) from error


def cache_of_these_sources() -> Path:
    """The part of the cache that was built from the sources of this package."""
    return cache_root() / "plugins" / source_digest()
