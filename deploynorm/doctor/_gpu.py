"""Findings about the driver, the GPUs, and what is there for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from deploynorm.doctor.facts import Examination
from deploynorm.doctor.finding import BUILD_CUDA, DRIVERS, ROWS, Finding, dotted, sound
from deploynorm.libraries import ORT_LIBRARY

__all__ = ["code_for_gpus", "cuda_libraries", "driver", "toolkit"]

_NVCC: Final = (12, 8)  # the first that knows compute capability 12.0
_FIRST_GPU: Final = (7, 5)


def driver(facts: Examination) -> Iterator[Finding]:
    driver = facts.driver
    called = f"NVIDIA driver {driver.version}" if driver.version else "NVIDIA driver"
    if driver.problem == "CUDA_ERROR_NO_DEVICE":
        hidden = facts.visible_devices is not None
        yield Finding(
            "note",
            "driver-no-gpu",
            f"the {called} offers no GPU" + (f", with CUDA_VISIBLE_DEVICES={facts.visible_devices}" if hidden else ""),
            "unset CUDA_VISIBLE_DEVICES" if hidden else "look for the GPU with nvidia-smi",
        )
    elif driver.problem is not None:
        yield Finding(
            "broken",
            "driver-error",
            f"the {called} does not start CUDA: {driver.problem}",
            "restart the machine after an update of the driver; in a container, its driver libraries must be those of "
            "the host",
        )
    elif driver.cuda is None:
        yield Finding(
            "note",
            "driver-missing",
            "no NVIDIA driver: everything here runs on the CPU",
            f"for a GPU, install the driver, {DRIVERS[13]} or later for CUDA 13; in a container, start it with "
            "its GPUs (docker run --gpus all)",
        )
    for what, major, otherwise in _users_of_cuda(facts):
        if driver.gpus and driver.cuda is not None and major > driver.cuda[0]:
            newer = f"to {DRIVERS[major]} or later" if major in DRIVERS else f"to one for CUDA {major}"
            yield Finding(
                "broken",
                "driver-old",
                f"{what} is for CUDA {major}, and the {called} knows CUDA {dotted(driver.cuda)}",
                f"upgrade the driver {newer}, or {otherwise}",
            )


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
            yield library.name, max(majors), f"build it with an older nvcc: {BUILD_CUDA}"


def code_for_gpus(facts: Examination) -> Iterator[Finding]:
    for library in facts.libraries:
        for gpu in dict.fromkeys(facts.driver.gpus):
            fitting = [code for code in library.code if code.runs_on(gpu.capability)]
            about = f"{library.name} has {', '.join(code.name for code in library.code)}"
            device = f"{gpu.name} (compute capability {dotted(gpu.capability)})"
            rebuild = f"{BUILD_CUDA} --architectures {gpu.capability[0]}{gpu.capability[1]}"
            if gpu.capability < _FIRST_GPU:
                rebuild = f"{ROWS[ORT_LIBRARY].command}, without CUDA: such a GPU then runs FRN as several operators"
            if library.code and not fitting:
                yield Finding("broken", "gpu-code", f"{about}, and nothing for {device}", rebuild)
            elif fitting and all(code.kind == "compute" for code in fitting):
                yield Finding(
                    "note",
                    "gpu-ptx",
                    f"{about}: for {device} the driver compiles the PTX when a program first uses it",
                    rebuild,
                )
    ours = facts.library(ORT_LIBRARY)
    on_cuda = facts.onnxruntime is not None and "CUDAExecutionProvider" in facts.onnxruntime.providers
    if facts.driver.gpus and on_cuda and ours is not None and not ours.code and sound(ours, facts):
        yield Finding(
            "note",
            "library-without-cuda",
            f"{ours.name} was built without CUDA: on the CUDA provider FRN runs as several operators, slower",
            BUILD_CUDA if facts.nvcc else f"pip install 'deploynorm[build,cuda]', then {BUILD_CUDA}",
        )


def cuda_libraries(facts: Examination) -> Iterator[Finding]:
    provider = next((each for each in facts.providers if each.name == "cuda"), None)
    if provider is None or not facts.driver.gpus:  # without a GPU it has nothing to start for
        return
    absent = [name for name, folder in provider.missing.items() if folder is None]
    elsewhere = {name: folder for name, folder in provider.missing.items() if folder is not None}
    if absent:
        yield Finding(
            "broken",
            "cuda-libraries",
            f"onnxruntime's CUDA provider cannot start: {', '.join(absent)} not found",
            "pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
    elif elsewhere:
        yield Finding(
            "note",
            "cuda-libraries",
            f"onnxruntime's CUDA provider does not find {', '.join(elsewhere)} by itself, since pip has put them where "
            "the system does not look; deploynorm.ort.session sees to it",
            "in your own code, onnxruntime.preload_dlls() before the first session, or export "
            f"LD_LIBRARY_PATH={':'.join(sorted(set(elsewhere.values())))}",
        )


def toolkit(facts: Examination) -> Iterator[Finding]:
    if facts.nvcc_release is not None and facts.nvcc_release < _NVCC:
        yield Finding(
            "note",
            "nvcc-old",
            f"nvcc {dotted(facts.nvcc_release)} does not know the newest GPUs, for which `{BUILD_CUDA}` builds too",
            f"install CUDA {dotted(_NVCC)} or later, or name yours: {BUILD_CUDA} --architectures 80",
        )
    if facts.driver.gpus and "torch" in facts.packages and facts.torch_cuda is None:
        yield Finding(
            "note",
            "torch-cpu",
            f"torch {facts.packages['torch']} is for CPUs only: checks run there, and TensorRT engines cannot be run",
            "install a CUDA torch: https://pytorch.org/get-started",
        )
