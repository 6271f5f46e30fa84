"""Gathers the facts. Nothing here raises, imports a framework or takes more than a few seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from deploynorm import libraries
from deploynorm.doctor import probes
from deploynorm.doctor.facts import Driver, Examination, Gpu, Library, OnnxRuntime, Provider, TensorRT
from deploynorm.errors import BackendError
from deploynorm.libraries import find
from deploynorm.libraries.elf import machine_here, read_library, read_needed
from deploynorm.libraries.find import cache_of_these_sources
from deploynorm.libraries.trust import objection
from deploynorm.trt import FLAVOURS

_PACKAGES: Final = re.compile(
    r"deploynorm|torch|torchvision|numpy|onnx|onnx-ir|onnxscript|onnxruntime.*|tensorrt.*|polygraphy|ort-nightly.*"
    r"|openvino|ncnn|pnnx|mnn|nvidia-(cublas|cuda-nvcc|cuda-runtime|cudnn).*"
)
"""The packages that matter here, by the names that pip knows."""

_ONNXRUNTIMES: Final = re.compile(
    r"onnxruntime(-(gpu|directml|openvino|qnn|rocm|migraphx|training|silicon|azure))?|ort-nightly(-gpu)?"
)
"""Those that bring the module onnxruntime."""

_CUDNN: Final = "libcudnn.so.9"
"""onnxruntime-gpu opens it only when a convolution is run, and then cannot do without."""

_OURS: Final = tuple(row.file for row in libraries.LIBRARIES.values())


def examine() -> Examination:
    """Looks at this machine and tries what is installed, each thing in a process of its own."""
    versions, folders = _packages()
    module = _folder("onnxruntime")
    runtimes = [name for name in versions if _ONNXRUNTIMES.fullmatch(name)]
    in_module = tuple(name for name in runtimes if module is None or folders[name].resolve() == module.resolve().parent)
    needed = {name: _provider_needs(module, name) for name in ("cuda", "tensorrt")} if module else {}
    all_needed = sorted({library for libraries in needed.values() for library in libraries})
    tensorrts = [next((name for name in each.modules if _folder(name)), None) for each in FLAVOURS.values()]
    with ThreadPoolExecutor() as pool:
        driver = pool.submit(probes.ask, probes.devices)
        missing = pool.submit(probes.ask, probes.open_libraries, all_needed)
        found = {name: path for name in _OURS if (path := _newest(name)) is not None}
        ours = tuple(pool.map(_library, found.keys(), found.values()))
        # A library that cannot even be opened would end the processes of those who are to take it.
        usable = {library.name: library.path for library in ours if library.problem is None}
        runtime = pool.submit(_try, probes.onnxruntime, (), usable.get(libraries.ORT_LIBRARY), "library")
        plugin = usable.get(libraries.TENSORRT_LIBRARY)
        trts = {name: pool.submit(_try, probes.tensorrt, (name,), plugin, "plugin") for name in tensorrts if name}
        vision = pool.submit(probes.ask, probes.torchvision) if "torchvision" in versions else None
        nvcc, nvcc_release = _nvcc()
        return Examination(
            python=f"{platform.python_version()} ({sys.executable})",
            system=platform.platform(),
            packages=versions,
            torch_cuda=_torch_cuda(),
            torchvision_problem=None if vision is None else vision.result().get("problem"),
            onnxruntime=_onnxruntime(in_module, versions, runtime.result()) if in_module or module else None,
            providers=tuple(_provider(name, needs, missing.result()) for name, needs in needed.items() if needs),
            tensorrt=tuple(TensorRT(name, **trt.result()) for name, trt in trts.items()),
            compiler=_compiler(),
            nvcc=nvcc,
            nvcc_release=nvcc_release,
            driver=_driver(driver.result()),
            visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
            machine=machine_here(),
            libraries=ours,
            stale=_stale(),
        )


def _try(
    probe: Callable[..., dict[str, Any]], arguments: Sequence[str], library: str | None, kind: str
) -> dict[str, Any]:
    """Asks a runtime to take a library of ours, and where it dies of it, what it is without."""
    found = probes.ask(probe, *arguments, library)
    if library is not None and "problem" in found:
        alone = probes.ask(probe, *arguments, None)
        if "problem" not in alone:
            return alone | {f"takes_{kind}": False, f"{kind}_problem": found["problem"]}
    return found


def _packages() -> tuple[dict[str, str], dict[str, Path]]:
    """Version and folder of each package that matters; of one that is there twice, what Python imports."""
    versions: dict[str, str] = {}
    folders: dict[str, Path] = {}
    for distribution in importlib.metadata.distributions():
        try:
            name, version = str(distribution.metadata["Name"]), str(distribution.metadata["Version"])
        except Exception:  # an installation that was cut short leaves no metadata; each Python says so in its own way
            continue
        name = re.sub(r"[-_.]+", "-", name).lower()
        if _PACKAGES.fullmatch(name) and name not in versions:
            versions[name] = version
            folders[name] = Path(str(distribution.locate_file("")))
    return dict(sorted(versions.items())), folders


def _folder(module: str) -> Path | None:
    """Where a package would be imported from, without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # it is hidden, or half imported
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _torch_cuda() -> str | None:
    """torch.version.cuda without importing torch, which takes seconds."""
    folder = _folder("torch")
    try:
        text = (folder / "version.py").read_text(encoding="utf-8") if folder else ""
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _onnxruntime(packages: tuple[str, ...], versions: dict[str, str], found: dict[str, Any]) -> OnnxRuntime:
    version = next((versions[name] for name in packages), None)
    facts = {"version": version, **found, "providers": tuple(found.get("providers", ()))}
    return OnnxRuntime(packages=packages, **facts)


