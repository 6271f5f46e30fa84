"""Findings about onnxruntime and TensorRT."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from deploynorm.doctor.facts import Examination
from deploynorm.doctor.finding import BUILD_CUDA, ROWS, Finding, sound
from deploynorm.libraries import ORT_LIBRARY, TENSORRT_LIBRARY

__all__ = ["onnxruntime", "tensorrt", "tensorrt_provider", "torchvision"]

_OLDEST_ONNXRUNTIME: Final = (1, 18)
_FIRST_WITH_NUMPY_2: Final = (1, 19)


def onnxruntime(facts: Examination) -> Iterator[Finding]:
    runtime = facts.onnxruntime
    if runtime is None:
        yield Finding(
            "note",
            "onnxruntime-missing",
            "onnxruntime, which runs and checks ONNX files, is not installed",
            "pip install 'deploynorm[cpu]', or 'deploynorm[gpu]' for the CUDA provider",
        )
        return
    if len(runtime.packages) > 1:
        extra = "cpu" if all(name == "onnxruntime" or name.endswith("training") for name in runtime.packages) else "gpu"
        yield Finding(
            "broken",
            "onnxruntime-twice",
            f"{' and '.join(runtime.packages)} are both installed, and each has overwritten files of the other",
            f"pip uninstall -y {' '.join(runtime.packages)}, then pip install 'deploynorm[{extra}]'",
        )
    package = runtime.packages[0] if runtime.packages else "onnxruntime"
    version, numpy = _numbers(runtime.version), _numbers(facts.packages.get("numpy"))
    if version and version < _OLDEST_ONNXRUNTIME:
        yield Finding(
            "broken",
            "onnxruntime-old",
            f"onnxruntime {runtime.version} is too old: our operator library needs 1.18",
            f"pip install --upgrade {package}",
        )
    elif runtime.problem is not None and version and numpy and version < _FIRST_WITH_NUMPY_2 and numpy >= (2,):
        yield Finding(
            "broken",
            "onnxruntime-numpy",
            f"onnxruntime {runtime.version} was built for NumPy 1 and cannot be imported beside NumPy "
            f"{facts.packages['numpy']}",
            f"pip install --upgrade {package}, or pip install 'numpy<2'",
        )
    elif runtime.problem is not None:
        yield Finding(
            "broken",
            "onnxruntime-import",
            f"onnxruntime cannot be used: {runtime.problem}",
            f"pip install --force-reinstall {package}",
        )
    elif runtime.takes_library is False and sound(facts.library(ORT_LIBRARY), facts):
        yield Finding(
            "broken",
            "onnxruntime-library",
            f"onnxruntime {runtime.version} does not take our operator library: {runtime.library_problem}",
            ROWS[ORT_LIBRARY].command,
        )


def tensorrt(facts: Examination) -> Iterator[Finding]:
    for found in facts.tensorrt:
        if found.problem is not None:
            yield Finding(
                "broken",
                "tensorrt-import",
                f"{found.module} is installed and cannot be used: {found.problem}",
                f"pip install --force-reinstall {_package_of(found.module, facts)}",
            )
        elif found.takes_plugin is False and sound(facts.library(TENSORRT_LIBRARY), facts):
            yield Finding(
                "broken",
                "tensorrt-plugin",
                f"{found.module} {found.version} does not take our plugin: {found.plugin_problem}",
                BUILD_CUDA,
            )
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
        yield Finding(
            "note",
            "tensorrt-missing",
            "TensorRT, which builds and runs engines on NVIDIA GPUs, is not installed",
            "pip install 'deploynorm[tensorrt]', or 'deploynorm[tensorrt-rtx]' for RTX cards",
        )


def _package_of(module: str, facts: Examination) -> str:
    wanted = module.removesuffix("_bindings").replace("_", "-")
    pattern = re.compile(rf"{wanted}(-cu\d+)?")
    return next((name for name in facts.packages if pattern.fullmatch(name)), wanted)


def tensorrt_provider(facts: Examination) -> Iterator[Finding]:
    """The TensorRT provider is linked against one major version."""
    for provider in facts.providers:
        wanted = next((m[1] for name in provider.needed if (m := re.fullmatch(r"libnvinfer\.so\.(\d+)", name))), None)
        if wanted is None or f"libnvinfer.so.{wanted}" not in provider.missing:
            continue
        named = re.compile(r"tensorrt(-cu\d+)?(-libs)?")
        versions = {version for name, version in facts.packages.items() if named.fullmatch(name)}
        others = sorted(version for version in versions if version.partition(".")[0] != wanted)
        if others and len(others) == len(versions):
            yield Finding(
                "broken",
                "tensorrt-major",
                f"TensorRT {others[0]} is installed, and the TensorRT provider of this onnxruntime opens "
                f"libnvinfer.so.{wanted}, of TensorRT {wanted}",
                f"pip install 'tensorrt=={wanted}.*' for the provider; for TensorRT {others[0].partition('.')[0]} "
                "leave the provider and use engines: deploynorm build",
            )
        elif not versions:
            yield Finding(
                "note",
                "tensorrt-provider",
                f"onnxruntime's TensorRT provider cannot start: it needs TensorRT {wanted}",
                f"pip install 'tensorrt=={wanted}.*'",
            )


def torchvision(facts: Examination) -> Iterator[Finding]:
    """Its operators are compiled for one torch: with another, such as PyPI's beside a torch for CPUs, import fails."""
    if facts.torchvision_problem is not None:
        yield Finding(
            "broken",
            "torchvision-import",
            f"torchvision {facts.packages.get('torchvision', '')} cannot be imported beside torch "
            f"{facts.packages.get('torch', '')}, which it was not built for: {facts.torchvision_problem}",
            "install both from one place: https://pytorch.org/get-started (for a torch for CPUs, the torchvision for "
            "CPUs), or pip uninstall torchvision",
        )


def _numbers(version: str | None) -> tuple[int, ...]:
    """The first two numbers of a version; nothing of what is none."""
    return tuple(int(number) for number in re.findall(r"\d+", (version or "").partition("+")[0])[:2])
