"""FRN, an addition and a threshold as one node, and where they stay three."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import onnx
import pytest
import torch
from tolerances import OP_FLOAT32
from torch import Tensor, nn

from deploynorm import export
from deploynorm.contract import ADD_OP_TYPE, DOMAIN, OP_TYPE
from deploynorm.layers import TLU, FRN2d
from deploynorm.models.frn_resnet import BasicBlock, Bottleneck
from deploynorm.residual import fuse_residuals
from deploynorm.run.onnxruntime import OnnxRuntimeRunner
from deploynorm.run.reference import ReferenceRunner

X = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(0))
ADD, FRN = f"{DOMAIN}::{ADD_OP_TYPE}", f"{DOMAIN}::{OP_TYPE}"


def randomized(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.5)
    return net.eval()


Forward: TypeAlias = Callable[["Block", Tensor], object]


class Block(nn.Module):
    """forward(x), with layers to call: frn and other without threshold, bounded with one, conv."""

    def __init__(self, forward: Forward, channels: int = 4) -> None:
        super().__init__()
        self.frn, self.other = FRN2d(channels, tlu=False), FRN2d(channels, tlu=False)
        self.bounded, self.tlu, self.conv = FRN2d(channels), TLU(channels), nn.Conv2d(channels, channels, 1)
        self.call = forward

    def forward(self, x: Tensor) -> object:
        return self.call(self, x)


FUSED: dict[str, Forward] = {
    "TLU": lambda b, x: b.tlu(b.frn(b.conv(x)) + x),
    "ReLU": lambda b, x: (b.frn(b.conv(x)) + x).relu(),
    "the residual first": lambda b, x: b.tlu(x + b.frn(b.conv(x))),
    "a maximum with the threshold first": lambda b, x: torch.maximum(b.tlu.tau.view(4, 1, 1), b.frn(b.conv(x)) + x),
    "one threshold for all": lambda b, x: torch.maximum(b.frn(x) + x, torch.tensor(0.25)),
    "no layer between": lambda b, x: b.tlu(b.frn(x) + x),
    "of two the later": lambda b, x: b.tlu(b.frn(b.conv(x)) + b.other(x)),
    "a threshold that is read again": lambda b, x: (y := b.tlu(b.frn(b.conv(x)) + x)) + y.mean(),
    "in place": lambda b, x: b.frn(b.conv(x)).add_(x).relu_(),
}


def all_of(forwards: dict[str, Forward]) -> nn.Module:
    """One network of all, each with layers of its own: one export serves them all."""

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(map(Block, forwards.values()))

        def forward(self, x: Tensor) -> list[object]:
            return [block(x.clone()) for block in self.blocks]

    return randomized(All())


def test_the_pattern_becomes_one_node_that_computes_the_same() -> None:
    net = all_of(FUSED)
    exported = export(net, X, dynamic="none")
    counts = exported.node_counts()
    assert counts[ADD] == len(FUSED)
    assert counts[FRN] == 1  # of the two that are added
    assert not {"Max", "Relu"} & set(counts)
    onnx.checker.check_model(exported.to_proto(), full_check=True)
    with ReferenceRunner(exported.to_proto()) as runner, torch.no_grad():
        for name, got, wanted in zip(FUSED, runner.infer({"x": X.numpy()}).values(), net(X), strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), **OP_FLOAT32.kwargs(), err_msg=name)


APART: dict[str, Forward] = {
    "a threshold of its own": lambda b, x: b.tlu(b.bounded(x) + x),
    "no threshold": lambda b, x: b.frn(x) + x,
    "no addition": lambda b, x: b.tlu(b.frn(x)),
    "an addition of itself": lambda b, x: b.tlu((y := b.frn(x)) + y),
    "FRN's value is read again": lambda b, x: b.tlu((y := b.frn(x)) + x) + y,
    "the sum is read again": lambda b, x: b.tlu(y := b.frn(x) + x) + y,
    "FRN's value is an output": lambda b, x: (b.tlu((y := b.frn(x)) + x), y),
    "the sum is an output": lambda b, x: (b.tlu(y := b.frn(x) + x), y),
    "a residual for each channel": lambda b, x: b.tlu(b.frn(x) + x.mean((2, 3), keepdim=True)),
    "a residual of one sample": lambda b, x: b.tlu(b.frn(x) + x[:1]),
    "a residual larger than FRN": lambda b, x: b.tlu(b.frn(x.mean((2, 3), keepdim=True)) + x),
    "a residual of another type": lambda b, x: (b.frn(x) + x.double()).relu(),
    "a constant": lambda b, x: b.tlu(b.frn(x) + 1),
    "a difference": lambda b, x: b.tlu(x - b.frn(x)),
    "another activation": lambda b, x: nn.functional.gelu(b.frn(x) + x),
    "a threshold that is computed": lambda b, x: torch.maximum(b.frn(x) + x, x.mean((2, 3), keepdim=True)),
    "a threshold for each column": lambda b, x: torch.maximum(
        b.frn(x) + x, torch.arange(4.0).view(4, 1, 1) * x[:1] * 0
    ),
    "two sums": lambda b, x: b.tlu(b.frn(x) + x + x),
}


def test_where_it_is_not_proved_the_nodes_stay() -> None:
    graph = export(all_of(APART), X, dynamic="none").model.graph
    assert [str(node.outputs[0].name) for node in graph if node.op_type == ADD_OP_TYPE] == []


@pytest.mark.parametrize(("block", "dtype"), [(BasicBlock, "float16"), (Bottleneck, "float32")])
def test_blocks_of_a_resnet_are_fused_at_every_size(
    block: type[BasicBlock | Bottleneck], dtype: str, require: Callable[[str], None]
) -> None:
    require("ort")
    net = randomized(nn.Sequential(block(8, 4, 2), block(4 * block.expansion, 4)))
    exported = export(net, torch.randn(2, 8, 12, 10), dtype=dtype)
    counts = exported.node_counts()
    assert counts[ADD] == 2
    assert not {"Add", "Max", "Relu"} & set(counts)
    assert [each.shape for each in exported.inputs] == [("N", 8, "H", "W")]
    names = {function.name for function in exported.to_proto().functions}
    assert names == {OP_TYPE, ADD_OP_TYPE}
    for node in exported.to_proto().graph.node:
        if node.op_type == ADD_OP_TYPE:
            (tau,) = (each for each in exported.to_proto().graph.initializer if each.name == node.input[3])
            assert (tau.data_type, list(tau.dims)) == (onnx.TensorProto.FLOAT, [4 * block.expansion])
    if dtype == "float16":
        return
    with OnnxRuntimeRunner(exported.to_proto().SerializeToString(), plugins=[]) as runner, torch.no_grad():
        for shape in ((1, 8, 9, 7), (3, 8, 16, 1)):
            x = torch.randn(shape)
            (got,) = runner.infer({"input": x.numpy()}).values()
            np.testing.assert_allclose(got, net(x).numpy(), rtol=1e-4, atol=1e-4)


def test_it_is_left_out_on_request_and_in_standard_operators() -> None:
    net = Block(FUSED["TLU"])
    for options in ({"residual": False}, {"lowering": "rmsnorm"}):
        nodes = [node.op_type for node in export(net, X, dynamic="none", **options).model.graph]
        assert nodes[-2:] == ["Add", "Max"]


def test_a_residual_of_unknown_shape_and_a_threshold_of_nan_are_left_alone() -> None:
    exported = export(Block(FUSED["TLU"]), X, dynamic="none", residual=False)
    (add,) = (node for node in exported.model.graph if node.op_type == "Add")
    known = add.inputs[0].shape
    for shape in (None, [None, 4, None, None], ["", 4, "", ""], ["N", 4, "H", "V"]):
        add.inputs[0].shape = None if shape is None else type(known)(shape)
        add.inputs[1].shape = add.inputs[0].shape if shape != ["N", 4, "H", "V"] else known
        fuse_residuals(exported.model)
        assert ADD not in exported.node_counts(), shape
    add.inputs[0].shape = add.inputs[1].shape = known
    fuse_residuals(exported.model)
    assert exported.node_counts()[ADD] == 1
    net = Block(FUSED["TLU"])
    with torch.no_grad():
        net.tlu.tau[1] = float("nan")
    assert ADD not in export(net, X, dynamic="none").node_counts()
