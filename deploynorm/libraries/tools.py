"""What a build of the native libraries needs of this machine: CMake, compilers, and the headers of TensorRT."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from deploynorm.errors import BackendError
from deploynorm.files import scratch_folder, sha256, staging
from deploynorm.libraries.trust import make_private

_WHERE: Final = "deploynorm.libraries"

HEADERS_PACKAGE: Final = "kernel-lens==2.0.1"
"""A package that brings the headers of TensorRT 10.14, which NVIDIA publishes under Apache-2.0."""

HEADERS_SHA256: Final = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"

_FOLDER_IN_PACKAGE: Final = "kernel_lens/include/tensorrt/"
_HEADER: Final = "NvInferRuntime.h"


class Tools(NamedTuple):
    """What every build needs."""

    cmake: Path
    compiler: Path
    compiler_version: str


class CudaTools(NamedTuple):
    """What a build with CUDA needs besides."""

    nvcc: Path
    version: str

    @property
    def flags(self) -> list[str]:
        """For CMake. pip's packages have their libraries in lib, where nvcc itself looks in lib64 only."""
        toolkit = self.nvcc.resolve().parents[1]
        from_pip = (toolkit / "lib").is_dir() and not (toolkit / "lib64").is_dir()
        return [f"-DCMAKE_CUDA_FLAGS=-L{toolkit / 'lib'}"] if from_pip else []


def find_tools() -> Tools:
    """CMake and the C++ compiler ($CXX, else c++, g++ or clang++); BackendError where one of them is missing."""
    cmake = find_program("cmake")
    if cmake is None:
        raise BackendError(_WHERE, "CMake is not installed", fix="pip install cmake ninja")
    named = os.environ.get("CXX")
    compiler = _first([named] if named else ["c++", "g++", "clang++"])
    if compiler is None:
        raise BackendError(_WHERE, "no C++ compiler found", got=named and f"CXX={named}", fix="install g++ or clang++")
    return Tools(cmake, compiler, run([compiler, "--version"]).partition("\n")[0])


def find_cuda() -> CudaTools:
    """The CUDA compiler: $CUDACXX, nvcc on PATH, under $CUDA_HOME, in /usr/local/cuda or from pip's packages."""
    named = os.environ.get("CUDACXX")
    packages = importlib.util.find_spec("nvidia")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    homes += [f"{folder}/cu13" for folder in (packages and packages.submodule_search_locations) or ()]
    nvcc = _first([named] if named else ["nvcc", *(f"{home}/bin/nvcc" for home in homes if home)])
    if nvcc is None:
        fix = "pip install 'deploynorm[cuda]', or install the CUDA toolkit, 12.8 or later"
        raise BackendError(_WHERE, "no CUDA compiler found", got=named and f"CUDACXX={named}", fix=fix)
    lines = run([nvcc, "--version"]).strip().splitlines()
    return CudaTools(nvcc, next((line for line in lines if "release" in line), lines[-1]))


def tensorrt_headers(cache: Path) -> Path:
    """A folder of TensorRT's headers: $TENSORRT_INCLUDE_DIR, else of a package, which pip gets and `cache` keeps."""
    if named := os.environ.get("TENSORRT_INCLUDE_DIR"):
        if not (Path(named) / _HEADER).is_file():
            fix = "name the folder `include` of TensorRT, or unset it"
            raise BackendError(_WHERE, f"TENSORRT_INCLUDE_DIR has no {_HEADER}", got=named, fix=fix)
        return Path(named)
    folder = cache / "tensorrt-headers" / HEADERS_SHA256[:16]
    make_private(folder)
    if (folder / _HEADER).is_file():
        return folder
    fix = "download TensorRT and name its folder `include` with TENSORRT_INCLUDE_DIR, or leave the plugin out"
    with scratch_folder() as work:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(work)]
        done = subprocess.run([*pip, HEADERS_PACKAGE], capture_output=True, text=True)
        wheels = list(work.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            words = (done.stderr or done.stdout).strip().splitlines()[-1:]
            problem = f"pip cannot get TensorRT's headers ({HEADERS_PACKAGE})"
            raise BackendError(_WHERE, problem, got="".join(words), fix=fix)
        digest = sha256(wheels[0])
        if digest != HEADERS_SHA256:
            problem = f"{wheels[0].name} is not the file that is known"
            raise BackendError(_WHERE, problem, got=digest, expected=HEADERS_SHA256, fix=fix)
        with zipfile.ZipFile(wheels[0]) as wheel, staging(folder / _HEADER) as staged:
            for name in wheel.namelist():
                if name.startswith(_FOLDER_IN_PACKAGE) and name.endswith(".h"):
                    (staged / Path(name).name).write_bytes(wheel.read(name))
    return folder


def _first(names: Iterable[str]) -> Path | None:
    return next((path for path in map(find_program, names) if path is not None), None)


def find_program(name: str) -> Path | None:
    """On PATH, or beside this Python, where pip puts programs."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    return None if found is None else Path(found)


def run(command: list[str | Path]) -> str:
    """The output of a program of the build; BackendError, with the last of it, where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        words = (done.stdout + done.stderr).strip().splitlines()[-15:]
        problem = f"{Path(command[0]).name} failed with exit code {done.returncode}"
        fix = "fix what it names, or choose another compiler with CXX"
        raise BackendError(_WHERE, problem, got="\n".join(["", *words]), fix=fix)
    return done.stdout
