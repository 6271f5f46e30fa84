"""The native operator library for ONNX Runtime: where it is, and building it on this machine.

`pip install` builds it where there is a compiler, and the wheel brings it. What is built here later goes into a cache
and is preferred, as long as the sources that this package brings are the ones it was built from.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from deploynorm.errors import BackendError
from deploynorm.files import staging

__all__ = ["LIBRARY_NAME", "Tools", "build", "cpu_variants", "find_library", "find_tools", "library_path"]

LIBRARY_NAME = "libdeploynorm_ort.so"

_REMEDY = "install a C++ compiler (g++ or clang++) and run: deploynorm plugins build"


class Tools(NamedTuple):
    """What a build needs."""

    cmake: Path
    compiler: Path
    compiler_version: str


def library_path() -> Path:
    """The operator library, for `SessionOptions.register_custom_ops_library`.

    Raises:
        BackendError: It was neither installed nor built on this machine.
    """
    library = find_library()
    if library is None:
        raise BackendError("deploynorm.plugins", "the operator library is not built on this machine", fix=_REMEDY)
    return library


def find_library() -> Path | None:
    """As library_path, with None for a library that is not there."""
    built = sorted(_cache_of_these_sources().glob(f"*/{LIBRARY_NAME}"), key=lambda path: path.stat().st_mtime)
    return built[-1] if built else _installed_library()


def build(folder: Path | None = None, *, sanitize: str = "") -> Path:
    """Builds the operator library from the sources that the package brings.

    Several processes may build at once: each works in a folder of its own and moves the finished file into its place.

    Args:
        folder: Where the library goes; by default a cache, under a key of sources, compiler and flags, where
            `library_path` finds it.
        sanitize: Sanitizers to build with, as for -fsanitize ("address,undefined"); only with a folder.

    Returns:
        The library.

    Raises:
        BackendError: CMake or a compiler is missing, or the build failed; the message ends with the compiler's words.
    """
    tools = find_tools()
    target = (_cache_key(tools) if folder is None else folder) / LIBRARY_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="deploynorm-build-") as work:
        configure: list[str | Path] = [tools.cmake, "-S", _sources(), "-B", work, "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_CXX_COMPILER={tools.compiler}", f"-DDEPLOYNORM_SANITIZE={sanitize}"]
        if (ninja := _program("ninja")) is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        _run(configure)
        _run([tools.cmake, "--build", work])
        with staging(target) as staged:
            shutil.copy2(Path(work) / LIBRARY_NAME, staged / LIBRARY_NAME)
    return target


def find_tools() -> Tools:
    """CMake and the C++ compiler: $CXX, else c++, g++ or clang++.

    Raises:
        BackendError: One of them is missing.
    """
    cmake = _program("cmake")
    if cmake is None:
        raise BackendError("deploynorm.plugins", "CMake is not installed", fix="pip install cmake ninja")
    named = os.environ.get("CXX")
    found = (_program(name) for name in ([named] if named else ["c++", "g++", "clang++"]))
    compiler = next((path for path in found if path is not None), None)
    if compiler is None:
        raise BackendError(
            "deploynorm.plugins", "no C++ compiler found", got=named and f"CXX={named}", fix="install g++ or clang++"
        )
    return Tools(cmake, compiler, _run([compiler, "--version"]).partition("\n")[0])


def cpu_variants(library: Path) -> list[str]:
    """The compiled variants of the CPU kernel that this processor runs, the best first.

    Raises:
        BackendError: The library cannot be loaded.
    """
    try:
        function = ctypes.CDLL(str(library)).deploynorm_cpu_variants
    except (OSError, AttributeError) as error:
        raise BackendError(str(library), f"cannot be loaded: {error}", fix="deploynorm plugins build") from error
    function.restype = ctypes.POINTER(ctypes.c_char_p)
    names = function()
    found: list[str] = []
    while names[len(found)] is not None:
        found.append(names[len(found)].decode())
    return found


def _installed_library() -> Path | None:
    """Where pip has put the library. An editable installation has it elsewhere than its modules."""
    for distribution in importlib.metadata.distributions(name="deploynorm"):
        path = Path(str(distribution.locate_file(f"deploynorm/{LIBRARY_NAME}")))
        if path.is_file():
            return path
    return None


def _sources() -> Path:
    """The folder of CMakeLists.txt: beside this file once installed, at the top of the repository in a clone."""
    installed = Path(__file__).parent
    return installed if (installed / "CMakeLists.txt").is_file() else installed.parents[1] / "plugins"


@cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(_sources().rglob("*")):
        if path.suffix in (".txt", ".h", ".cpp"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_of_these_sources() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "deploynorm" / "plugins" / _source_digest()


def _cache_key(tools: Tools) -> Path:
    flags = os.environ.get("CXXFLAGS", "")
    parts = (str(tools.compiler), tools.compiler_version, flags, platform.machine(), sys.platform)
    return _cache_of_these_sources() / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _program(name: str) -> Path | None:
    """On PATH, or beside this Python, where pip puts programs."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    return None if found is None else Path(found)


def _run(command: list[str | Path]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        words = (done.stdout + done.stderr).strip().splitlines()[-15:]
        raise BackendError(
            "deploynorm.plugins",
            f"{Path(command[0]).name} failed with exit code {done.returncode}",
            got="\n".join(["", *words]),
            fix="mend what it names, or choose another compiler with CXX",
        )
    return done.stdout
