"""Whole networks in half precision, every tensor rounded as on a GPU, against the network in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from deploynorm import checkpoint
from deploynorm._check import Report, check
from deploynorm._export import export
from deploynorm._export.precision import to_precision
from deploynorm._fold import fold
from deploynorm.inputs import TensorSpec
from deploynorm.layers import FRN2d
from deploynorm.quiet import quiet
from deploynorm.run.eager import EagerRunner
from deploynorm.run.half import HalfRunner

MODELS = Path(__file__).parents[2] / "models"
SHIPPED = sorted(MODELS.glob("*.pt"))
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _needs_onnxruntime(require: Callable[[str], None]) -> None:
    require("ort")


def _samples(dtype: str, *shapes: tuple[int, ...]) -> Iterator[tuple[str, dict[str, np.ndarray[Any, Any]]]]:
    for seed, shape in enumerate(shapes):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
        yield str(seed), {"x": x.astype(getattr(ml_dtypes, dtype, dtype))}


def _parity(model: onnx.ModelProto, network: nn.Module, dtype: str, *shapes: tuple[int, ...]) -> Report:
    """The graph against the network in float64."""
    spec = TensorSpec("x", ("?", "?", "?", "?"), dtype)
    with HalfRunner(model) as candidate, EagerRunner(network, [spec], ["output"], dtype=torch.float64) as truth:
        candidate.precision = dtype
        return check(candidate, truth, _samples(dtype, *shapes))


def _exported(network: nn.Module, dtype: str, x: Tensor) -> onnx.ModelProto:
    return export(fold(network, (x,)).model, (x,), dtype=HALF[dtype], input_names=["x"]).to_proto()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_networks_stay_well_within_tolerance(path: Path, dtype: str) -> None:
    network = checkpoint.load(path).model
    model = _exported(network, dtype, torch.randn(2, 1, 28, 28))
    report = _parity(model, network, dtype, (2, 1, 28, 28), (3, 1, 33, 47))
    report.raise_if_broken()
    assert report.worst.severity < 0.2


def _no_threshold(layer: nn.Module) -> None:
    layer.tau.fill_(-1e4)


FAULTS: dict[str, tuple[str, type[nn.Module], Callable[[nn.Module], object], str]] = {
    "FRN without its threshold": ("frn", FRN2d, _no_threshold, "float16"),
    "FRN without its threshold, bfloat16": ("frn", FRN2d, _no_threshold, "bfloat16"),
    "FRN without beta": ("frn", FRN2d, lambda layer: layer.bias.zero_(), "float16"),
    "folded MABN without its shift": ("mabn", nn.Conv2d, lambda layer: layer.bias.zero_(), "float16"),
    "folded MABN, scale 1.1 times as large": ("mabn", nn.Conv2d, lambda layer: layer.weight.mul_(1.1), "float16"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("shipped", "kind", "fault", "dtype"), FAULTS.values(), ids=FAULTS)
def test_one_wrong_layer_of_a_shipped_network_is_rejected_wherever_it_is(
    shipped: str, kind: type[nn.Module], fault: Callable[[nn.Module], object], dtype: str
) -> None:
    """In PyTorch's half arithmetic, which also rounds every tensor: 21 exports would take minutes."""
    network = checkpoint.load(MODELS / f"{shipped}_resnet20_fashion.pt").model
    folded = fold(network, (torch.randn(2, 1, 28, 28),)).model
    spec = TensorSpec("x", ("?", "?", "?", "?"), dtype)
    samples = list(_samples(dtype, (3, 1, 28, 28)))
    layers = [name for name, module in folded.named_modules() if isinstance(module, kind)]
    if fault is _no_threshold:
        layers = [name for name in layers if folded.get_submodule(name).tau is not None]
    assert len(layers) >= 10
    with EagerRunner(network, [spec], dtype=torch.float64) as truth:
        for name in (None, *layers):
            wrong = copy.deepcopy(folded)
            if name is not None:
                fault(wrong.get_submodule(name))
            with EagerRunner(to_precision(wrong, HALF[dtype]), [spec]) as candidate:
                assert bool(check(candidate, truth, samples)) == (name is None), name


def test_activations_of_ten_thousand_hold_where_a_naive_float16_export_loses_them(timm: ModuleType) -> None:
    """timm's layer squares in half precision, and so does every exporter's graph of it: past 255 that is infinite.

    The mean is then infinite and its inverse root zero, so that the layer gives beta, and nothing is NaN.
    """
    layer = timm.layers.filter_response_norm.FilterResponseNormTlu2d
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 8, 3, bias=False)
    network = nn.Sequential(convolutions[0], layer(16), convolutions[1], layer(8)).eval().requires_grad_(False)
    network[0].weight.normal_(0, 500)
    network[2].weight.normal_(0, 200)
    x = torch.randn(2, 3, 17, 19)
    with torch.no_grad():
        assert 9e3 < float(network[0](x).abs().max()) < 6e4

    ours = export(network, (x,), dtype=torch.float16, input_names=["x"]).to_proto()
    report = _parity(ours, network, "float16", (2, 3, 17, 19))
    report.raise_if_broken()

    half = copy.deepcopy(network).half()
    with quiet():
        program = torch.onnx.export(
            half, (x.half(),), input_names=["x"], output_names=["output"], dynamo=True, verbose=False
        )
    naive = program.model_proto
    (comparison,) = _parity(naive, network, "float16", (2, 3, 17, 19)).comparisons
    assert not comparison.ok
    assert comparison.max_rel > 0.5
    assert "off by" in comparison.reason, "the numbers are wrong and finite: no warning"

    (_, feeds), *_ = _samples("float16", (2, 3, 17, 19))
    x16 = torch.from_numpy(feeds["x"])
    want = copy.deepcopy(network).double()(x16.double())
    for lost in (half(x16), torch.from_numpy(next(iter(_run(naive, feeds).values())))):
        assert (lost[want > 0.1] == 0).all(), "every positive output is zero"
    kept = torch.from_numpy(_run(ours, feeds)["output"])
    assert (kept[want > 0.1] > 0).all()

    constant = layer(4).half().eval()(torch.full((1, 4, 5, 5), 300, dtype=torch.float16))
    assert not constant.any(), "timm's layer alone: 0 instead of 1"


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    with HalfRunner(model) as runner:
        return runner.infer(feeds)
