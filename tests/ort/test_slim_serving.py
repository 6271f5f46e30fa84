"""A serving environment with onnxruntime, numpy and rich, and none of the packages that exporting needs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graphs import CHANNELS, OPSET, frn_model

from deploynorm.lowering import function_proto

ABSENT = ("torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "google.protobuf", "google")


def _run(program: str, *arguments: object, absent: tuple[str, ...] = ABSENT) -> subprocess.CompletedProcess[str]:
    hide = f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", hide + program, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(frn_model(body=function_proto(OPSET)).SerializeToString())
    return path


def test_a_session_needs_onnxruntime_and_numpy_only(model: Path, require: Callable[[str], None]) -> None:
    require("ort")
    done = _run(
        "import numpy, deploynorm.ort\n"
        "session = deploynorm.ort.session(sys.argv[1], plugins=[])\n"
        f"x = numpy.ones((1, {CHANNELS}, 2, 2), numpy.float32)\n"
        "print(session.run(None, {'X': x})[0].shape)\n",
        model,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"(1, {CHANNELS}, 2, 2)\n"


@pytest.mark.parametrize("name", ["load", "export", "convert", "build"])
def test_a_function_that_needs_more_names_the_package(name: str) -> None:
    done = _run(f"import deploynorm\ntry: deploynorm.{name}\nexcept deploynorm.BackendError as error: print(error)\n")
    assert done.returncode == 0, done.stderr
    assert "this package is needed here, and is not installed. Fix: pip install " in done.stdout


@pytest.mark.parametrize("verb", ["run", "check", "inspect", "build", "rewrite"])
def test_a_verb_that_needs_more_names_the_package(verb: str, model: Path) -> None:
    np.save(model.with_suffix(".npy"), np.ones((1, CHANNELS, 2, 2), np.float32))
    arguments = {"run": [model.with_suffix(".npy")], "check": [model], "rewrite": ["--optimize-for-cpu"]}.get(verb, [])
    done = _run("from deploynorm.cli import main; sys.exit(main())", verb, model, *arguments)
    assert done.returncode == 3, done.stderr
    assert "this package is needed here, and is not installed. Fix: pip install " in done.stderr
    assert "fault of deploynorm" not in done.stderr


@pytest.mark.parametrize("verb", ["run", "inspect"])
def test_a_file_runs_and_is_shown_without_torch(verb: str, model: Path, require: Callable[[str], None]) -> None:
    require("ort")
    np.save(model.with_suffix(".npy"), np.ones((1, CHANNELS, 2, 2), np.float32))
    arguments = [model.with_suffix(".npy")] if verb == "run" else []
    done = _run("from deploynorm.cli import main; sys.exit(main())", verb, model, *arguments, absent=("torch",))
    assert done.returncode == 0, done.stderr
