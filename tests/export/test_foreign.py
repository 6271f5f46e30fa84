"""FRN and MABN layers of other projects are named, with the line of what to do; what only looks like them is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from deploynorm import export, fold
from deploynorm._export.translation import to_onnx
from deploynorm._inspect import inspect
from deploynorm.contract import DOMAIN, OP_TYPE
from deploynorm.errors import ModelError
from deploynorm.foreign import loose_frn, loose_mabn
from deploynorm.layers import FRN2d, MABN2d
from deploynorm.layers.functional import filter_response_norm
from deploynorm.rewrite import rewrite
from deploynorm.run.reference import ReferenceRunner
from deploynorm.trace import trace

Map = Callable[["Layer", Tensor], Tensor]


class Layer(nn.Module):
    """A map of 8 channels with parameters for it, behind a convolution: so the layer is no FRN alone."""

    def __init__(self, compute: Map) -> None:
        super().__init__()
        self.compute = compute
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.gamma, self.beta, self.tau = (nn.Parameter(torch.rand(1, 8, 1, 1)) for _ in range(3))
        self.eps = nn.Parameter(torch.full((1, 8, 1, 1), 1e-6))
        self.register_buffer("second", torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("mean", torch.rand(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, self.conv(x))


def tlu(layer: Layer, x: Tensor) -> Tensor:
    return torch.max(layer.gamma * x + layer.beta, layer.tau)


def by_view(layer: Layer, x: Tensor) -> Tensor:
    mean = (x * x).view(x.shape[0], x.shape[1], -1).mean(2)[:, :, None, None]
    return tlu(layer, x / (mean + layer.eps.abs()).sqrt())


def squared_in_a_view(layer: Layer, x: Tensor) -> Tensor:
    mean = x.view(x.shape[0], x.shape[1], -1).pow(2).mean(-1).view(x.shape[0], x.shape[1], 1, 1)
    return tlu(layer, x / (mean + layer.eps.abs()) ** 0.5)


def channels_last(layer: Layer, x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    return (x * torch.rsqrt(x.square().mean((1, 2), keepdim=True) + 1e-6)).permute(0, 3, 1, 2)


FRN: Mapping[str, Map] = {
    "rsqrt": lambda self, x: tlu(self, x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + self.eps.abs())),
    "bare": lambda _, x: x / (x.square().mean([2, 3], keepdim=True) + 1e-6).sqrt(),
    "a power": lambda self, x: tlu(self, x * (x.pow(2).mean(dim=(-2, -1), keepdim=True) + 1e-6) ** -0.5),
    "a view": by_view,
    "a pool": lambda self, x: tlu(self, x * torch.rsqrt(nn.functional.adaptive_avg_pool2d(x * x, 1) + 1e-6)),
    "a sum": lambda _, x: x * torch.rsqrt((x * x).sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3]) + 1e-6),
    "an L2 norm": lambda _, x: x / (torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True) / 8 + 1e-6),
    "one axis after the other": lambda _, x: x * torch.rsqrt(x.pow(2).mean(3, True).mean(2, True) + 1e-6),
    "gamma first": lambda self, x: self.gamma * x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-6) + self.beta,
    "channels last": channels_last,
    "in float32": lambda _, x: (x.double() / (x.double().pow(2).mean((2, 3), True) + 1e-6).sqrt()).float(),
    "clamped": lambda _, x: x / x.pow(2).mean((2, 3), True).clamp_min(1e-6).sqrt(),
    "squared in a view": squared_in_a_view,
    "an absolute value": lambda _, x: x * torch.rsqrt((x.abs() ** 2).mean((2, 3), True) + 1e-6),
    "rms_norm": lambda _, x: nn.functional.rms_norm(x, (8, 8)),
}


def global_response(layer: Layer, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    return layer.gamma * (x * (norm / (norm.mean(1, keepdim=True) + 1e-6))) + layer.beta + x


def instance(layer: Layer, x: Tensor) -> Tensor:
    x = x - x.mean((2, 3), keepdim=True)
    return tlu(layer, x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-6))


OTHERS: Mapping[str, Map] = {
    "our own": lambda self, x: filter_response_norm(x, *(p.flatten() for p in (self.gamma, self.beta)), None, 1e-6),
    "a global response normalization": global_response,
    "an instance normalization": instance,
    "of channels": lambda _, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "of channels too": lambda _, x: x * torch.rsqrt(x.pow(2).mean((1, 2, 3), keepdim=True) + 1e-6),
    "of rows": lambda _, x: x * torch.rsqrt(x.pow(2).mean(3, keepdim=True) + 1e-6),
    "of tokens by hand": lambda _, x: (
        (t := x.flatten(2).transpose(1, 2)) * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6)
    ),
    "of tokens": lambda _, x: nn.functional.rms_norm(x.flatten(2).transpose(1, 2), (8,)),
    "a unit vector": lambda _, x: nn.functional.normalize(x.flatten(2), dim=2).view_as(x),
    "the square is another's": lambda self, x: x * torch.rsqrt((x + self.tau).pow(2).mean((2, 3), True) + 1e-6),
    "multiplied": lambda _, x: x * (x.pow(2).mean((2, 3), keepdim=True) + 1e-6).sqrt(),
    "the variance itself": lambda _, x: x / (x.pow(2).mean((2, 3), keepdim=True) + 1e-6),
    "a gate": lambda _, x: x * torch.sigmoid(x.pow(2).mean((2, 3), keepdim=True)),
}

MABN: Mapping[str, Map] = {
    "a root": lambda self, x: self.gamma * (x / (self.second + 1e-5).sqrt()) + self.beta,
    "its rsqrt": lambda self, x: x * torch.rsqrt(self.second + 1e-5) * self.gamma + self.beta,
    "a scale": lambda self, x: x * (self.gamma * (self.second + 1e-5) ** -0.5) + self.beta,
}

AFFINE: Mapping[str, Map] = {
    "a frozen batch normalization": lambda self, x: (x - self.mean) / (self.second + 1e-5).sqrt() * self.gamma,
    "its scale and shift": lambda self, x: (
        x * (self.gamma * torch.rsqrt(self.second + 1e-5)) - self.mean * self.gamma * torch.rsqrt(self.second + 1e-5)
    ),
    "a constant": lambda self, x: x * self.second.sqrt() + self.beta,
    "a parameter": lambda self, x: x * torch.rsqrt(self.eps + 1e-5),
}


class Network(nn.Module):
    """Each of the maps, each with a convolution: the exporter would share what two layers compute alike."""

    def __init__(self, forms: Mapping[str, Map]) -> None:
        super().__init__()
        self.forms = nn.ModuleDict({name: Layer(compute) for name, compute in forms.items()})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [form(x) for form in self.forms.values()]


EXAMPLE = torch.randn(2, 3, 8, 8)


def notes(net: nn.Module, **options: Any) -> list[str]:
    exported = export(net.eval(), EXAMPLE, **({"dynamic": "none"} | options))
    return [note for note in exported.notes if "deploynorm.layers" in note]


def found(layers: list[Layer]) -> list[str]:
    return [name.removeprefix("forms.") for name, _ in layers]


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "dynamic"), [(18, "none"), (20, "all"), (23, "none")])
def test_every_form_of_frn_is_found_and_nothing_that_looks_like_it(opset: int, dynamic: Any) -> None:
    forms = FRN | OTHERS | MABN | AFFINE
    if dynamic == "all":
        forms = {name: form for name, form in forms.items() if name != "rms_norm"}
    net = Network(forms).eval()
    graph = to_onnx(trace(net, EXAMPLE, dynamic), opset)[0].graph
    assert sorted(set(found(loose_frn(graph)))) == sorted(set(FRN) & set(forms))


@pytest.mark.parametrize("others", [pytest.param(FRN | OTHERS | AFFINE, marks=pytest.mark.slow, id="all"), {}])
def test_every_form_of_mabn_is_found_and_nothing_that_looks_like_it(others: dict[str, Any]) -> None:
    net = Network(others | MABN).eval()
    assert found(loose_mabn(trace(net, EXAMPLE, "none"))) == list(MABN)
    folded, report = fold(net, EXAMPLE)
    assert [(change.name, change.outcome) for change in report.changes] == [
        (f"forms.{form}", "not foldable") for form in MABN
    ]
    assert "replace it by deploynorm.layers.MABN2d" in report.tables()
    assert fold(folded, EXAMPLE)[1].changes == report.changes


def test_the_export_says_what_to_do() -> None:
    outside: Map = lambda _, x: x / (x.pow(2).mean((2, 3), True).sqrt() + 1e-6)  # noqa: E731
    fused = {"a": FRN["rsqrt"], "b": MABN["a root"], "c": FRN["bare"]}
    left = {"d": FRN["an L2 norm"], "e": FRN["clamped"], "f": outside, "g": outside}
    net = Network(fused | left).eval()
    exported = export(net, EXAMPLE, dynamic="none")
    assert exported.node_counts()[f"{DOMAIN}::{OP_TYPE}"] == 2
    with ReferenceRunner(exported.to_proto()) as runner, torch.no_grad():
        for got, want in zip(runner.infer({"x": EXAMPLE.numpy()}).values(), net(EXAMPLE), strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)
    assert list(exported.notes) == [
        "fused in the graph: 2 FRN in loose operators",
        "filter response normalization (FRN) in loose operators, which is slow: forms.d (Layer), forms.e (Layer), "
        "forms.f (Layer) and 1 more; before the export replace it by deploynorm.layers.FRN2d, with its parameters, "
        "where it computes that",
        "a running second moment (MABN) that does not fold: forms.b (Layer); before the export replace it by "
        "deploynorm.layers.MABN2d, with its parameters, where it computes that",
    ]


def test_our_own_layers_are_not_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), FRN2d(8, learned_eps="layer"), MABN2d(8), nn.PReLU()).eval()
    for lowering in ("custom", "primitives", "rmsnorm"):
        assert notes(net, lowering=lowering) == []


FILE = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 8, H, W] x) => (float[N, 8, H, W] y) <float two = {2}, float eps = {1e-6}> {
    square = Pow (x, two)
    mean = ReduceMean <axes = [2, 3]> (square)
    shifted = Add (mean, eps)
    root = Sqrt (shifted)
    y = Div (x, root)
}
"""


