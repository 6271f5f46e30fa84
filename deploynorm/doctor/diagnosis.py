"""Judges the facts: what is broken on this machine, what is missing that would help, and the remedies.

A new finding comes from one of the checks below, or from a new one, listed in _CHECKS. The failures that users of such
libraries meet most, with the findings that report them:

1. The plugin is not found when a model is read: its library was never built, is that of other sources, or is not one
   of ours (`library-missing`, `library-unreadable`, `library-machine`, `library-not-ours`, `library-does-not-load`,
   `library-stale`).
2. TensorRT of one major version, and a host that was linked against another (`tensorrt-major`, `tensorrt-import`).
3. "No kernel image": the library has no code for the compute capability of the GPU (`gpu-code`).
4. onnxruntime is too old, cannot be imported, or two of its packages lie over each other (`onnxruntime-old`,
   `onnxruntime-import`, `onnxruntime-numpy`, `onnxruntime-twice`).
5. The CUDA provider does not start: CUDA or cuDNN is missing, or the driver is too old for it (`cuda-libraries`,
   `driver-old`, `driver-error`).
6. TensorRT, or what hosts it, ends the process or refuses the library (`tensorrt-plugin`, `tensorrt-rtx-name`,
   `onnxruntime-library`).
7. torchvision is for another torch (`torchvision-import`).

Of files that are named, `deploynorm.losses` says what other tools have dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from deploynorm.doctor.facts import Examination, Library
from deploynorm.doctor.result import Diagnosis, Finding
from deploynorm.libraries import LIBRARIES, ORT_LIBRARY, TENSORRT_LIBRARY, TENSORRT_REGISTER_LIBRARY
from deploynorm.packages import load

_ROWS: Final = {row.file: row for row in LIBRARIES.values()}
_BUILD_CUDA: Final = _ROWS[TENSORRT_LIBRARY].command

_OLDEST_ONNXRUNTIME: Final = (1, 18)
_FIRST_WITH_NUMPY_2: Final = (1, 19)
_NVCC: Final = (12, 8)  # the first that knows compute capability 12.0
_FIRST_GPU: Final = (7, 5)
_DRIVERS: Final = {11: "450.80", 12: "525.60", 13: "580.65"}
"""The first driver for Linux that runs programs of each major version of CUDA. Source: CUDA's release notes."""


def diagnose(examination: Examination, files: Sequence[Path] = ()) -> Diagnosis:
    """Judges the facts, and what ONNX files of ours have lost in other tools; what is broken comes first.

    ModelError where a file cannot be read.
    """
    found = [finding for check in _CHECKS for finding in check(examination)]
    found += [finding for path in files for finding in _file(path)]
    return Diagnosis(examination, tuple(sorted(found, key=lambda finding: finding.level != "broken")))


def _file(path: Path) -> Iterator[Finding]:
    """Needs the package onnx, which a machine that is examined may lack."""
    for loss in load("deploynorm.losses.find_losses")(load("deploynorm.onnx_file.OnnxFile").read(path)):
        yield Finding("note", loss.name, f"{path}: {loss.problem}", loss.remedy)


def _onnxruntime(facts: Examination) -> Iterator[Finding]:
    runtime = facts.onnxruntime
    if runtime is None:
        problem = "onnxruntime, which runs and checks ONNX files, is not installed"
        remedy = "pip install 'deploynorm[cpu]', or 'deploynorm[gpu]' for the CUDA provider"
        yield Finding("note", "onnxruntime-missing", problem, remedy)
        return
    if len(runtime.packages) > 1:
        extra = "cpu" if all(name == "onnxruntime" or name.endswith("training") for name in runtime.packages) else "gpu"
        problem = f"{' and '.join(runtime.packages)} are both installed, and each has overwritten files of the other"
        remedy = f"pip uninstall -y {' '.join(runtime.packages)}, then pip install 'deploynorm[{extra}]'"
        yield Finding("broken", "onnxruntime-twice", problem, remedy)
    upgrade = f"pip install --upgrade {runtime.packages[0] if runtime.packages else 'onnxruntime'}"
    version, numpy = _numbers(runtime.version), _numbers(facts.packages.get("numpy"))
    if version and version < _OLDEST_ONNXRUNTIME:
        problem = f"onnxruntime {runtime.version} is too old: our operator library needs 1.18"
        yield Finding("broken", "onnxruntime-old", problem, upgrade)
    elif runtime.problem is not None and version and numpy and version < _FIRST_WITH_NUMPY_2 and numpy >= (2,):
        both = f"onnxruntime {runtime.version} was built for NumPy 1 and cannot be imported beside NumPy"
        problem = f"{both} {facts.packages['numpy']}"
        yield Finding("broken", "onnxruntime-numpy", problem, f"{upgrade}, or pip install 'numpy<2'")
    elif runtime.problem is not None:
        problem = f"onnxruntime cannot be used: {runtime.problem}"
        yield Finding("broken", "onnxruntime-import", problem, upgrade.replace("--upgrade", "--force-reinstall"))
    elif runtime.takes_library is False and _sound(facts.library(ORT_LIBRARY), facts):
        problem = f"onnxruntime {runtime.version} does not take our operator library: {runtime.library_problem}"
        yield Finding("broken", "onnxruntime-library", problem, _ROWS[ORT_LIBRARY].command)


