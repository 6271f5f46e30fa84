"""Raising the opset: graphs compute what they did, and nodes keep their notes where only axes moved."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from deploynorm.errors import ModelError
from deploynorm.rewrite.opset import raise_opset
from deploynorm.run.onnxruntime import OnnxRuntimeRunner

WEIGHTS = "<float[3] w = {1, 2, 3}, float[4] sizes = {1, 1, 2, 2}, float none = {0}, int64[2] parts = {1, 2}>"

BY_AXES = {
    "mean": "y = ReduceMean <axes = [2, 3]> (x)",
    "two of one mean": "a = ReduceMean <axes = [2, 3]> (x) b = ReduceMax <axes = [2, 3]> (x) y = Sub (a, b)",
    "mean over all": "y = ReduceMean <keepdims = 0> (x)",
    "sums": "a = ReduceSumSquare <axes = [-1]> (x) b = ReduceL2 <axes = [1]> (x) y = Add (a, b)",
    "pad, pow, clip": "p = Abs (x) q = Pow (p, none) r = Clip (q, none) y = Mul (r, x)",
    "normalization": "y = BatchNormalization (x, w, w, w, w)",
    "sum": "y = ReduceSum {sum_axes} (x {sum_input})",
    "views": "a = Squeeze <axes = [0]> (x) y = Unsqueeze <axes = [0, 4]> (a)",
    "resize": "y = Resize <mode = 'linear'> (x, sizes, sizes)",
    "split": "k, y = Split <axis = 1> (x, parts)",
}
CONVERTED = {
    "softmax": "y = Softmax <axis = 1> (x)",
    "split": "k, y = Split <axis = 1, split = [1, 2]> (x)",
    "outside of the table": "k, m = Dropout (x) y = Neg (k)",
}


def _model(nodes: str, opset: int) -> onnx.ModelProto:
    nodes = nodes.replace("'", '"').replace("{sum_axes}", "<axes = [2]>" if opset < 13 else "")
    nodes = nodes.replace("{sum_input}", "" if opset < 13 else ", parts")
    head = f'<ir_version: 7, opset_import: ["": {opset}]>'
    model = onnx.parser.parse_model(f"{head} net (float[1, 3, 4, 6] x) => (float y) {WEIGHTS} {{ {nodes} }}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for node in model.graph.node:
        node.metadata_props.add(key="of", value=node.op_type)
        node.doc_string, node.name = "a doc", f"a {node.op_type}"
    return model


def _compare(model: onnx.ModelProto, raised: ir.Model) -> None:
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 6)).astype(np.float32)
    results = []
    for proto in (model, ir.to_proto(raised)):
        with OnnxRuntimeRunner(proto.SerializeToString(), plugins=[]) as runner:
            results.append(runner.infer({"x": x})["y"])
    want, got = results
    assert want.shape == got.shape
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert raised.opset_imports == {"": 18}


FROM = {"views": (11,), "split": (13, 17)}  # the others from 11, 13 and 17


@pytest.mark.parametrize(("name", "opset"), [(name, n) for name in BY_AXES for n in FROM.get(name, (11, 13, 17))])
def test_nodes_keep_their_notes(name: str, opset: int, require: Callable[[str], None]) -> None:
    require("ort")
    model = _model(BY_AXES[name], opset)
    raised = ir.from_proto(model)
    raise_opset(raised, 18)
    _compare(model, raised)
    assert [(node.metadata_props["of"], node.doc_string, node.name) for node in raised.graph] == [
        (node.op_type, "a doc", f"a {node.op_type}") for node in model.graph.node
    ]


@pytest.mark.parametrize("name", CONVERTED)
def test_what_changed_otherwise_is_converted(name: str, require: Callable[[str], None]) -> None:
    require("ort")
    model = _model(CONVERTED[name], 11)
    raised = ir.from_proto(model)
    raise_opset(raised, 18)
    _compare(model, raised)


def test_what_nobody_can_convert_is_refused() -> None:
    with pytest.raises(ModelError, match="its opset cannot be raised to 18"):
        raise_opset(ir.from_proto(_model("y = NoSuchOperator (x)", 13)), 18)
