"""What there is to know of a machine: filled in by `examine`, judged by `diagnose`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deploynorm.doctor.elf import CudaCode

__all__ = ["Driver", "Examination", "Gpu", "Library", "OnnxRuntime", "Provider", "TensorRT"]


@dataclass(frozen=True)
class Gpu:
    """One that CUDA offers to a program started here."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver.

    Attributes:
        version: Its own, where it is known.
        cuda: The newest CUDA that it knows; None without a driver.
        gpus: What CUDA offers.
        problem: CUDA's name of the error, where it offers nothing.
    """

    version: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Library:
    """One of ours, as found on this machine.

    Attributes:
        name: See deploynorm.libraries.
        path: Where it lies.
        size_bytes: Of the file.
        origin: "built here" or "installed".
        machine: The processor that it is for.
        needed: The libraries that it needs.
        exports: What it exports.
        code: Its code for GPUs.
        problem: Why it cannot be read or loaded; None where it can.
        outdated: Whether the sources in this clone are newer.
    """

    name: str
    path: str
    size_bytes: int
    origin: str
    machine: str = ""
    needed: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    code: tuple[CudaCode, ...] = ()
    problem: str | None = None
    outdated: bool = False


@dataclass(frozen=True)
class OnnxRuntime:
    """The module onnxruntime.

    Attributes:
        version: As the module has it, or its package where it cannot be imported.
        packages: Those that have put files into the module's folder.
        providers: Its execution providers.
        problem: Why it cannot be imported.
        takes_library: Whether it has taken our operator library; None where there is none.
        library_problem: Why not.
    """

    version: str | None = None
    packages: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    problem: str | None = None
    takes_library: bool | None = None
    library_problem: str | None = None


@dataclass(frozen=True)
class Provider:
    """The library of an execution provider of onnxruntime.

    Attributes:
        name: "cuda" or "tensorrt".
        needed: The libraries that it opens.
        missing: Those that the system's loader does not find, each with a folder in which pip has put it, or None.
    """

    name: str
    needed: tuple[str, ...]
    missing: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorRT:
    """An installed TensorRT.

    Attributes:
        module: tensorrt, tensorrt_lean or tensorrt_rtx.
        version: As the module has it.
        problem: Why it cannot be imported or is none that we know.
        takes_plugin: Whether our plugin is in its registry once loaded; None where the plugin is not built.
        plugin_problem: Why not.
        creators: How many plugins its registry holds, ours among them.
        nameless: TensorRT-RTX's library, where the name is missing by which its parser opens it.
    """

    module: str
    version: str | None = None
    problem: str | None = None
    takes_plugin: bool | None = None
    plugin_problem: str | None = None
    creators: int | None = None
    nameless: str | None = None


@dataclass(frozen=True)
class Examination:
    """All of it.

    Attributes:
        python: Version and path.
        system: Operating system and processor.
        packages: Versions by the names that pip knows, of those that matter here.
        torch_cuda: The CUDA that torch was built for.
        torchvision_problem: Why torchvision cannot be imported; None where it can, or is not installed.
        onnxruntime: None where it is not installed.
        providers: Of onnxruntime-gpu.
        tensorrt: Each that is installed.
        compiler: Of C++, with CMake, for `deploynorm plugins build`; None where one is missing.
        nvcc: The CUDA compiler.
        nvcc_release: Its version.
        driver: With the GPUs.
        visible_devices: The environment variable CUDA_VISIBLE_DEVICES.
        machine: The processor that this Python is for.
        libraries: Ours that were found.
        stale: Folders of libraries that were built here from other sources than this package brings.
    """

    python: str = ""
    system: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    torch_cuda: str | None = None
    torchvision_problem: str | None = None
    onnxruntime: OnnxRuntime | None = None
    providers: tuple[Provider, ...] = ()
    tensorrt: tuple[TensorRT, ...] = ()
    compiler: str | None = None
    nvcc: str | None = None
    nvcc_release: tuple[int, int] | None = None
    driver: Driver = Driver()
    visible_devices: str | None = None
    machine: str | None = None
    libraries: tuple[Library, ...] = ()
    stale: tuple[str, ...] = ()

    def library(self, name: str) -> Library | None:
        return next((library for library in self.libraries if library.name == name), None)