def _libraries(facts: Examination) -> Iterator[Finding]:
    for library in facts.libraries:
        rebuild = _BUILD_CUDA if library.code else _ROWS[library.name].command
        missing = _missing_exports(library)
        if library.machine and facts.machine and library.machine != facts.machine:
            problem = f"{library.path} is for {library.machine}, and this Python is for {facts.machine}"
            yield Finding("broken", "library-machine", problem, rebuild)
        elif not library.machine:
            yield Finding("broken", "library-unreadable", f"{library.path}: {library.problem}", rebuild)
        elif missing:
            problem = f"{library.path} does not export {' and '.join(missing)}: it is not our {library.name}"
            yield Finding("broken", "library-not-ours", problem, rebuild)
        elif library.problem is not None:
            problem = f"{library.path} cannot be loaded: {library.problem}"
            yield Finding("broken", "library-does-not-load", problem, rebuild)
        if library.outdated:
            problem = f"{library.path} was installed before the sources in this clone were last changed"
            yield Finding("note", "library-stale", problem, rebuild)
    for row in _ROWS.values():
        if row.file == TENSORRT_REGISTER_LIBRARY or facts.library(row.file) is not None:
            continue
        steps = [] if facts.compiler else ["install g++ or clang++, pip install cmake ninja"]
        if row.needs_cuda and facts.nvcc is None:
            steps.append("pip install 'deploynorm[cuda]'")
        stale = "; what was built here is of other sources and is not used" if facts.stale else ""
        problem = f"{row.file} is not built: it brings {row.brings}{stale}"
        yield Finding("note", "library-missing", problem, ", then ".join([*steps, row.command]))


def _tensorrt(facts: Examination) -> Iterator[Finding]:
    for found in facts.tensorrt:
        if found.problem is not None:
            module = found.module.removesuffix("_bindings").replace("_", "-")
            package = next((name for name in facts.packages if re.fullmatch(rf"{module}(-cu\d+)?", name)), module)
            problem = f"{found.module} is installed and cannot be used: {found.problem}"
            yield Finding("broken", "tensorrt-import", problem, f"pip install --force-reinstall {package}")
        elif found.takes_plugin is False and _sound(facts.library(TENSORRT_LIBRARY), facts):
            problem = f"{found.module} {found.version} does not take our plugin: {found.plugin_problem}"
            yield Finding("broken", "tensorrt-plugin", problem, _BUILD_CUDA)
        elif found.takes_plugin and found.nameless is not None:
            yield Finding(
                "note",
                "tensorrt-rtx-name",
                "TensorRT-RTX's ONNX parser opens libtensorrt_rtx.so, which its package does not bring under this "
                "name, and ends the process at the first plugin; deploynorm sees to it, other programs do not",
                f"mkdir rtx && ln -s {found.nameless} rtx/libtensorrt_rtx.so, and start them with "
                "LD_LIBRARY_PATH=$PWD/rtx",
            )
    if not any(found.module in ("tensorrt", "tensorrt_rtx") for found in facts.tensorrt):
        problem = "TensorRT, which builds and runs engines on NVIDIA GPUs, is not installed"
        remedy = "pip install 'deploynorm[tensorrt]', or 'deploynorm[tensorrt-rtx]' for RTX cards"
        yield Finding("note", "tensorrt-missing", problem, remedy)


