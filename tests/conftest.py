"""Fixtures for every test, and how a run is shared out and reported."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import compiled
import pytest
import torch
from cuda_kernels import CudaKernel
from unoptimized import unoptimized

from deploynorm import libraries
from deploynorm.errors import BackendError

if TYPE_CHECKING:
    from deploynorm.models.data import ImageData

OPTIONAL = {
    "ort": ("onnxruntime", "pip install 'deploynorm[cpu]'"),
    "timm": ("timm", "pip install timm"),
    "graphsurgeon": ("onnx_graphsurgeon", "pip install 'deploynorm[surgery]'"),
    "data": ("sklearn", "pip install 'deploynorm[train]'"),
    "trt-rtx": ("tensorrt_rtx", "pip install tensorrt_rtx_cu13"),
    "polygraphy": ("polygraphy", "pip install polygraphy"),
    "openvino": ("openvino", "pip install 'deploynorm[openvino]'"),
    "ncnn": ("ncnn", "pip install 'deploynorm[ncnn]'"),
    "mnn": ("MNN", "pip install 'deploynorm[mnn]'"),
}
"""Name in DEPLOYNORM_REQUIRE -> the module that it means, and how to install it."""

HEADERS = {
    "ort-headers": ("ONNXRUNTIME_INCLUDE_DIR", "onnxruntime_c_api.h"),
    "trt-headers": ("TENSORRT_INCLUDE_DIR", "NvInferRuntime.h"),
}
"""Name in DEPLOYNORM_REQUIRE -> the variable with a folder, and a header in that folder."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Runs a plain `pytest` in two processes, where pytest-xdist is installed and -n does not say otherwise."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = min(os.cpu_count() or 1, 2)
        config.option.dist = "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    """Gives the tests an empty cache: that of the user may have libraries of `deploynorm plugins build`."""
    folder = tempfile.mkdtemp(prefix="deploynorm-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    # Otherwise Matplotlib would list the fonts again in each run, which takes seconds.
    os.environ.setdefault(
        "MPLCONFIGDIR", str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matplotlib")
    )
    os.environ["XDG_CACHE_HOME"] = folder
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Collects garbage less often: the search through all that torch keeps takes an eighth of an export."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_runtest_setup() -> None:
    if "torch.onnx" in sys.modules:
        _build_tables_once()


@functools.cache
def _build_tables_once() -> ExitStack:
    """Lets torch build its tables of operators once per process, where tests call its exporter themselves too."""
    from deploynorm._export.tables import tables_once

    stack = ExitStack()
    stack.enter_context(tables_once())
    return stack


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [] if torch.cuda.is_available() else ["tests/gpu: on the emulation only, torch finds no CUDA device"]
    if config.option.markexpr == "not slow":
        lines.append("tests marked slow: deselected, `pytest -m slow` runs them")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for all skipped tests: how many, and each reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    if reasons:
        each = "; ".join(f"{count} since {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"skipped {len(skipped)}: {each}")


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_clone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A Python process started in the clone would import deploynorm from there, and not as installed."""
    os.chdir(tmp_path_factory.mktemp("away"))


def _missing(name: str, reason: str) -> NoReturn:
    """Skips the test, or fails it where DEPLOYNORM_REQUIRE names what is missing."""
    if name in os.environ.get("DEPLOYNORM_REQUIRE", "").split(","):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _reason(name: str) -> str | None:
    """Why what this name means cannot be used on this machine, or None."""
    if name == "native":
        built = libraries.find_library() is not None
        return None if built else "native: the operator library is not built (deploynorm plugins build)"
    if name in ("compiler", "nvcc"):
        try:
            libraries.find_tools()
            if name == "nvcc":
                libraries.find_cuda()
        except BackendError as error:
            return f"{name}: {error}"
        return None
    if name in HEADERS:
        variable, header = HEADERS[name]
        there = (Path(os.environ.get(variable, "")) / header).is_file()
        return None if there else f"{name}: {variable} is not a folder with {header}"
    if name == "trt-lean":
        return None if os.environ.get("TENSORRT_LEAN_DIRS") else "trt-lean: TENSORRT_LEAN_DIRS is not set"
    if name == "gpu":
        return None if torch.cuda.is_available() else "gpu: torch finds no CUDA device"
    module, remedy = OPTIONAL[name]
    installed = importlib.util.find_spec(module) is not None
    return None if installed else f"{name}: {module} is not installed ({remedy})"