def test_the_file_of_another_tool_is_told_about_where_it_is_inspected_and_rewritten(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(FILE)
    model.graph.node[1].name = "mean_of_squares"
    onnx.save(model, tmp_path / "net.onnx")
    (note,) = inspect(tmp_path / "net.onnx").facts["notes"]
    assert "loose operators, which is slow: node mean_of_squares; before the export replace it" in note
    told = pytest.warns(RuntimeWarning, match="node mean_of_squares; before the export replace it by deploynorm")
    with told, pytest.raises(ModelError, match="has no node deploynorm"):
        rewrite(tmp_path / "net.onnx", input_shapes={"x": (1, 8, 4, 4)})
    model.producer_name = "deploynorm"  # whose export said so
    onnx.save(model, tmp_path / "net.onnx")
    assert inspect(tmp_path / "net.onnx").facts["notes"] == []


@pytest.mark.parametrize(
    "damage",
    ["Pow (x)", "Pow (x, x)", "Mul (x)", "Mul (x, none)", "ReduceMean (x)", "Cast <to = 1> (x)"],
)
def test_a_file_that_makes_no_sense_is_inspected_all_the_same(damage: str, tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(FILE.replace("Pow (x, two)", damage)), tmp_path / "net.onnx")
    assert inspect(tmp_path / "net.onnx").facts["notes"] == []