def _tensorrt_provider(facts: Examination) -> Iterator[Finding]:
    """The TensorRT provider is linked against one major version."""
    for provider in facts.providers:
        wanted = next((m[1] for name in provider.needed if (m := re.fullmatch(r"libnvinfer\.so\.(\d+)", name))), None)
        if wanted is None or f"libnvinfer.so.{wanted}" not in provider.missing:
            continue
        install = f"pip install 'tensorrt=={wanted}.*'"
        named = re.compile(r"tensorrt(-cu\d+)?(-libs)?")
        versions = {version for name, version in facts.packages.items() if named.fullmatch(name)}
        others = sorted(version for version in versions if version.partition(".")[0] != wanted)
        if others and len(others) == len(versions):
            opened = f"the TensorRT provider of this onnxruntime opens libnvinfer.so.{wanted}, of TensorRT {wanted}"
            other = f"for TensorRT {others[0].partition('.')[0]} leave the provider and use engines: deploynorm build"
            problem, remedy = f"TensorRT {others[0]} is installed, and {opened}", f"{install} for the provider; {other}"
            yield Finding("broken", "tensorrt-major", problem, remedy)
        elif not versions:
            problem = f"onnxruntime's TensorRT provider cannot start: it needs TensorRT {wanted}"
            yield Finding("note", "tensorrt-provider", problem, install)


def _torchvision(facts: Examination) -> Iterator[Finding]:
    """Its operators are compiled for one torch: with another, such as PyPI's beside a torch for CPUs, import fails."""
    if facts.torchvision_problem is not None:
        vision, torch = (f"{name} {facts.packages.get(name, '')}" for name in ("torchvision", "torch"))
        cause = f"which it was not built for: {facts.torchvision_problem}"
        one = "https://pytorch.org/get-started (for a torch for CPUs, the torchvision for CPUs)"
        remedy = f"install both from one place: {one}, or pip uninstall torchvision"
        yield Finding("broken", "torchvision-import", f"{vision} cannot be imported beside {torch}, {cause}", remedy)


def _driver(facts: Examination) -> Iterator[Finding]:
    driver = facts.driver
    called = f"NVIDIA driver {driver.version}" if driver.version else "NVIDIA driver"
    if driver.problem == "CUDA_ERROR_NO_DEVICE":
        if facts.visible_devices is None:
            hidden, remedy = "", "look for the GPU with nvidia-smi"
        else:
            hidden, remedy = f", with CUDA_VISIBLE_DEVICES={facts.visible_devices}", "unset CUDA_VISIBLE_DEVICES"
        yield Finding("note", "driver-no-gpu", f"the {called} offers no GPU{hidden}", remedy)
    elif driver.problem is not None:
        problem = f"the {called} does not start CUDA: {driver.problem}"
        update = "restart the machine after an update of the driver"
        remedy = f"{update}; in a container, its driver libraries must be those of the host"
        yield Finding("broken", "driver-error", problem, remedy)
    elif driver.cuda is None:
        install = f"for a GPU, install the driver, {_DRIVERS[13]} or later for CUDA 13"
        remedy = f"{install}; in a container, start it with its GPUs (docker run --gpus all)"
        yield Finding("note", "driver-missing", "no NVIDIA driver: everything here runs on the CPU", remedy)
    for what, major, otherwise in _users_of_cuda(facts):
        if driver.gpus and driver.cuda is not None and major > driver.cuda[0]:
            newer = f"to {_DRIVERS[major]} or later" if major in _DRIVERS else f"to one for CUDA {major}"
            problem = f"{what} is for CUDA {major}, and the {called} knows CUDA {_dotted(driver.cuda)}"
            yield Finding("broken", "driver-old", problem, f"upgrade the driver {newer}, or {otherwise}")


def _users_of_cuda(facts: Examination) -> Iterator[tuple[str, int, str]]:
    """Who needs a driver for which major version of CUDA, and what else one can do about it."""
    if facts.torch_cuda is not None:
        major = int(facts.torch_cuda.partition(".")[0])
        yield f"torch {facts.packages.get('torch', '')}", major, "install a torch for an older CUDA"
    for provider in facts.providers:
        for name in provider.needed:
            if provider.name == "cuda" and (found := re.fullmatch(r"libcudart\.so\.(\d+)", name)):
                yield "this onnxruntime-gpu", int(found[1]), "install an onnxruntime-gpu for an older CUDA"
    for name, version in facts.packages.items():
        if found := re.fullmatch(r"tensorrt(-lean|-rtx|-dispatch)?-cu(\d+)", name):
            yield f"{name} {version}", int(found[2]), "install it for an older CUDA"
    for library in facts.libraries:
        majors = {code.cuda for code in library.code if code.cuda is not None}
        if majors:
            yield library.name, max(majors), f"build it with an older nvcc: {_BUILD_CUDA}"


