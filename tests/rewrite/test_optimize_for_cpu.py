"""`optimize_for_cpu`: which graphs it rewrites and into what, which it leaves, and that the numbers stay."""

from __future__ import annotations

import errno
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from tolerances import LAYOUT_FLOAT32
from torch import Tensor, nn

from deploynorm import onnx_file, ort
from deploynorm._export import export
from deploynorm.changes import Change
from deploynorm.contract import (
    ADD_OP_TYPE,
    BLOCK_ATTRIBUTE,
    BLOCKED_OP_TYPE,
    DOMAIN,
    METADATA_CPU,
    OP_TYPE,
    OPERATORS,
)
from deploynorm.errors import BackendError, InputError, ModelError, ParityError
from deploynorm.layers import FRN2d
from deploynorm.lowering import function_proto
from deploynorm.models import frn_resnet
from deploynorm.onnx_file import OnnxFile
from deploynorm.ort import machine
from deploynorm.ort.machine import check_this_machine
from deploynorm.rewrite import rewrite, sequence
from deploynorm.rewrite.cpu import optimize_for_cpu
from deploynorm.rewrite.result import RewriteResult
from deploynorm.run.onnxruntime import OnnxRuntimeRunner

OPSET = 20
SIZES = {"N": 2, "H": 9, "W": 7}
WHOLE, PARTIAL = 32, 20
"""Channels that fill blocks of 8 and of 16, and channels that fill neither."""

NCHWC = "com.microsoft.nchwc::"
RO, RI = f"{NCHWC}ReorderOutput", f"{NCHWC}ReorderInput"
FRN, ADDED, BLOCKED = (f"{DOMAIN}::{op_type}" for op_type in (OP_TYPE, ADD_OP_TYPE, BLOCKED_OP_TYPE))


@pytest.fixture(autouse=True)
def _needs(require: Callable[[str], None]) -> None:
    require("ort")
    require("native")


