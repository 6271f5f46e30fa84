"""The TensorRT libraries as they are shipped: what they need of a machine, and in NVIDIA's own runtimes.

The lean runtime is all of TensorRT that PyPI has. It reads engines and builds none, so that here it loads the plugin,
finds it and makes it, which is where the binary interfaces of TensorRT 10 and 11 differ. Each try is a process of its
own: what goes wrong there ends the process. No Runtime is made, since without a GPU that alone ends it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from emulated import HOSTS, build_plugin
from tensorrt_host import Format, Host, Tensor, inputs_and_output

from deploynorm.contract import DOMAIN, OP_TYPE, OPERATORS, VERSION
from deploynorm.libraries import TENSORRT_LIBRARY

LEAN = [Path(folder) for folder in os.environ.get("TENSORRT_LEAN_DIRS", "").split(os.pathsep) if folder]

PROCESS = r"""
import ctypes, importlib, json, sys

import numpy as np

module, folder, *steps = sys.argv[1:]
trt = importlib.import_module(module)
registry = trt.get_plugin_registry()
found = {"version": trt.__version__}
for step in steps:
    if step == "load":
        found.setdefault("load", []).append(registry.load_library(folder + "/libdeploynorm_trt.so") is not None)
    elif step == "register":
        ctypes.CDLL(folder + "/libdeploynorm_trt_register.so")
    elif step == "list":
        all_of_ours = [c for c in registry.all_creators if c.plugin_namespace == "deploynorm"]
        found["creators"] = [[c.name, c.plugin_version, c.plugin_namespace] for c in all_of_ours]
    else:
        creator = registry.get_creator("FilterResponseNormalization", "1", "deploynorm")
        name, phase, value = json.loads(step)
        kind = type(value).__name__ + "32"
        field = trt.PluginField(name or "", np.array([value], kind), getattr(trt.PluginFieldType, kind.upper()))
        fields = [] if name is None else [field]
        plugin = creator.create_plugin("a_layer", trt.PluginFieldCollection(fields), getattr(trt.TensorRTPhase, phase))
        found.setdefault("plugins", []).append(None if plugin is None else type(plugin).__name__)
print(json.dumps(found))
"""


def create(name: str | None, phase: str, value: float = 0) -> str:
    """The step that makes a plugin, with one field or none. An int is an int32, a float a float32."""
    return json.dumps([name, phase, value])


Runtime = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(
    scope="module", params=[*(LEAN or [None]), "tensorrt_rtx"], ids=lambda each: getattr(each, "name", each)
)
def runtime(request: pytest.FixtureRequest, require: Callable[[str], None], cuda_libraries: Path) -> Runtime:
    """runtime("load", "list"): what came of these steps in a process of this runtime, and what it said."""
    environment = dict(os.environ)
    if isinstance(request.param, str):
        require("trt-rtx")
        module = request.param
    else:
        require("trt-lean")
        module = "tensorrt_lean_bindings"
        environment["PYTHONPATH"] = str(request.param)

    def run(*steps: str) -> tuple[dict[str, Any], str]:
        command = [sys.executable, "-c", PROCESS, module, str(cuda_libraries), *steps]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done
        return json.loads(done.stdout), done.stderr

    return run


def test_the_lean_runtimes_are_of_tensorrt_10_and_11(require: Callable[[str], None]) -> None:
    require("trt-lean")
    majors = {path.suffix for folder in LEAN for path in folder.glob("tensorrt_lean_libs/libnvinfer_lean.so.*")}
    assert majors == {".10", ".11"}


# ---- In a runtime

LOADED = {
    ("load",): [True],
    ("register",): None,
    ("register", "register"): None,
    ("load", "register"): [True],
    ("register", "load"): [False],  # TensorRT does not load what has registered, and says so
}
"""Steps -> what the loads return."""


@pytest.mark.parametrize("steps", LOADED, ids="+".join)
def test_it_is_found_and_made(steps: tuple[str, ...], runtime: Runtime) -> None:
    found, words = runtime(*steps, "list", create(None, "BUILD"), create("plan_version", "RUNTIME", 1))
    assert found.get("load") == LOADED[steps]
    assert sorted(found["creators"]) == [[op_type, str(VERSION), DOMAIN] for op_type in OPERATORS]
    assert found["plugins"] == ["IPluginV3", "IPluginV3"]
    assert words == "" or steps == ("register", "load")


REFUSED = {
    create("epsilon", "BUILD", 1e-6): "there is no attribute epsilon",
    create("epsilon", "BUILD", 1): "there is no attribute epsilon",
    create("plan_version", "RUNTIME", 2): "Got plan version 2; expected 1. Fix: build the engine again",
    create("plan_version", "RUNTIME", 1.0): "Got plan version 0; expected 1",
    create("epsilon", "RUNTIME", 1e-6): "Got plan version 0; expected 1",
    create(None, "RUNTIME"): "Got plan version 0; expected 1",
}
"""Step -> a part of the reason that is printed for it."""


def test_what_it_refuses_is_none_with_a_reason(runtime: Runtime) -> None:
    found, words = runtime("load", *REFUSED)
    assert found["plugins"] == [None] * len(REFUSED)
    reasons = [line for line in words.splitlines() if line.startswith(f"{DOMAIN}::{OP_TYPE}: ")]
    for step, reason in zip(REFUSED, reasons, strict=True):
        assert REFUSED[step] in reason, step


# ---- In no runtime


def test_without_a_device_a_run_ends_with_cuda_s_words_and_not_with_the_process(
    cuda_libraries: Path, emulated_library: Path, build_once: Callable[..., Path]
) -> None:
    host = build_once("plugin", lambda folder: build_plugin(folder, emulated_library)) / HOSTS[0]
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), str(host), str(cuda_libraries / TENSORRT_LIBRARY)],
        capture_output=True,
        text=True,
        env=dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(Path(__file__).parents[1])),
    )
    assert (done.returncode, done.stdout) == (0, "-1\n"), done
    assert re.fullmatch(rf"{DOMAIN}::{OP_TYPE}: CUDA: [^\n]+ \(\d+\)\n", done.stderr)


if __name__ == "__main__":  # the process of the test without a device
    made = Host(Path(sys.argv[1]), Path(sys.argv[2])).create()
    assert made is not None
    print(made.enqueue(inputs_and_output(Tensor((1, 2, 4, 4), "float32", Format.LINEAR)), [0] * 5, 0, 0))
