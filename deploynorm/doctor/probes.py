"""What can only be found out by trying, each in a process of its own: what goes wrong there may end the process.

A broken driver, an onnxruntime over another NumPy and TensorRT all can. A probe is a function of this module that
takes text and returns what json can hold; `ask` runs one elsewhere.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from deploynorm import ort, trt
from deploynorm.contract import DOMAIN, OPERATORS
from deploynorm.errors import BackendError, DeployNormError
from deploynorm.trt.soname import loaded_library

_SECONDS: Final = 60
_RTX: Final = "libtensorrt_rtx.so"

_PROGRAM: Final = (
    "import json, sys\n"
    "sys.path[:] = json.loads(sys.argv[1])\n"
    "from deploynorm.doctor import probes\n"
    "probes.answer(sys.argv[2], json.loads(sys.argv[3]))\n"
)
_MARK: Final = "deploynorm doctor: "


def ask(probe: Callable[..., dict[str, Any]], *arguments: str | Sequence[str] | None) -> dict[str, Any]:
    """What the probe returns in a new process; {"problem": ...} where it raises, dies or does not end."""
    command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), probe.__name__, json.dumps(arguments)]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer in {_SECONDS} seconds"}
    except OSError as error:
        return {"problem": f"no process can be started: {error}"}
    answers = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if answers:
        return dict(json.loads(answers[-1]))
    last_words = "".join(line.strip() for line in done.stderr.strip().splitlines()[-1:])
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {"problem": f"it ended its process with {name}" + (f": {last_words}" if last_words else "")}
    return {"problem": last_words or f"it ended its process with exit code {done.returncode}"}


def answer(probe: str, arguments: Sequence[Any]) -> None:
    """The other side of `ask`."""
    try:
        found = globals()[probe](*arguments)
    except DeployNormError as error:
        found = {"problem": _reason(error)}
    except Exception as error:  # whatever a broken installation raises is what is asked for
        found = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    # On a line of its own: others may have written to this stream, past Python's buffer.
    sys.stdout.write(f"\n{_MARK}{json.dumps(found)}\n")
    sys.stdout.flush()
    os._exit(0)  # without the destructors of the libraries: without a GPU, one of TensorRT's ends the process


def onnxruntime(library: str | None) -> dict[str, Any]:
    """Its version and providers, and whether it takes our operator library, which is this one."""
    module = ort.import_onnxruntime()
    providers = list(module.get_available_providers())
    found: dict[str, Any] = {"version": str(module.__version__), "providers": providers}
    options = ort.quiet_options()
    if library is not None:
        try:
            ort.register(options)
            found["takes_library"] = True
        except BackendError as error:
            found |= {"takes_library": False, "library_problem": _reason(error)}
    return found


def tensorrt(module: str, library: str | None) -> dict[str, Any]:
    """Its version, and whether our plugin is in its registry once its library is loaded."""
    here = trt.import_tensorrt(next(name for name, package in trt.FLAVOURS.items() if module in package.modules))
    found: dict[str, Any] = {"version": here.version, "nameless": _nameless() if here.rtx else None}
    if library is not None:
        try:
            trt.load_library(here, Path(library))
            found["takes_plugin"] = trt.has_plugin(here)
            if not found["takes_plugin"]:
                found["plugin_problem"] = f"it does not bring {DOMAIN}::{' and '.join(OPERATORS)}"
        except BackendError as error:
            found |= {"takes_plugin": False, "plugin_problem": _reason(error)}
    found["creators"] = len(here.module.get_plugin_registry().all_creators)
    return found


def _nameless() -> str | None:
    """See deploynorm.trt.soname."""
    try:
        ctypes.CDLL(_RTX)
    except OSError:
        return loaded_library(_RTX)
    return None


def _reason(error: DeployNormError) -> str:
    """Without the place, which is this process, and the remedy, which depends on more than it knew."""
    return f"{error.problem}{f' ({error.got})' if error.got else ''}".rstrip(": ")


def torchvision() -> dict[str, Any]:
    """Nothing where torchvision can be imported."""
    importlib.import_module("torchvision")
    return {}


def open_libraries(names: Sequence[str]) -> dict[str, Any]:
    """Why the system's loader does not open each of these; those that it opens are left out."""
    failed = {}
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError as error:
            failed[name] = str(error)
    return failed


def devices() -> dict[str, Any]:
    """NVIDIA's driver and the GPUs that CUDA offers, from the driver's own libraries. Source: cuda.h and nvml.h."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    known = [version.value // 1000, version.value % 1000 // 10]
    found: dict[str, Any] = {"version": _driver_version(), "cuda": known, "gpus": []}
    count = ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(status, ctypes.byref(name))
        return found | {"problem": name.value.decode() if name.value else f"CUDA error {status}"}
    found["gpus"] = [_gpu(cuda, index) for index in range(count.value)]
    return found


def _gpu(cuda: ctypes.CDLL, index: int) -> list[Any]:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return [name.value.decode(errors="replace"), capability, memory.value]


def _driver_version() -> str | None:
    """Of the driver itself, from NVML; some systems, such as Jetson, do not have it."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    version = ctypes.create_string_buffer(80)
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlSystemGetDriverVersion(version, len(version)) != 0:
        return None
    return version.value.decode(errors="replace")