@dataclass(frozen=True)
class Graph:
    """A graph in ONNX's text form, with `Frn(...)` for our operator, over x (N, C, H, W).

    Initializers are w (C, C, 3, 3); g, b and e (C,); t (C,), and off (C,), a threshold that is none; m (1, C, 1, 1).

    Attributes:
        nodes: Its nodes; all values have the shape of x unless `shapes` has another.
        after: Nodes of each operator after the rewrite, besides convolutions and FRN; and reorders of layouts, where
            there are others than one behind the graph's input and one before its output.
        channels: C.
        outputs: Of the graph.
        inputs: Name and shape of inputs besides x, or another shape of x.
        shapes: Of values that differ from x; None for one that the file does not tell.
        defaults: Inputs that have an initializer too, which is used where they are not fed.
    """

    nodes: str
    after: Mapping[str, int] = field(default_factory=dict)
    channels: int = WHOLE
    outputs: tuple[str, ...] = ("y",)
    inputs: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, str | None] = field(default_factory=dict)
    defaults: tuple[str, ...] = ()

    def expected(self, frn: str) -> Counter[str]:
        """`after` in full, where our operator has this name."""
        return Counter({frn: self.nodes.count("Frn(") + self.nodes.count("FrnAdd("), RI: 1, RO: 1, **self.after})

    def model(self) -> ir.Model:
        inputs = self.input_shapes()
        usual = inputs["x"]
        results = [name.strip() for node in self.nodes.split(";") for name in node.partition("=")[0].split(",")]
        shapes: dict[str, str | None] = {**inputs, **{name: self.shapes.get(name, usual) for name in results}}

        def typed(name: str) -> str:
            return f"float[{shapes[name]}] {name}" if shapes[name] is not None else f"float {name}"

        nodes = self.nodes.replace(";", "").replace("Conv(", "Conv <pads = [1, 1, 1, 1]> (")
        nodes = nodes.replace("Frn(", f"{DOMAIN}.{OP_TYPE} (").replace("FrnAdd(", f"{DOMAIN}.{ADD_OP_TYPE} (")
        text = f"""
        <ir_version: 10, opset_import: ["": {OPSET}, "{DOMAIN}": 1]>
        graph ({", ".join(map(typed, inputs))}) => ({", ".join(map(typed, self.outputs))})
        <{", ".join(typed(name) for name in results if name not in self.outputs and shapes[name] is not None)}>
        {{ {nodes} }}
        """
        proto = onnx.parser.parse_model(text)
        rng = np.random.default_rng(0)
        C = self.channels
        weights = {
            "w": rng.normal(size=(C, C, 3, 3)) / np.sqrt(9 * C),
            "p": rng.normal(size=(C, C, 1)) / np.sqrt(C),
            "g": rng.normal(size=C),
            "b": rng.normal(size=C),
            "t": rng.normal(size=C) - 1,
            "off": np.full(C, -np.inf),
            "e": rng.uniform(1e-6, 1e-3, size=C),
            "m": rng.normal(size=(1, C, 1, 1)),
            "half": np.array(0.5),
            "row": rng.normal(size=(1, 1, 1, 7)),
        }
        read = {name for node in proto.graph.node for name in node.input} - set(self.inputs) | set(self.defaults)
        for name in weights.keys() & read:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(weights[name].astype(np.float32), name))
        proto.functions.extend(function_proto(OPSET, op_type) for op_type in OPERATORS)
        return ir.from_proto(proto)

    def feeds(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(1)
        return {
            name: rng.normal(size=[int(SIZES.get(size, size)) for size in shape.split(", ")]).astype(np.float32)
            for name, shape in self.input_shapes().items()
            if name not in self.defaults
        }

    def input_shapes(self) -> dict[str, str]:
        return {"x": f"N, {self.channels}, H, W", **self.inputs}


ONE = "a = Conv(x, w); f = Frn(a, g, b, t, e); "
BARE = "a = Conv(x, w); f = Frn(a, g, b, off, e); "
TWO = f"{ONE}c = Conv(f, w); h = Frn(c, g, b, t, e); "
TWO_BARE = f"{ONE}c = Conv(f, w); h = Frn(c, g, b, off, e); "
"""One FRN, and two of which the second may take the first as a residual; the last has a threshold or is bare."""
HALVED = f"N, {PARTIAL}, h, v"

REWRITTEN = {
    "FRN between convolutions": Graph(f"{ONE}y = Conv(f, w)"),
    "FRN as the output": Graph("a = Conv(x, w); y = Frn(a, g, b, t, e)"),
    "FRN whose input is read elsewhere": Graph(
        f"{ONE}y = Conv(f, w); z = Neg(a)", {"Neg": 1, RO: 2}, outputs=("y", "z")
    ),
    "FRN that is an output too": Graph(f"{ONE}y = Conv(f, w)", {RO: 2}, outputs=("y", "f")),
    "FRN with a threshold that is fed": Graph(f"{ONE}y = Conv(f, w)", inputs={"t": str(WHOLE)}),
    "FRN of a last block that is not full": Graph(f"{ONE}y = Conv(f, w)", channels=PARTIAL),
    "chain of three": Graph(f"{ONE}h = Frn(f, g, b, t, e); i = Frn(h, g, b, off, e); y = Conv(i, w)"),
    "FRN with a residual": Graph(f"{ONE}c = Conv(f, w); h = FrnAdd(c, b, g, t, e, f); y = Conv(h, w)"),
    "FRN with a residual in a last block that is not full": Graph(
        f"{ONE}c = Conv(f, w); h = FrnAdd(c, b, g, t, e, f); y = Conv(h, w)", channels=PARTIAL
    ),
    "residual behind FRN": Graph(f"{TWO_BARE}y = Add(h, f)"),
    "residual before FRN": Graph(f"{TWO_BARE}y = Add(f, h)"),
    "residual and threshold": Graph(f"{TWO_BARE}s = Add(h, f); k = Max(s, m); y = Conv(k, w)"),
    "the same in a last block that is not full": Graph(
        f"{TWO_BARE}s = Add(h, f); k = Max(s, m); y = Conv(k, w)", channels=PARTIAL
    ),
    "residual of two FRNs, with the constant first in Max": Graph(
        f"{BARE}c = Conv(x, w); h = Frn(c, b, g, off, e); s = Add(f, h); k = Max(m, s); y = Conv(k, w)"
    ),
    "residual that a convolution gives": Graph(f"{BARE}c = Conv(x, w); s = Add(c, f); y = Conv(s, w)"),
    "Relu as the threshold": Graph(f"{BARE}r = Relu(f); y = Conv(r, w)"),
    "Max over a threshold that is there": Graph(f"{ONE}r = Max(f, m); y = Conv(r, w)"),
    "Max with one number for all channels": Graph(f"{BARE}r = Max(f, half); y = Conv(r, w)", channels=PARTIAL),
    "addition behind two thresholds stays one": Graph(f"{TWO}s = Add(h, f); y = Conv(s, w)", {"Add": 1}),
    "addition of a value to itself": Graph(f"{BARE}s = Add(f, f); y = Conv(s, w)", {"Add": 1}),
    "FRN that another node reads takes no residual": Graph(
        f"{TWO_BARE}s = Add(h, f); y = Conv(s, w); z = Conv(h, w)", {"Add": 1, RO: 2}, outputs=("y", "z")
    ),
    "FRN that is an output takes no residual": Graph(
        f"{TWO_BARE}s = Add(h, f); y = Conv(s, w)", {"Add": 1, RO: 2}, outputs=("y", "h")
    ),
    "FRN with a threshold that is fed takes no residual": Graph(
        f"{BARE}c = Conv(f, w); h = Frn(c, g, b, t, e); s = Add(h, f); y = Conv(s, w)",
        {"Add": 1},
        inputs={"t": str(WHOLE)},
    ),
    "Relu and Max with one number of an addition": Graph(
        f"{TWO}s = Add(h, f); r = Relu(s); u = Max(r, half); y = Conv(u, w)",
        {"Add": 1, "Relu": 1, "Max": 1},
        channels=PARTIAL,
    ),
    "MaxPool in a last block that is not full": Graph(
        f"{ONE}u = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (f); y = Conv(u, w)",
        {f"{NCHWC}MaxPool": 1},
        channels=PARTIAL,
    ),
    "AveragePool in a last block that is not full": Graph(
        f"{ONE}y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (f)",
        {f"{NCHWC}AveragePool": 1},
        channels=PARTIAL,
        shapes={"y": HALVED},
    ),
    "AveragePool that counts padding and rounds its size up": Graph(
        f"{ONE}y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1, count_include_pad = 1> (f)",
        {"AveragePool": 1},
        channels=PARTIAL,
        shapes={"y": HALVED},
    ),
    "mean over H and W": Graph(
        f"{ONE}axes = Constant <value_ints = [-1, -2]> (); y = ReduceMean(f, axes)",
        {f"{NCHWC}GlobalAveragePool": 1},
        channels=PARTIAL,
        shapes={"axes": None, "y": f"N, {PARTIAL}, 1, 1"},
    ),
    "Max of an addition that is not FRN's": Graph(
        f"{TWO}s = Add(h, f); r = Max(s, m); y = Conv(r, w)", {"Add": 1, "Max": 1, RI: 2, RO: 2}
    ),
    "Max with a bound that is fed": Graph(
        f"{BARE}r = Max(f, m); y = Conv(r, w)", {"Max": 1, RI: 2, RO: 2}, inputs={"m": f"1, {WHOLE}, 1, 1"}
    ),
    "Max with a constant that changes along W": Graph(
        f"{BARE}r = Max(f, row); y = Conv(r, w)", {"Max": 1, RI: 2, RO: 2}, inputs={"x": f"2, {WHOLE}, 9, 7"}
    ),
    "Max of two values": Graph(
        f"{BARE}h = Frn(f, g, b, off, e); r = Max(f, h); y = Conv(r, w)", {"Max": 1, RI: 2, RO: 3}
    ),
    "addition of shapes that are not known to be the same": Graph(
        f"{TWO_BARE}s = Add(h, f); y = Conv(s, w)", {"Add": 1, RI: 2, RO: 3}, shapes=dict.fromkeys("afchs")
    ),
    "addition of sizes without a name": Graph(
        f"{TWO_BARE}s = Add(h, f); y = Conv(s, w)",
        {"Add": 1, RI: 2, RO: 3},
        shapes=dict.fromkeys("afchs", f"?, {WHOLE}, ?, ?"),
    ),
    "one residual for a FRN": Graph(f"{TWO_BARE}s = Add(h, f); u = Add(s, a); y = Conv(u, w)", {"Add": 1}),
    "threshold that may be fed": Graph(
        f"{BARE}r = Relu(f); y = Conv(r, w)",
        {"Relu": 1, RI: 2, RO: 2},
        inputs={"off": str(WHOLE)},
        defaults=("off",),
    ),
    "MaxPool with indices": Graph(
        f"{ONE}u, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (f); y = Neg(u); z = Cast <to = 1> (i)",
        {"MaxPool": 1, "Neg": 1, "Cast": 1},
        outputs=("y", "z"),
        shapes={"u": None, "i": None, **dict.fromkeys("yz", f"N, {WHOLE}, h, v")},
    ),
    "mean over other axes": Graph(
        f"{ONE}axes = Constant <value_ints = [1, 2]> (); y = ReduceMean(f, axes)",
        {"ReduceMean": 1},
        shapes={"axes": None, "y": "N, 1, 1, W"},
    ),
    "mean that drops its axes": Graph(
        f"{ONE}axes = Constant <value_ints = [2, 3]> (); y = ReduceMean <keepdims = 0> (f, axes)",
        {"ReduceMean": 1},
        shapes={"axes": None, "y": f"N, {WHOLE}"},
    ),
    "addition of a value that is broadcast": Graph(
        f"{BARE}k = Conv(q, w); h = Frn(k, g, b, off, e); s = Add(f, h); y = Conv(s, w)",
        {"Add": 1, RI: 3, RO: 3},
        inputs={"q": f"N, {WHOLE}, 1, 1"},
        shapes=dict.fromkeys("kh", f"N, {WHOLE}, 1, 1"),
    ),
    "addition of an input": Graph(f"{BARE}s = Add(f, x); y = Conv(s, w)", {"Add": 1, RI: 2, RO: 2}),
}

LEFT = {
    "FRN whose input and output are both read elsewhere": (
        Graph("y = Conv(x, w); z = Frn(y, g, b, t, e)", outputs=("y", "z")),
        "both needed in the plain layout",
    ),
    "FRN of an input": (
        Graph("f = Frn(x, g, b, t, e); y = Conv(f, w)"),
        "it reads x, which is in the plain layout",
    ),
    "FRN behind a node without a blocked form": (
        Graph("a = Conv(x, w); n = Neg(a); f = Frn(n, g, b, t, e); y = Conv(f, w)", {"Neg": 1, RI: 2, RO: 2}),
        "it reads Neg n",
    ),
    "FRN of one spatial axis": (
        Graph(
            "a = Conv (q, p); f = Frn(a, g, b, t, e); y = Conv (f, p)",
            {RI: 0, RO: 0},
            inputs={"q": f"N, {WHOLE}, H"},
            shapes=dict.fromkeys("afy", f"N, {WHOLE}, H"),
        ),
        "it reads Conv a",
    ),
    "FRN with a residual in the plain layout": (
        Graph("a = Conv(x, w); f = FrnAdd(a, g, b, t, e, x); y = Conv(f, w)", {FRN: 0, ADDED: 1, RI: 2, RO: 2}),
        "it reads x, which is in the plain layout",
    ),
    "last block that is not full, and a threshold that is fed": (
        Graph(f"{ONE}y = Conv(f, w)", {RI: 2, RO: 2}, channels=PARTIAL, inputs={"t": str(PARTIAL)}),
        "parameters are not constant",
    ),
}


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def _after(result: RewriteResult) -> Counter[str]:
    return Counter({name: n for name, n in result.after.items() if not name.endswith("Conv")})


def _compare(model: ir.Model, rewritten: ir.Model, feeds: Mapping[str, np.ndarray]) -> None:
    outputs = []
    for candidate in (model, rewritten):
        with OnnxRuntimeRunner(_bytes(candidate)) as runner:
            outputs.append(runner.infer(feeds))
    want, got = outputs
    assert list(got) == list(want)
    for name in want:
        assert np.abs(want[name]).max() > 0
        np.testing.assert_allclose(got[name], want[name], **LAYOUT_FLOAT32.kwargs())


@pytest.mark.parametrize("name", REWRITTEN)
def test_graph_is_rewritten(name: str) -> None:
    case = REWRITTEN[name]
    model = case.model()
    original = _bytes(model)
    result = optimize_for_cpu(model)
    assert result.modified
    assert _after(result) == case.expected(BLOCKED)
    assert _bytes(model) == original, "the model given was changed"
    _compare(model, result.model, case.feeds())
    unused = [v.name for v in result.model.graph.initializers.values() if not v.uses() and not v.is_graph_input()]
    assert not unused
    with pytest.raises(ModelError, match="rewritten already"):
        optimize_for_cpu(result.model)


@pytest.mark.parametrize("name", LEFT)
def test_graph_is_left(name: str) -> None:
    case, reason = LEFT[name]
    result = optimize_for_cpu(case.model())
    assert not result.modified
    assert _after(result) == case.expected(FRN)
    assert result.after == result.before
    [found] = [change.detail for change in result.changes if change.kind in OPERATORS]
    assert reason in found


@pytest.mark.parametrize("operands", ["f, k", "k, f"])
def test_later_of_two_frns_takes_the_residual(operands: str) -> None:
    nodes = f"{BARE}c = Conv(q, w); k = Frn(c, g, b, off, e); y = Add({operands})"
    result = optimize_for_cpu(Graph(nodes, inputs={"q": f"N, {WHOLE}, H, W"}).model())
    first, last = [node for node in result.model.graph if node.op_type == BLOCKED_OP_TYPE]
    assert (len(first.inputs), len(last.inputs)) == (5, 6)
    assert last.inputs[5] is first.outputs[0]
    order = list(result.model.graph)
    assert order.index(first.inputs[0].producer()) < order.index(last.inputs[0].producer())


def test_frn_in_a_branch_is_left() -> None:
    """ONNX Runtime knows no blocked values across the border of a subgraph."""
    values = f"float[N, {WHOLE}, H, W]"
    case = REWRITTEN["FRN between convolutions"]
    branch = onnx.parser.parse_graph(f"taken () => ({values} r) {{ r = {DOMAIN}.{OP_TYPE} (f, g, b, t, e) }}")
    other = onnx.parser.parse_graph(f"other () => ({values} r) {{ r = Neg (f) }}")
    proto = ir.to_proto(case.model())
    proto.graph.input.append(onnx.helper.make_tensor_value_info("yes", onnx.TensorProto.BOOL, ()))
    proto.graph.node[-1].CopyFrom(onnx.helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other))
    result = optimize_for_cpu(ir.from_proto(proto))
    assert (result.after[BLOCKED], result.after[FRN]) == (1, 1)
    assert [change.detail for change in result.changes if change.outcome == "unchanged" and change.kind == OP_TYPE] == [
        "it is inside a branch or a loop"
    ]
    _compare(ir.from_proto(proto), result.model, case.feeds() | {"yes": np.array(True)})


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return x + y


