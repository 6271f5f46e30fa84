"""The CUDA kernels on the emulation, and the libraries as nvcc builds them for the GPU that is here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_kernels import CudaKernel
from emulated import HOSTS, build_hosts
from tensorrt_host import Host

from deploynorm import libraries
from deploynorm.layers import _native

# Without a GPU only the emulation is tested (tests/conftest.py says so at the top of a run), unless one is required.
GPU = torch.cuda.is_available() or "gpu" in os.environ.get("DEPLOYNORM_REQUIRE", "").split(",")
if not GPU:
    on_both = ("test_broken.py", "test_kernels.py", "test_plugin.py")
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in on_both]


@pytest.fixture(scope="session")
def architecture(require: Callable[[str], None]) -> str:
    """The GPU's, as CMake has it: "90". Skips the test where there is no GPU or no nvcc."""
    require("gpu")
    require("nvcc")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


@pytest.fixture(scope="session")
def built(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of our libraries for this GPU, with the plugin where TensorRT's headers are.

    It is that of DEPLOYNORM_GPU_LIBRARIES, which tests/gpu/prove has built once for all, or built here.
    """
    if named := os.environ.get("DEPLOYNORM_GPU_LIBRARIES"):
        return Path(named)
    headers = "TENSORRT_INCLUDE_DIR" in os.environ
    folder = tmp_path_factory.mktemp("libraries")
    return libraries.build(folder, cuda=True, tensorrt=headers, architectures=[architecture]).library.parent


@pytest.fixture(scope="session")
def library(built: Path) -> Path:
    """The operator library with CUDA kernels."""
    return built / libraries.ORT_LIBRARY


@pytest.fixture(scope="session")
def plugin(built: Path, require: Callable[[str], None]) -> Path:
    """The TensorRT plugin."""
    require("trt-headers")
    return built / libraries.TENSORRT_LIBRARY


@pytest.fixture(scope="session")
def gpu_host(plugin: Path, build_once: Callable[..., Path]) -> Host:
    """The plugin as TensorRT drives it."""
    return Host(build_once("hosts", build_hosts) / HOSTS[0], plugin, "cuda")


@pytest.fixture(scope="session")
def training_library(library: Path) -> Path:
    """The kernels for training, which are those of both passes."""
    return library.with_name(libraries.TORCH_LIBRARY)


@pytest.fixture(scope="session")
def gpu_kernel(training_library: Path) -> CudaKernel:
    return CudaKernel(training_library, "cuda")


@pytest.fixture(scope="session", params=["emulated", "gpu"] if GPU else ["emulated"])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def kernel(device: str, request: pytest.FixtureRequest) -> CudaKernel:
    """The kernels on each device that there is."""
    found: CudaKernel = request.getfixturevalue("emulated" if device == "emulated" else "gpu_kernel")
    return found


@pytest.fixture
def native(training_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers run on the library that was built for this test run."""
    monkeypatch.setattr(_native, "LIBRARY", _native._Library(training_library))
    assert _native.available(torch.device("cuda"))
