"""Our layers in networks that other exporters take: the numbers of float64, at other sizes than those of the trace."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from tolerances import OP_FLOAT32
from torch import Tensor, nn

import deploynorm
from deploynorm.contract import ADD_OP_TYPE, DOMAIN, NODE_ATTRIBUTES, OP_TYPE
from deploynorm.layers import (
    TLU,
    CenConv1d,
    CenConv2d,
    CenConv3d,
    CenConvTranspose2d,
    FRN1d,
    FRN2d,
    FRN3d,
    MABN1d,
    MABN2d,
    MABN3d,
)
from deploynorm.rewrite.fuse import fuse
from deploynorm.run.onnxruntime import OnnxRuntimeRunner
from deploynorm.run.reference import ReferenceRunner

pytestmark = pytest.mark.filterwarnings("ignore:FRN1d:UserWarning")  # of single values with a fixed epsilon

C = 3

Arrays: TypeAlias = list[npt.NDArray[Any]]


class WithResidual(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, residual=1 - x)


class SideBySide(nn.Module):
    """All layers on one input, so that a route is gone once for them; each has factors of its own, or else they would
    share a mean, which runtimes then do not fuse with what follows."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names, self.layers = tuple(layers), nn.ModuleList(layers.values())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x * (1 + 0.1 * position)) for position, layer in enumerate(self.layers))


def frn(layer: Callable[..., nn.Module]) -> dict[str, nn.Module]:
    layers = {
        "fixed eps": layer(C, eps=0.1),
        "fixed eps by channel": layer(C, eps=torch.linspace(0.1, 2, C)),
        "learned eps": layer(C, learned_eps="layer"),
        "learned eps by channel": layer(C, learned_eps="channel"),
        "no threshold": layer(C, learned_eps="channel", tlu=False),
    }
    added = {f"{name}, residual": WithResidual(copy.deepcopy(layers[name])) for name in ("fixed eps", "no threshold")}
    return {**layers, **added}


NETWORKS: dict[str, tuple[tuple[int, ...], Callable[[], dict[str, nn.Module]]]] = {
    "values": ((), lambda: {**frn(FRN1d), "mabn": MABN1d(C)}),
    "1d": ((7,), lambda: {**frn(FRN1d), "mabn": MABN1d(C), "cenconv": CenConv1d(C, 5, 3)}),
    "2d": (
        (5, 6),
        lambda: {
            **frn(FRN2d),
            "mabn": MABN2d(C),
            "mabn, not affine": MABN2d(C, affine=False),
            "cenconv": CenConv2d(C, 5, 3),
            "cenconv, transposed": CenConvTranspose2d(C, 4, 3),
        },
    ),
    "3d": ((4, 5, 6), lambda: {**frn(FRN3d), "mabn": MABN3d(C), "cenconv": CenConv3d(C, 4, 3)}),
}
"""Spatial sizes of the example, and layers; TLU goes with each."""


@functools.cache
def network(name: str) -> tuple[SideBySide, Tensor, Tensor]:
    """The network, the example, and an input of other sizes."""
    spatial, layers = NETWORKS[name]
    torch.manual_seed(0)
    net = SideBySide({**layers(), "tlu": TLU(C)})
    with torch.no_grad():
        for key, value in (*net.named_parameters(), *net.named_buffers()):
            if value.is_floating_point() and not key.endswith("eps"):
                value.uniform_(0.2, 1)
            if key.endswith(("bias", "tau")):
                value.sub_(0.6)
    x = torch.randn(4, C, *(size + 2 for size in spatial))
    return net.eval(), torch.randn(2, C, *spatial), x