def _inverted_residual(channels: int, hidden: int) -> nn.Module:
    """A block of MobileNetV2, with a shortcut: depthwise convolution between two 1x1 ones."""
    return Residual(
        nn.Conv2d(channels, hidden, 1, bias=False),
        FRN2d(hidden),
        nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
        FRN2d(hidden),
        nn.Conv2d(hidden, channels, 1, bias=False),
        FRN2d(channels, tlu=False),
    )


def _preactivation_residual(channels: int) -> nn.Module:
    """A block of a pre-activation ResNet: FRN before each convolution, the sum without a threshold."""
    convolutions = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
    return Residual(FRN2d(channels), convolutions[0], FRN2d(channels), convolutions[1])


def _classifier(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]


def _mobilenet() -> nn.Module:
    stem = nn.Conv2d(3, 24, 3, 2, 1, bias=False), FRN2d(24, tlu=False)
    head = nn.Conv2d(24, 40, 1, bias=False), FRN2d(40, learned_eps="channel")
    return nn.Sequential(*stem, _inverted_residual(24, 96), _inverted_residual(24, 144), *head, *_classifier(40))


def _preactivation() -> nn.Module:
    stem = nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)
    blocks = _preactivation_residual(32), _preactivation_residual(32)
    return nn.Sequential(*stem, *blocks, FRN2d(32), *_classifier(32))


