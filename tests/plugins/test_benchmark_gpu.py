"""benchmarks/gpu.py, whose time on a GPU is short: all of it but the timing runs here, on the emulated kernels."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tolerances import OP_BFLOAT16, OP_FLOAT32

from deploynorm import libraries
from deploynorm.layers._composed import composed

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
def kernel(benchmark: ModuleType, emulated_library: Path) -> object:
    assert libraries.cuda_variants(emulated_library)
    return benchmark.Kernel(emulated_library)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_ways_compute_the_same(benchmark: ModuleType, kernel: object, dtype: str, layout: str) -> None:
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.randn(2, 16, 20, 20).to(benchmark.DTYPES[dtype]).contiguous(memory_format=form)
    parameters = benchmark.make_parameters(16, "cpu")
    ways = benchmark.make_ways(kernel, x, parameters, False)
    assert {"copy", "ours", "eager", "batch_norm, relu"} <= set(ways)
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


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_every_variant_is_timed_in_both_passes(
    benchmark: ModuleType, emulated_library: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = benchmark.gpu_variants

    def call_each(
        ways: dict[str, Callable[[Any], object]], sets: list[Any], moved: int, rounds: int
    ) -> dict[str, float]:
        assert moved == 3 * sets[0].x.nbytes
        for number, way in enumerate(ways.values()):
            way(sets[number % len(sets)])
        return dict.fromkeys(ways, 1.0)

    monkeypatch.setattr(variants, "measure", call_each)
    monkeypatch.setattr(variants, "sets_past_the_cache", lambda size: 2)
    monkeypatch.setattr(variants, "Tensors", partial(variants.Tensors, device="cpu"))
    found = set()
    for shape in ((2, 16, 4, 4), (2, 16, 20, 20)):
        times = variants.row(variants.Kernels(emulated_library), shape, layout, "float32", rounds=1)["microseconds"]
        assert {"copy", "ours"} < set(times["forward"])
        assert {"add", "ours"} < set(times["backward"])
        found |= {(which, name) for which, ways in times.items() for name in ways}
    expected = {"runs", "registers", "two_passes"} if layout == "nchw" else {"registers", "two_passes"}
    assert {(which, name) for which in ("forward", "backward") for name in expected} <= found


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_kernel_computes_what_three_do(
    benchmark: ModuleType, emulated_library: Path, layout: str, dtype: torch.dtype
) -> None:
    variants = benchmark.gpu_variants
    tensors = variants.Tensors((2, 16, 49), layout, dtype, device="cpu")
    end = benchmark.gpu_residual.End(variants.Kernels(emulated_library), tensors)
    x, residual = (each.transpose(1, 2) if layout == "nhwc" else each for each in (tensors.x, end.residual))
    gamma, beta, tau, eps = (each.double() for each in tensors.parameters)
    want = composed(x.double(), gamma, beta, None, eps) + residual.double()
    want = torch.maximum(want, tau.view(1, -1, 1))
    tolerance = OP_FLOAT32 if dtype == torch.float32 else OP_BFLOAT16
    for way in (end.one, end.three):
        tensors.out.fill_(float("nan"))
        y = way()
        got = (y.transpose(1, 2) if layout == "nhwc" else y).double()
        torch.testing.assert_close(got, want, **tolerance.kwargs())


def test_variants_are_given_what_the_kernel_takes(benchmark: ModuleType, emulated_library: Path) -> None:
    variants = benchmark.gpu_variants
    tensors = variants.Tensors((2, 16, 49), "nchw", torch.float32, device="cpu")
    kernels = variants.Kernels(emulated_library)
    assert kernels("forward", tensors) == 0
    want = composed(tensors.x, *tensors.parameters)
    torch.testing.assert_close(tensors.out, want, **OP_FLOAT32.kwargs())
    assert kernels("backward", tensors) == 0
    torch.testing.assert_close(
        tensors.gradients[1] + tensors.gradients[2], tensors.dy.sum((0, 2)), **OP_FLOAT32.kwargs()
    )
    assert kernels("forward", tensors, "no such variant") != 0


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_steps_of_training_compute_the_same(benchmark: ModuleType, dtype: str, layout: str) -> None:
    training = benchmark.gpu_training
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x, dy = (torch.randn(2, 16, 20, 20).to(training.DTYPES[dtype]).contiguous(memory_format=form) for _ in range(2))
    x.requires_grad_()
    steps = training.make_steps(x, False)
    assert set(steps) == {"ours", "composition", "batch_norm, relu", "relu"}
    for step in steps.values():
        y, dx, *_ = step((x, dy))
        assert y.shape == dx.shape == x.shape
    errors = training.check_steps(steps, (x, dy))
    assert set(errors) == {"ours", "composition"}
    assert max(errors.values()) > 0


def test_ours_keeps_half_of_what_batch_normalisation_keeps(benchmark: ModuleType) -> None:
    training = benchmark.gpu_training
    x = torch.randn(2, 16, 20, 20).requires_grad_()
    kept = {name: training.saved_bytes(step, x) for name, step in training.make_steps(x, False).items()}
    assert x.nbytes <= kept["ours"] < 1.02 * x.nbytes
    assert 2 * x.nbytes <= kept["batch_norm, relu"] < 2.02 * x.nbytes
    assert kept["composition"] > 2 * x.nbytes
    assert kept["relu"] == x.nbytes


def test_a_step_of_mabn_is_timed_beside_batch_norm(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    training = benchmark.gpu_training

    def call_each(steps: dict[str, Callable[[Any], object]], sets: list[Any], *_: object) -> dict[str, float]:
        return {name: float(len(step(sets[0]))) for name, step in steps.items()}  # type: ignore[arg-type]

    monkeypatch.setattr(training, "measure", call_each)
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    monkeypatch.setattr(training, "_sets", lambda *_: [(x, torch.ones_like(x))])
    row = training.mabn_row(tuple(x.shape), "nchw", "float32", rounds=1, compiled=False)
    assert row["microseconds"] == {"mabn": 4.0, "batch_norm": 4.0}  # y, dx, and the gradients of two parameters
    assert min(row["saved_bytes"].values()) >= x.nbytes
    assert "mabn     4.00 us = 1: batch_norm 1.00" in training.show(row)


@pytest.mark.parametrize("name", ["y", "dx", "dgamma", "dbeta", "dtau"])
def test_a_wrong_step_is_found(benchmark: ModuleType, name: str) -> None:
    training = benchmark.gpu_training
    x, dy = torch.randn(2, 2, 16, 20, 20).unbind()
    x.requires_grad_()
    steps = training.make_steps(x, False)

    def broken(given: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        results = list(steps["ours"](given))
        results[("y", "dx", "dgamma", "dbeta", "dtau").index(name)] *= 1.01
        return results

    with pytest.raises(SystemExit, match=r"broken is wrong for .* in training"):
        training.check_steps(steps | {"broken": broken}, (x, dy))


def test_without_a_gpu_it_says_so(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="no CUDA device"):
        benchmark.main()
