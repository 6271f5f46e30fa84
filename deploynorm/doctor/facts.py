"""What there is to know of a machine: filled in by `examine`, judged by `diagnose`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deploynorm.libraries.elf import CudaCode


@dataclass(frozen=True)
class Gpu:
    """One that CUDA offers to a program started here."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver."""

    version: str | None = None  # its own, where it is known
    cuda: tuple[int, int] | None = None  # the newest CUDA that it knows; None without a driver
    gpus: tuple[Gpu, ...] = ()  # what CUDA offers
    problem: str | None = None  # CUDA's name of the error, where it offers nothing


@dataclass(frozen=True)
class Library:
    """One of ours, as found on this machine."""

    name: str  # see deploynorm.libraries
    path: str
    size_bytes: int
    origin: str  # "built here" or "installed"
    machine: str = ""  # the processor that it is for
    needed: tuple[str, ...] = ()  # the libraries that it needs
    exports: tuple[str, ...] = ()
    code: tuple[CudaCode, ...] = ()  # its code for GPUs
    problem: str | None = None  # why it cannot be read or loaded; None where it can
    outdated: bool = False  # whether the sources in this clone are newer


@dataclass(frozen=True)
class OnnxRuntime:
    """The module onnxruntime."""

    version: str | None = None  # as the module has it, or its package where it cannot be imported
    packages: tuple[str, ...] = ()  # those that have put files into the module's folder
    providers: tuple[str, ...] = ()
    problem: str | None = None  # why it cannot be imported
    takes_library: bool | None = None  # whether it has taken our operator library; None where there is none
    library_problem: str | None = None  # why not


@dataclass(frozen=True)
class Provider:
    """The library of an execution provider of onnxruntime."""

    name: str  # "cuda" or "tensorrt"
    needed: tuple[str, ...]  # the libraries that it opens
    missing: Mapping[str, str | None] = field(default_factory=dict)
    """Those that the system's loader does not find, each with a folder in which pip has put it, or None."""


@dataclass(frozen=True)
class TensorRT:
    """An installed TensorRT."""

    module: str  # of those of deploynorm.trt.FLAVOURS
    version: str | None = None
    problem: str | None = None  # why it cannot be imported or is none that we know
    takes_plugin: bool | None = None  # whether our plugin is in its registry once loaded; None where it is not built
    plugin_problem: str | None = None  # why not
    creators: int | None = None  # how many plugins its registry holds, ours among them
    nameless: str | None = None  # TensorRT-RTX's library, where the name is missing by which its parser opens it


@dataclass(frozen=True)
class Examination:
    """What is on this machine. An attribute is empty or None for what is not there.

    Attributes:
        python: Version and path.
        system: Operating system and processor.
        packages: Versions, by the names that pip knows.
        torch_cuda: The CUDA that torch was built for.
        torchvision_problem: Why torchvision cannot be imported; None where it can, or is not installed.
        onnxruntime: Its version and providers, and whether it takes our operator library.
        providers: Those of onnxruntime-gpu, and the libraries that they need.
        tensorrt: Each flavour of TensorRT.
        compiler: Of C++, with CMake, for `deploynorm plugins build`; None where one of the two is missing.
        nvcc: The CUDA compiler.
        nvcc_release: Its version.
        driver: NVIDIA's driver and its GPUs.
        visible_devices: The environment variable CUDA_VISIBLE_DEVICES.
        machine: The processor that this Python is for.
        libraries: Ours: what they need, export and hold code for.
        stale: Folders of libraries that were built here from other sources than the package has.
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