NETWORKS = {
    "ResNet": (lambda: frn_resnet.ResNet(frn_resnet.BasicBlock, (1, 1, 1), 16, "small", 10, 3), 9),
    "MobileNetV2": (_mobilenet, 8),
    "pre-activation": (_preactivation, 5),
}
"""Each with its FRN layers; all but the last reorder goes."""


def _exported(name: str, **options: object) -> ir.Model:
    torch.manual_seed(0)
    network = NETWORKS[name][0]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std(correction=0).clamp(min=1))
    return export(network, [torch.randn(2, 3, 20, 26)], **options).model


LONG = ("ResNet", "MobileNetV2")


@pytest.mark.parametrize("dynamic", [pytest.param("none", marks=pytest.mark.slow), "all"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in NETWORKS]
)
def test_network_keeps_one_reorder(name: str, dynamic: str) -> None:
    model = _exported(name, dynamic=dynamic)
    result = optimize_for_cpu(model)
    layers = NETWORKS[name][1]
    assert _after(result) == Counter(
        {BLOCKED: layers, f"{NCHWC}GlobalAveragePool": 1, RO: 1, "Reshape": 1, "Gemm": 1}
    ) + Counter({f"{NCHWC}MaxPool": result.before[f"{NCHWC}MaxPool"]})
    for shape in [(2, 3, 20, 26)] if dynamic == "none" else [(2, 3, 20, 26), (1, 3, 33, 17)]:
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        _compare(model, result.model, {next(v.name for v in model.graph.inputs): x})


