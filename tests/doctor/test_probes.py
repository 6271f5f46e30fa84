"""Probes: what they find out, and that nothing which goes wrong in one reaches the caller."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploynorm import libraries
from deploynorm.contract import OPERATORS
from deploynorm.doctor import probes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ELF")

LEAN = [Path(folder) for folder in os.environ.get("TENSORRT_LEAN_DIRS", "").split(os.pathsep) if folder]

CUDA = """
#include <stddef.h>
#include <string.h>
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuInit(unsigned flags) { return flags == 0 ? STATUS : 1; }
int cuGetErrorName(int status, const char** name) {
  *name = status == 803 ? "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" : NULL;
  return status == 803 ? 0 : 1;
}
int cuDeviceGetCount(int* count) { *count = COUNT; return 0; }
int cuDeviceGet(int* device, int index) { *device = 10 + index; return 0; }
int cuDeviceGetName(char* name, int size, int device) {
  strncpy(name, device == 10 ? "NVIDIA H100" : "NVIDIA GeForce RTX 4090", size);
  return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = (device == 10 ? 80ull : 24ull) << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? (device == 10 ? 9 : 8) : attribute == 76 ? (device == 10 ? 0 : 9) : -1;
  return 0;
}
"""

NVML = """
#include <string.h>
static int started = 0;
int nvmlInit_v2(void) { started = 1; return 0; }
int nvmlSystemGetDriverVersion(char* version, unsigned size) { strncpy(version, "550.54.15", size); return !started; }
"""


@pytest.fixture
def driver(compile_library: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """driver(status=, gpus=, nvml=): a driver that answers so, for the processes that are started from here."""

    def driver(status: int = 0, gpus: int = 1, nvml: bool = True) -> None:
        path = compile_library("libcuda.so.1", CUDA, f"-DSTATUS={status}", f"-DCOUNT={gpus}")
        if nvml:
            compile_library("libnvidia-ml.so.1", NVML)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(path.parent))

    return driver


def test_driver_and_gpus(driver: Callable[..., None]) -> None:
    driver(gpus=2)
    assert probes.ask(probes.devices) == {
        "version": "550.54.15",
        "cuda": [12, 4],
        "gpus": [["NVIDIA H100", [9, 0], 80 * 2**30], ["NVIDIA GeForce RTX 4090", [8, 9], 24 * 2**30]],
    }


@pytest.mark.parametrize(("status", "name"), [(803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"), (999, "CUDA error 999")])
def test_a_driver_that_does_not_start(status: int, name: str, driver: Callable[..., None]) -> None:
    driver(status=status, nvml=False)
    found = probes.ask(probes.devices)
    assert (found["cuda"], found["gpus"], found["problem"]) == ([12, 4], [], name)


@pytest.mark.parametrize(
    ("constructor", "answer"),
    [
        ("abort();", {"problem": "it ended its process with SIGABRT"}),
        ("raise(SIGSEGV);", {"problem": "it ended its process with SIGSEGV"}),
        (
            'fputs("first\\nlast words\\n", stderr); abort();',
            {"problem": "it ended its process with SIGABRT: last words"},
        ),
        ('fputs("it is over\\n", stderr); _exit(3);', {"problem": "it is over"}),
        ("_exit(3);", {"problem": "it ended its process with exit code 3"}),
        ("for (;;) pause();", {"problem": "no answer in 1 seconds"}),
        ('printf("{no newline"); fflush(stdout);', {}),
    ],
)
def test_what_a_library_does_as_it_is_opened_does_not_reach_the_caller(
    constructor: str,
    answer: dict[str, str],
    compile_library: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = (
        "#include <signal.h>\n#include <stdio.h>\n#include <stdlib.h>\n#include <unistd.h>\n"
        f"__attribute__((constructor)) static void start(void) {{ {constructor} }}"
    )
    library = compile_library("libdeadly.so", source)
    if "pause" in constructor:
        monkeypatch.setattr(probes, "_SECONDS", 1)
    assert probes.ask(probes.open_libraries, [str(library)]) == answer


def test_which_libraries_the_loader_opens_and_why_not(tmp_path: Path) -> None:
    text = tmp_path / "libtext.so"
    text.write_text("text")
    found = probes.ask(probes.open_libraries, ["libc.so.6", "libdeploynorm_nowhere.so.1", str(text)])
    assert set(found) == {"libdeploynorm_nowhere.so.1", str(text)}
    assert "cannot open shared object file" in found["libdeploynorm_nowhere.so.1"]


def test_a_probe_that_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text('raise RuntimeError("half of it\\n is missing")')
    monkeypatch.syspath_prepend(tmp_path)
    assert probes.ask(probes.onnxruntime, None) == {"problem": "RuntimeError: half of it is missing"}


def test_a_python_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "no process can be started" in probes.ask(probes.devices)["problem"]


def test_onnxruntime_takes_our_library(require: Callable[[str], None]) -> None:
    require("ort")
    require("native")
    found = probes.ask(probes.onnxruntime, str(libraries.library_path()))
    assert found["takes_library"] is True
    assert "CPUExecutionProvider" in found["providers"]


@pytest.mark.parametrize("folder", [*(LEAN or [None]), "tensorrt_rtx"], ids=lambda each: getattr(each, "name", each))
def test_tensorrt_takes_our_plugin(
    folder: Path | str | None,
    require: Callable[[str], None],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if isinstance(folder, str):
        require("trt-rtx")
    else:
        require("trt-lean")
        monkeypatch.syspath_prepend(folder)
    library = request.getfixturevalue("cuda_libraries") / libraries.TENSORRT_LIBRARY
    module = folder if isinstance(folder, str) else "tensorrt_lean_bindings"
    without, found = probes.ask(probes.tensorrt, module, None), probes.ask(probes.tensorrt, module, str(library))
    assert "takes_plugin" not in without
    assert found["takes_plugin"] is True, found
    assert found["creators"] == without["creators"] + len(OPERATORS)


def test_tensorrt_refuses_what_is_no_plugin(
    require: Callable[[str], None], compile_library: Callable[..., Path]
) -> None:
    require("trt-rtx")
    other = compile_library("libother.so", "int nothing;")
    found = probes.ask(probes.tensorrt, "tensorrt_rtx", str(other))
    assert found["takes_plugin"] is False
    assert "does not load this plugin library" in found["plugin_problem"]
