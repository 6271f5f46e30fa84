"""`expand`: our nodes as operators of ONNX, and back again by `fuse`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import CHANNELS, frn_model, frn_parameters
from tolerances import OP_FLOAT32

from deploynorm.contract import ADD_OP_TYPE, DOMAIN, OP_TYPE
from deploynorm.errors import ModelError
from deploynorm.lowering import frn_nodes
from deploynorm.rewrite.expand import expand
from deploynorm.rewrite.fuse import fuse
from deploynorm.run.onnxruntime import OnnxRuntimeRunner


@pytest.fixture(autouse=True)
def _needs(require: Callable[[str], None]) -> None:
    require("ort")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("body", [True, None])
@pytest.mark.parametrize("lowering", ["primitives", "rmsnorm"])
def test_a_node_becomes_operators_and_one_node_again(lowering: str, body: bool | None, residual: bool) -> None:
    """Through a file with and without the body; only rmsnorm with an epsilon for each channel multiplies x first."""
    parameters = frn_parameters() | {"tau": np.zeros(CHANNELS, np.float32), "eps": np.full(CHANNELS, 1e-3, np.float32)}
    proto = frn_model(body=body, residual=residual, parameters=parameters)
    model = ir.from_proto(proto)
    original = ir.to_proto(model).SerializeToString(deterministic=True)
    result = expand(model, lowering)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == original, "the model given was changed"
    assert not frn_nodes(result.model.graph)
    assert not result.model.functions
    assert DOMAIN not in result.model.opset_imports
    onnx.checker.check_model(ir.to_proto(result.model))
    assert not expand(result.model, lowering).modified
    fused = fuse(result.model)
    name = f"{DOMAIN}::{ADD_OP_TYPE if residual else OP_TYPE}"
    assert fused.after[name] == 1
    feeds = {"X": np.random.default_rng(0).normal(size=(2, CHANNELS, 5, 7)).astype(np.float32)}
    if residual:
        feeds["residual"] = np.random.default_rng(1).normal(size=feeds["X"].shape).astype(np.float32)
    outputs = []
    for candidate in (ir.from_proto(frn_model(body=True, residual=residual, parameters=parameters)), result.model):
        with OnnxRuntimeRunner(ir.to_proto(candidate).SerializeToString(), plugins=[]) as runner:
            outputs.append(runner.infer(feeds)["Y"])
    np.testing.assert_allclose(outputs[1], outputs[0], **OP_FLOAT32.kwargs())


def test_a_file_without_our_nodes_stays() -> None:
    model = expand(ir.from_proto(frn_model(body=True))).model
    result = expand(model)
    assert result.model is model
    assert not result.changes


def test_what_cannot_take_rmsnorm_is_refused() -> None:
    with pytest.raises(ModelError, match="float64"):
        expand(ir.from_proto(frn_model("float64", body=True)), "rmsnorm")