def dynamic(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def sizes(example: Tensor) -> tuple[dict[int, Any]]:
    return (dict.fromkeys(dynamic(example), torch.export.Dim.DYNAMIC),)


@contextmanager
def talkative() -> Iterator[None]:
    """Exporters warn of themselves; what a trace warns of would be ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", torch.jit.TracerWarning)
        yield


@functools.cache
def exported(name: str, how: str) -> onnx.ModelProto:
    """What torch.onnx.export makes of a network: "dynamo", with the "table" of our translations, or "TorchScript"."""
    net, example, _ = network(name)
    file = io.BytesIO()
    with talkative():
        if how == "TorchScript":
            torch.onnx.export(
                net, (example,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": dynamic(example)}
            )
            return onnx.load_from_string(file.getvalue())
        table = deploynorm.onnx_translations() if how == "table" else None
        program = torch.onnx.export(
            net, (example,), dynamic_shapes=sizes(example), custom_translation_table=table, verbose=False
        )
    assert program is not None
    return program.model_proto


def in_onnx_runtime(name: str, how: str) -> Arrays:
    with OnnxRuntimeRunner(exported(name, how).SerializeToString(), plugins=()) as runner:
        return list(runner.infer({runner.inputs[0].name: network(name)[2].numpy()}).values())


def with_our_table(name: str) -> Arrays:
    with ReferenceRunner(exported(name, "table")) as runner:
        return list(runner.infer({runner.inputs[0].name: network(name)[2].numpy()}).values())


def torchscript(name: str) -> Arrays:
    net, example, x = network(name)
    with talkative():
        traced = torch.jit.trace(net, (example,))
    assert not any(DOMAIN in node.kind() for node in traced.inlined_graph.nodes())
    return [y.numpy(force=True) for y in traced(x)]


def decomposed(name: str) -> Arrays:
    """What ExecuTorch, Torch-TensorRT and litert-torch start from."""
    net, example, x = network(name)
    with talkative():
        program = torch.export.export(net, (example,), dynamic_shapes=sizes(example)).run_decompositions()
    assert not any(DOMAIN in str(node.target) for node in program.graph.nodes)
    return [y.numpy(force=True) for y in program.module()(x)]


def openvino(name: str) -> Arrays:
    import openvino

    net, example, x = network(name)
    with talkative():
        model = openvino.convert_model(net, example_input=example)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled([x.numpy()]).values())


ROUTES: dict[str, tuple[Callable[[str], Arrays], str | None]] = {
    "torch.onnx": (lambda name: in_onnx_runtime(name, "dynamo"), "ort"),
    "torch.onnx with our table": (with_our_table, None),
    "torch.onnx by TorchScript": (lambda name: in_onnx_runtime(name, "TorchScript"), "ort"),
    "torch.jit.trace": (torchscript, None),
    "run_decompositions": (decomposed, None),
    "openvino": (openvino, "openvino"),
}
"""Outputs for the input of other sizes, by the name of the network; and what the route requires."""


def pairs(routes: Iterable[str], names: Iterable[str]) -> list[Any]:
    """All pairs; of those that torch.export traces, which takes seconds, those of one rank in the plain run."""
    fast = ("torch.onnx by TorchScript", "torch.jit.trace", "openvino", "TorchScript")
    every = itertools.product(routes, names)
    return [pytest.param(*each, marks=[] if each[0] in fast or each[1] == "2d" else pytest.mark.slow) for each in every]


@pytest.mark.parametrize(("route", "name"), pairs(ROUTES, NETWORKS))
def test_every_layer_takes_every_route(
    route: str, name: str, require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, required = ROUTES[route]
    if required is not None:
        require(required)
    monkeypatch.setenv("CI", "true")  # or OpenVINO's converter reports to its makers that it was used
    net, _, x = network(name)
    wanted = [y.numpy(force=True) for y in copy.deepcopy(net).double()(x.double())]
    wrong = {
        layer: np.abs(got - want).max() if got.shape == want.shape else got.shape
        for layer, got, want in zip(net.names, go(name), wanted, strict=True)
        if got.shape != want.shape or not np.allclose(got, want, **OP_FLOAT32.kwargs())
    }
    assert not wrong


def test_with_our_table_each_frn_is_one_node() -> None:
    model = exported("2d", "table")
    ours = [node for node in model.graph.node if node.domain == DOMAIN]
    assert sorted(node.op_type for node in ours) == [OP_TYPE] * 5 + [ADD_OP_TYPE] * 2
    assert all({each.name: each.s.decode() for each in node.attribute} == NODE_ATTRIBUTES for node in ours)
    assert DOMAIN in {each.domain for each in model.opset_import}


@pytest.mark.parametrize(("how", "name"), pairs(("dynamo", "TorchScript"), ("1d", "2d", "3d")))
def test_fuse_finds_each_frn_that_others_wrote(how: str, name: str) -> None:
    after = fuse(ir.from_proto(exported(name, how))).after
    assert sum(count for operator, count in after.items() if operator.startswith(DOMAIN)) == 7
