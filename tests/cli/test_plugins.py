"""deploynorm plugins build | path | info."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from unoptimized import unoptimized

from deploynorm import libraries


@pytest.mark.usefixtures("native")
def test_path_prints_the_path_alone(deploynorm: Callable) -> None:
    assert deploynorm("plugins", "path").out == f"{libraries.library_path()}\n"


@pytest.mark.usefixtures("without_library")
def test_build_makes_what_path_prints(
    deploynorm: Callable, require: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require("compiler")
    monkeypatch.setenv("CXX", unoptimized(tmp_path))
    deploynorm("plugins", "path", code=3)
    deploynorm("plugins", "build", "--json", "build.json")
    library = Path(json.loads(Path("build.json").read_text())["library"])
    assert library.is_file()
    assert deploynorm("plugins", "path").out == f"{library}\n"


@pytest.mark.usefixtures("native", "ort")
def test_info_tells_library_processor_compiler_and_runtime(deploynorm: Callable) -> None:
    deploynorm("plugins", "info", "--json", "info.json")
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
    assert "deploynorm plugins build" in deploynorm("plugins", "info").out
