from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from graphs import one_node

from deploynorm import run
from deploynorm.errors import InputError


@pytest.mark.parametrize("backend", ["onnxruntime", "half", "reference"])
def test_a_file_opens_in_every_backend(
    backend: Literal["onnxruntime", "half", "reference"], tmp_path: Path, require: Callable[[str], None]
) -> None:
    if backend != "reference":
        require("ort")
        assert run.available()[backend] is None
    path = tmp_path / "model.onnx"
    onnx.save(one_node("Neg", {"x": ("float32", ("N",))}, ("float32", ("N",))), path)
    with run.open_runner(path, backend) as runner:
        assert runner.name.startswith(backend)
        assert runner.infer({"x": np.array([1, -2], np.float32)})["y"].tolist() == [-1, 2]


def test_importing_the_package_imports_no_backend() -> None:
    code = "import sys, deploynorm.run; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "deploynorm.run.base" in loaded
    assert not {"torch", "onnx", "onnxruntime"} & set(loaded)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=re.escape("Got 'openvino'; expected 'onnxruntime', 'half'")):
        run.open_runner("model.onnx", "openvino")


@pytest.mark.parametrize("option", [{"providers": ("cuda",)}, {"plugins": ("lib.so",)}, {"threads": 1}], ids=str)
def test_the_reference_backend_refuses_options_that_it_would_ignore(option: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"the reference backend takes no (providers|plugins|threads)"):
        run.open_runner("model.onnx", "reference", **option)


def test_a_backend_that_is_missing_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    available = run.available()
    assert available["eager"] is None
    assert available["reference"] is None
    for backend in ("onnxruntime", "half"):
        assert "pip install 'deploynorm[cpu]'" in str(available[backend])
