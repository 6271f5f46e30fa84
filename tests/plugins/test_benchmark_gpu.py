"""benchmarks/gpu.py, whose time on a GPU is short: all of it but the timing runs here, on the emulated kernels."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulated import build_kernels

from deploynorm import plugins

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_gpu", FOLDER / "gpu.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def kernel(benchmark: ModuleType, require: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> object:
    require("compiler")
    library = build_kernels(tmp_path_factory.mktemp("emulated"))
    assert plugins.cuda_variants(library)
    return benchmark.Kernel(library)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_ways_compute_the_same(benchmark: ModuleType, kernel: object, dtype: str, layout: str) -> None:
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.randn(2, 16, 20, 20).to(benchmark.DTYPES[dtype]).contiguous(memory_format=form)
    parameters = benchmark.make_parameters(16, "cpu")
    ways = benchmark.make_ways(kernel, x, parameters, True, False)
    assert {"copy", "ours", "eager", "batch_norm, relu", "ours, registers", "ours, two_passes"} <= set(ways)
    for way in ways.values():
        way(x, torch.empty_like(x))
    errors = benchmark.check_ways(ways, x, parameters)
    assert max(errors.values()) > 0


def test_a_wrong_way_is_found(benchmark: ModuleType) -> None:
    x, parameters = torch.randn(2, 16, 8, 8), benchmark.make_parameters(16, "cpu")
    with pytest.raises(SystemExit, match="broken is wrong"):
        benchmark.check_ways({"broken": lambda x, y: y.copy_(x)}, x, parameters)
    with pytest.raises(SystemExit, match="lazy is wrong"):
        benchmark.check_ways({"lazy": lambda x, y: None}, x, parameters)


def test_without_a_gpu_it_says_so(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="no CUDA device"):
        benchmark.main()