@pytest.fixture(scope="session")
def require() -> Callable[[str], None]:
    """require("ort") skips the test where onnxruntime is missing, or fails it where DEPLOYNORM_REQUIRE names ort.

    Names are those of OPTIONAL and HEADERS, "native" (our operator library), "compiler" (builds it), "nvcc" (builds it
    with CUDA), "trt-lean" (TensorRT's lean runtimes in the folders of TENSORRT_LEAN_DIRS), and "gpu" (a CUDA device).
    """

    def require(name: str) -> None:
        if (reason := _reason(name)) is not None:
            _missing(name, reason)

    return require


@pytest.fixture(scope="session")
def build_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """build_once(name, build): a folder that build(folder) filled, once for each state of the sources, in any run.

    What tests/compiled.py compiles ahead is asked for by its name alone.
    """
    cache = request.config.cache
    parent = tmp_path_factory.mktemp("compiled") if cache is None else cache.mkdir("compiled")
    key = compiled.digest()
    return lambda name, build=None: compiled.build_once(parent / name, key, build or compiled.BUILDS[name])


@pytest.fixture
def compile_library(require: Callable[[str], None], tmp_path: Path) -> Callable[..., Path]:
    """compile_library("libname.so.1", source, *options): a shared library of C, in a folder of its own."""
    require("compiler")

    def compile_library(name: str, source: str, *options: str, folder: Path = tmp_path / "lib") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source.c").write_text(source)
        words = ["-shared", "-fPIC", "-x", "c", tmp_path / "source.c", "-x", "none", *options, "-o", folder / name]
        subprocess.run([str(word) for word in (libraries.find_tools().compiler, *words)], check=True)
        return folder / name

    return compile_library


@pytest.fixture(scope="session")
def unoptimized_compiler(require: Callable[[str], None], build_once: Callable[..., Path]) -> str:
    """For CXX, where the speed of what is built does not matter."""
    require("compiler")
    return str(build_once("unoptimized", unoptimized) / "compiler")


@pytest.fixture(scope="session")
def cuda_libraries(require: Callable[[str], None], build_once: Callable[..., Path]) -> Path:
    """A folder of our libraries with CUDA, which no test here runs on a GPU."""
    require("nvcc")
    require("trt-headers")
    return build_once("cuda-libraries")


@pytest.fixture(scope="session")
def emulated_library(require: Callable[[str], None], build_once: Callable[..., Path]) -> Path:
    """The CUDA kernels, compiled for the CPU."""
    require("compiler")
    return build_once("emulated") / "libemulated.so"


@pytest.fixture(scope="session")
def emulated(emulated_library: Path) -> CudaKernel:
    return CudaKernel(emulated_library, "cpu")


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without our operator library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty cache"))
    monkeypatch.setattr("deploynorm.libraries.find.installed_library", lambda name: None)
    assert libraries.find_library() is None


@pytest.fixture(scope="session")
def fashion_mnist() -> ImageData:
    """The real Fashion-MNIST. Skips the test where it is missing, or fails it where DEPLOYNORM_REQUIRE names data."""
    from deploynorm.models.data import load_fashion_mnist  # imported late: tests/gpu runs without its requirements

    try:
        return load_fashion_mnist()
    except BackendError as error:
        _missing("data", str(error))


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm. Skips the test where it is missing, or fails it where DEPLOYNORM_REQUIRE names timm."""
    if importlib.util.find_spec("timm") is None:
        _missing("timm", "timm is not installed (pip install timm)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("timm")
        except RuntimeError:
            # PyPI's torchvision is built for CUDA: with a CPU torch it lacks operators that it registers shapes for.
            for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
                del sys.modules[name]
            for operator in ("nms", "qnms"):
                TORCHVISION.append(torch.library.Library("torchvision", "FRAGMENT"))
                TORCHVISION[-1].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            return importlib.import_module("timm")


TORCHVISION: list[torch.library.Library] = []
"""Operators exist as long as the library object that defined them."""
