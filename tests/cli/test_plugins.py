"""deploynorm plugins build | path | info."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deploynorm import libraries


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_path_prints_the_path_alone(deploynorm: Callable, require: Callable) -> None:
    require("native")
    assert deploynorm("plugins", "path").out == f"{libraries.library_path()}\n"


@pytest.mark.usefixtures("without_library")
def test_build_makes_what_path_prints(deploynorm: Callable, require: Callable) -> None:
    require("compiler")
    assert deploynorm("plugins", "path").code == 3
    built = deploynorm("plugins", "build", "--json", "build.json")
    assert built.code == 0, built.err
    library = Path(json.loads(Path("build.json").read_text())["library"])
    assert library.is_file()
    assert deploynorm("plugins", "path").out == f"{library}\n"


def test_info_tells_library_processor_compiler_and_runtime(deploynorm: Callable, require: Callable) -> None:
    require("native")
    require("ort")
    shown = deploynorm("plugins", "info", "--json", "info.json")
    assert shown.code == 0, shown.err
    facts = json.loads(Path("info.json").read_text())
    assert facts["library"] == str(libraries.library_path())
    assert "baseline" in facts["processor runs"]
    assert facts["onnxruntime"].endswith("takes the library")
    assert set(facts) == {
        "library",
        "processor runs",
        "CUDA kernels",
        "for training",
        "TensorRT plugin",
        "compiler",
        "cmake",
        "CUDA compiler",
        "onnxruntime",
    }


@pytest.mark.usefixtures("without_library")
def test_info_without_a_library_says_how_to_get_one(deploynorm: Callable) -> None:
    shown = deploynorm("plugins", "info")
    assert shown.code == 0, shown.err
    assert "deploynorm plugins build" in shown.out
