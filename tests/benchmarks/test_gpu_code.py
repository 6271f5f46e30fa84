"""What nvcc makes of the CUDA kernels: registers and spills, which a GPU is not needed to see."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deploynorm import libraries

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_kernels_spill_nothing_and_as_many_blocks_have_room_as_the_results_say(
    require: Callable[[str], None], tmp_path: Path
) -> None:
    require("nvcc")
    spec = importlib.util.spec_from_file_location("gpu_code", FOLDER / "gpu_code.py")
    assert spec is not None
    assert spec.loader is not None
    gpu_code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_code)
    compiled = gpu_code.compile_kernels(libraries.source_folder() / "kernels", tmp_path)
    assert [name for name, kernel in compiled.resources.items() if kernel.spilled] == []
    results = json.loads((FOLDER / "results" / "gpu_code.json").read_text())
    found = list(gpu_code.rows(compiled))
    assert len(found) == len(results["rows"])
    for row, recorded in zip(found, results["rows"], strict=True):
        case = {key: row[key] for key in ("pass", "shape", "layout", "dtype", "kernel", "threads", "moved")}
        assert case == {key: recorded[key] for key in case}
        assert row["blocks"] >= recorded["blocks"], case
        if results["compiler"] == libraries.find_cuda().version:
            assert row["registers"] <= recorded["registers"], case