def test_names_that_the_pass_would_give_may_be_taken() -> None:
    case = Graph(f"{ONE}y = Conv(f, w); z = Neg(a)", channels=PARTIAL, outputs=("y", "z"))
    model = case.model()
    model.graph.initializers["t"].name = "f:tau"
    model.graph.outputs[1].name = "f:blocked"
    result = optimize_for_cpu(model)
    assert result.after[BLOCKED] == 1
    _compare(model, result.model, case.feeds())


def test_file_without_function_bodies_and_one_with_external_data(tmp_path: Path) -> None:
    """ONNX Runtime's own optimised file could not hold weights of 2 GB, so its weights lie beside it."""
    model = _exported("ResNet", dynamic="none", function=False)
    onnx_file.save(model, tmp_path / "model.onnx", external_data=True)
    results = [optimize_for_cpu(given).model for given in (model, ir.load(tmp_path / "model.onnx"))]
    assert _bytes(results[0]) == _bytes(results[1])
    onnx_file.save(results[0], tmp_path / "rewritten.onnx", external_data=True)
    x = np.random.default_rng(0).normal(size=(2, 3, 20, 26)).astype(np.float32)
    with OnnxRuntimeRunner(_bytes(model)) as truth, OnnxRuntimeRunner(tmp_path / "rewritten.onnx") as candidate:
        feeds = {truth.inputs[0].name: x}
        want, got = truth.infer(feeds), candidate.infer(feeds)
    np.testing.assert_allclose(got["output"], want["output"], **LAYOUT_FLOAT32.kwargs())