def _provider_needs(module: Path, name: str) -> tuple[str, ...]:
    """What the library of a provider opens; nothing where there is none, as in onnxruntime for CPUs."""
    try:
        needed = read_needed(module / "capi" / f"libonnxruntime_providers_{name}.so")
    except (OSError, ValueError):
        return ()
    extra = () if any(library.startswith("libcudnn") for library in needed) else (_CUDNN,)
    return tuple(library for library in (*needed, *extra) if not (module / "capi" / library).exists())


def _provider(name: str, needed: tuple[str, ...], failed: dict[str, Any]) -> Provider:
    if "problem" in failed:  # then nothing is known of any
        return Provider(name, needed)
    return Provider(name, needed, {library: _put_by_pip(library) for library in needed if library in failed})


def _put_by_pip(library: str) -> str | None:
    """The folder in which a package has this library, where the system's loader does not look."""
    for entry in sys.path:
        for pattern in (f"nvidia/*/lib/{library}", f"tensorrt_libs/{library}"):
            for path in Path(entry).glob(pattern):
                return str(path.parent)
    return None


def _compiler() -> str | None:
    with suppress(BackendError):
        return libraries.find_tools().compiler_version
    return None


def _nvcc() -> tuple[str | None, tuple[int, int] | None]:
    try:
        nvcc, version = libraries.find_cuda()
    except BackendError:
        return None, None
    release = re.search(r"release (\d+)\.(\d+)", version)
    return f"{nvcc} ({version})", (int(release[1]), int(release[2])) if release else None


def _driver(found: dict[str, Any]) -> Driver:
    gpus = tuple(Gpu(name, tuple(capability), memory) for name, capability, memory in found.get("gpus", ()))
    return Driver(found.get("version"), tuple(found["cuda"]) if "cuda" in found else None, gpus, found.get("problem"))


def _newest(name: str) -> Path | None:
    """The library that comes first, even one that is not used since something is wrong with it."""
    return next(iter(find.built_libraries(name)), None) or find.installed_library(name)


def _is_built_here(path: Path) -> bool:
    with suppress(BackendError):  # there is no cache
        return path.is_relative_to(cache_of_these_sources())
    return False


def _library(name: str, path: Path) -> Library:
    sources, built_here = libraries.source_folder(), _is_built_here(path)
    file = path.stat()
    # In a clone the sources are a link to those of the repository, and the library is that of the last `pip install`.
    newer = (each for each in sources.rglob("*") if each.is_file() and each.stat().st_mtime > file.st_mtime)
    outdated = not built_here and sources.is_symlink() and any(newer)
    origin = "built here" if built_here else "installed"
    found = Library(name, str(path), file.st_size, origin, outdated=outdated)
    try:
        read = read_library(path)
    except (OSError, ValueError) as error:
        return replace(found, problem=str(error))
    problem = objection(path) if built_here else None
    if problem is None:
        failed = probes.ask(probes.open_libraries, [str(path)])
        problem = failed.get(str(path)) or failed.get("problem")
    return replace(
        found, machine=read.machine, needed=read.needed, exports=read.exports, code=read.code, problem=problem
    )


def _stale() -> tuple[str, ...]:
    try:
        current = cache_of_these_sources()
    except BackendError:  # there is no cache
        return ()
    others = {path.parents[1] for name in _OURS for path in current.parent.glob(f"*/*/{name}")} - {current}
    return tuple(sorted(map(str, others)))