def _code_for_gpus(facts: Examination) -> Iterator[Finding]:
    for library in facts.libraries:
        for gpu in dict.fromkeys(facts.driver.gpus):
            fitting = [code for code in library.code if code.runs_on(gpu.capability)]
            about = f"{library.name} has {', '.join(code.name for code in library.code)}"
            device = f"{gpu.name} (compute capability {_dotted(gpu.capability)})"
            rebuild = f"{_BUILD_CUDA} --architectures {gpu.capability[0]}{gpu.capability[1]}"
            if gpu.capability < _FIRST_GPU:
                rebuild = f"{_ROWS[ORT_LIBRARY].command}, without CUDA: such a GPU then runs FRN as several operators"
            if library.code and not fitting:
                yield Finding("broken", "gpu-code", f"{about}, and nothing for {device}", rebuild)
            elif fitting and all(code.kind == "compute" for code in fitting):
                problem = f"{about}: for {device} the driver compiles the PTX when a program first uses it"
                yield Finding("note", "gpu-ptx", problem, rebuild)
    ours = facts.library(ORT_LIBRARY)
    on_cuda = facts.onnxruntime is not None and "CUDAExecutionProvider" in facts.onnxruntime.providers
    if facts.driver.gpus and on_cuda and ours is not None and not ours.code and _sound(ours, facts):
        problem = f"{ours.name} was built without CUDA: on the CUDA provider FRN runs as several operators, slower"
        first = "" if facts.nvcc else "pip install 'deploynorm[build,cuda]', then "
        yield Finding("note", "library-without-cuda", problem, first + _BUILD_CUDA)


def _cuda_libraries(facts: Examination) -> Iterator[Finding]:
    provider = next((each for each in facts.providers if each.name == "cuda"), None)
    if provider is None or not facts.driver.gpus:  # without a GPU it has nothing to start for
        return
    absent = [name for name, folder in provider.missing.items() if folder is None]
    elsewhere = {name: folder for name, folder in provider.missing.items() if folder is not None}
    if absent:
        problem = f"onnxruntime's CUDA provider cannot start: {', '.join(absent)} not found"
        yield Finding("broken", "cuda-libraries", problem, "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    elif elsewhere:
        yield Finding(
            "note",
            "cuda-libraries",
            f"onnxruntime's CUDA provider does not find {', '.join(elsewhere)} by itself, since pip has put them where "
            "the system does not look; deploynorm.ort.session sees to it",
            "in your own code, onnxruntime.preload_dlls() before the first session, or export "
            f"LD_LIBRARY_PATH={':'.join(sorted(set(elsewhere.values())))}",
        )


def _toolkit(facts: Examination) -> Iterator[Finding]:
    if facts.nvcc_release is not None and facts.nvcc_release < _NVCC:
        unknown = f"nvcc {_dotted(facts.nvcc_release)} does not know the newest GPUs"
        remedy = f"install CUDA {_dotted(_NVCC)} or later, or name yours: {_BUILD_CUDA} --architectures 80"
        yield Finding("note", "nvcc-old", f"{unknown}, for which `{_BUILD_CUDA}` builds too", remedy)
    if facts.driver.gpus and "torch" in facts.packages and facts.torch_cuda is None:
        called = f"torch {facts.packages['torch']} is for CPUs only"
        problem = f"{called}: checks run there, and TensorRT engines cannot be run"
        yield Finding("note", "torch-cpu", problem, "install a CUDA torch: https://pytorch.org/get-started")


_CHECKS: Final[tuple[Callable[[Examination], Iterator[Finding]], ...]] = (
    _onnxruntime,
    _libraries,
    _tensorrt,
    _tensorrt_provider,
    _torchvision,
    _driver,
    _code_for_gpus,
    _cuda_libraries,
    _toolkit,
)


def _missing_exports(library: Library) -> list[str]:
    """What its host looks for in the library, and does not find."""
    return [name for name in _ROWS[library.name].exports if name not in library.exports]


def _sound(library: Library | None, facts: Examination) -> bool:
    """Whether a library is there and nothing is wrong with it by itself."""
    if library is None or library.problem is not None or _missing_exports(library):
        return False
    return facts.machine in (None, library.machine)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _numbers(version: str | None) -> tuple[int, ...]:
    """The first two numbers of a version; nothing of what is none."""
    return tuple(int(number) for number in re.findall(r"\d+", (version or "").partition("+")[0])[:2])