def _session(
    model: str | Path | bytes, where: Path, feeds: Mapping[str, np.ndarray], **options: object
) -> tuple[ort.onnxruntime.InferenceSession, list[np.ndarray], set[str]]:
    """A session, its outputs, and the operators that ran."""
    settings = ort.quiet_options()
    settings.enable_profiling, settings.profile_file_prefix = True, str(where / "profile")
    for name in options.keys() - {"optimize", "plugins"}:
        setattr(settings, name, options.pop(name))
    session = ort.session(model, options=settings, **options)
    outputs = session.run(None, dict(feeds))
    events = json.loads(Path(session.end_profiling()).read_text())
    return session, outputs, {event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")}


@pytest.mark.parametrize("form", ["bytes", "file", "weights beside the file"])
def test_session_rewrites_as_it_opens(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    case = REWRITTEN["FRN between convolutions"]
    model = case.model()
    model.metadata_props["deploynorm.labels"] = '["bag", "boot"]'
    model.graph.name, model.producer_name, model.model_version = "net", "another", 3
    model.graph.doc_string = "a net"
    onnx_file.save(model, tmp_path / "net.onnx", external_data=form == "weights beside the file")
    given = _bytes(model) if form == "bytes" else tmp_path / "net.onnx"
    plain, want, ran = _session(given, tmp_path, case.feeds(), optimize=False)
    assert OP_TYPE in ran
    session, got, ran = _session(given, tmp_path, case.feeds())
    assert BLOCKED_OP_TYPE in ran
    assert OP_TYPE not in ran
    np.testing.assert_allclose(got[0], want[0], **LAYOUT_FLOAT32.kwargs())
    for ours, theirs in zip((session, session.get_modelmeta()), (plain, plain.get_modelmeta()), strict=True):
        for name in ("graph_name", "graph_description", "domain", "version", "producer_name", "custom_metadata_map"):
            assert getattr(ours, name, None) == getattr(theirs, name, None)
    for ours, theirs in zip(
        (*session.get_inputs(), *session.get_outputs()), (*plain.get_inputs(), *plain.get_outputs()), strict=True
    ):
        assert (ours.name, ours.shape, ours.type) == (theirs.name, theirs.shape, theirs.type)
    assert not list(scratch.iterdir())
    np.testing.assert_array_equal(session.run(None, case.feeds())[0], got[0])  # its weights are not gone with the files
    session.set_providers(["CPUExecutionProvider"])  # which opens the model again
    np.testing.assert_array_equal(session.run(None, case.feeds())[0], want[0])


@pytest.mark.parametrize(
    "why", ["told", "level", "graph", "no blocks", "no package", "full disk", "folder not in UTF-8", "nothing to do"]
)
def test_session_that_opens_the_file_as_it_is(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = REWRITTEN["FRN between convolutions"] if why != "nothing to do" else LEFT["FRN of an input"][0]
    options: dict[str, object] = {}
    if why == "told":
        options["optimize"] = False
    elif why == "level":
        options["graph_optimization_level"] = ort.import_onnxruntime().GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    elif why == "graph":
        options["optimized_model_filepath"] = str(tmp_path / "optimized.onnx")
    elif why == "no blocks":

        def refuse(_: object) -> int:
            raise BackendError("onnxruntime", "does not block channels")

        monkeypatch.setattr(machine, "block_size", refuse)
    elif why == "no package":
        monkeypatch.setitem(sys.modules, "deploynorm.rewrite.cpu", None)
    elif why == "full disk":
        monkeypatch.setattr(ir, "save", functools.partial(_full, tmp_path))
    elif why == "folder not in UTF-8":  # a TypeError of ONNX Runtime
        (folder := tmp_path / os.fsdecode(b"\xff")).mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(folder))
    _, got, ran = _session(_bytes(case.model()), tmp_path, case.feeds(), **options)
    assert ran & set(OPERATORS)
    assert BLOCKED_OP_TYPE not in ran
    with OnnxRuntimeRunner(_bytes(case.model())) as truth:
        want = truth.infer(case.feeds())
    for array, name in zip(got, truth.output_names, strict=True):
        np.testing.assert_allclose(array, want[name], **LAYOUT_FLOAT32.kwargs())


def _full(where: Path, *arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(where))


def test_model_without_frn_and_one_in_float16_are_refused() -> None:
    with pytest.raises(ModelError, match=f"no node {FRN}"):
        optimize_for_cpu(Graph("y = Conv(x, w)").model())
    half = Graph("y = Frn(x, g, b, t, e)").model()
    half.graph.inputs[0].dtype = ir.DataType.FLOAT16
    with pytest.raises(ModelError, match=r"not float32\. Got FLOAT16"):
        optimize_for_cpu(half)


def test_library_that_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploynorm.libraries.find.find_library", lambda name: None)
    with pytest.raises(BackendError, match=r"libdeploynorm_ort\.so is not built"):
        optimize_for_cpu(REWRITTEN["FRN as the output"].model())


def test_note_of_the_machine() -> None:
    model = REWRITTEN["FRN as the output"].model()
    model.metadata_props["deploynorm.labels"] = '["bag", "boot"]'
    result = optimize_for_cpu(model, source_sha256="abc")
    assert result.model.metadata_props["deploynorm.labels"] == '["bag", "boot"]'
    assert METADATA_CPU not in model.metadata_props
    note = json.loads(result.model.metadata_props[METADATA_CPU])
    assert set(note) == {"onnxruntime", "machine", "block", "processor", "deploynorm", "source_sha256"}
    runtime = ort.import_onnxruntime()
    assert note["onnxruntime"] == runtime.__version__
    assert note["source_sha256"] == "abc"
    blocks = {node.attributes[BLOCK_ATTRIBUTE].value for node in result.model.graph if node.op_type == BLOCKED_OP_TYPE}
    assert blocks == {note["block"]} == {machine.block_size(runtime)}
    assert note["block"] in (8, 16)
    check_this_machine("net.onnx", json.dumps(note), runtime)
    # Another processor of the same kind will do.
    check_this_machine("net.onnx", json.dumps(note | {"processor": "another"}), runtime)


@pytest.mark.parametrize(("key", "value"), [("onnxruntime", "1.0.0"), ("machine", "vax"), ("block", 64)])
def test_file_of_another_machine_is_refused(key: str, value: object, tmp_path: Path) -> None:
    result = optimize_for_cpu(REWRITTEN["FRN as the output"].model())
    note = json.loads(result.model.metadata_props[METADATA_CPU]) | {key: value}
    with pytest.raises(BackendError, match=rf"(?s)net\.onnx: .*{value}.*rewrite ORIGINAL\.onnx --optimize-for-cpu"):
        check_this_machine("net.onnx", json.dumps(note), ort.import_onnxruntime())
    result.model.metadata_props[METADATA_CPU] = json.dumps(note)
    onnx_file.save(result.model, tmp_path / "net.onnx")
    with pytest.raises(BackendError, match="was rewritten for another machine"):
        OnnxRuntimeRunner(tmp_path / "net.onnx")


def test_file_of_another_processor_is_refused_by_its_operator_too(tmp_path: Path) -> None:
    """The library refuses it while ONNX Runtime opens it, before its note can be read."""
    here = machine.block_size(ort.import_onnxruntime())
    result = optimize_for_cpu(REWRITTEN["FRN as the output"].model())
    for node in result.model.graph:
        if node.op_type == BLOCKED_OP_TYPE:
            node.attributes["block"] = ir.AttrInt64("block", 24 - here)
    onnx_file.save(result.model, tmp_path / "net.onnx")
    with pytest.raises(BackendError, match="was rewritten for another machine") as caught:
        OnnxRuntimeRunner(tmp_path / "net.onnx")
    assert caught.value.fix == "run deploynorm rewrite --optimize-for-cpu here, on the file it was made from"


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"onnxruntime": "1.32.0", "machine": "x86_64"}'])
def test_note_that_is_damaged(text: str) -> None:
    with pytest.raises(ModelError, match="damaged"):
        check_this_machine("net.onnx", text, ort.import_onnxruntime())


def test_passes_run_in_sequence_each_on_the_result_of_the_one_before() -> None:
    seen: list[tuple[ir.Model, str | None]] = []

    def nothing(model: ir.Model, *, source_sha256: str | None = None) -> RewriteResult:
        seen.append((model, source_sha256))
        counts = Counter({"Conv": 1})
        return RewriteResult(model, (Change("y", "Conv", "unchanged", detail="a reason"),), counts, counts)

    alone = optimize_for_cpu(REWRITTEN["FRN as the output"].model())
    both = sequence(optimize_for_cpu, nothing)(REWRITTEN["FRN as the output"].model(), source_sha256="abc")
    assert seen == [(both.model, "abc")]
    assert both.before == alone.before
    assert both.after == Counter({"Conv": 1})
    assert both.changes == (*alone.changes, Change("y", "Conv", "unchanged", detail="a reason"))
    assert both.modified


def test_a_file_is_rewritten_and_checked_and_only_then_saved(tmp_path: Path) -> None:
    source = tmp_path / "net.onnx"
    onnx_file.save(REWRITTEN["FRN as the output"].model(), source)
    rewritten = rewrite(source, input_shapes={"": (2, WHOLE, 5, 7)})
    assert rewritten
    assert f"Parity with {source}" in str(rewritten)
    rewritten.save()
    assert OnnxFile.read(tmp_path / "net.cpu.onnx").metadata[METADATA_CPU]
    with pytest.raises(InputError, match="is MODEL itself"):
        rewritten.save(source)
    assert rewritten.parity is not None
    wrong = replace(rewritten.parity.comparisons[0], ok=False)
    broken = replace(rewritten, parity=replace(rewritten.parity, comparisons=(wrong,)))
    assert not broken
    with pytest.raises(ParityError):
        broken.save(tmp_path / "broken.onnx")
    unchanged = replace(rewritten, parity=None)
    with pytest.raises(ModelError, match="nothing in it can be rewritten"):
        unchanged.save(tmp_path / "broken.onnx")
    assert not (tmp_path / "broken.onnx").exists()
    with pytest.raises(InputError, match=r"unknown pass.*expected optimize_for_cpu"):
        rewrite(source, ["optimize_for_gpu"])


def test_processor_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its last optimisations ONNX Runtime leaves convolutions as they are, as it does on such a processor."""
    runtime = ort.import_onnxruntime()
    session = runtime.InferenceSession

    def unoptimized(model: object, options: object, **keywords: object) -> object:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return session(model, options, **keywords)

    monkeypatch.setattr(runtime, "InferenceSession", unoptimized)
    machine.block_size.cache_clear()
    with pytest.raises(BackendError, match="does not block channels on this processor"):
        optimize_for_cpu(REWRITTEN["FRN as the output"].model())
    monkeypatch.undo()
    assert machine.block_size(runtime) in (8, 16)


def test_rewriting_imports_no_torch() -> None:
    """A server that runs rewritten files has no need of it."""
    program = """
import json, sys
from deploynorm import ort
from deploynorm.rewrite.cpu import optimize_for_cpu
from deploynorm.ort.machine import check_this_machine, describe
runtime = ort.import_onnxruntime()
check_this_machine("net.onnx", json.dumps(describe(runtime)), runtime)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
