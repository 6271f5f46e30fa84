"""A model as TensorRT is to get it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx_ir
import pytest
from graphs import CHANNELS, ELEMENT_TYPES, OPSET, frn_model, frn_parameters
from rtx_builds import conv_frn_conv, quantized
from tolerances import OP_FLOAT32

from deploynorm.contract import (
    ADD_OP_TYPE,
    DOMAIN,
    INPUTS,
    METADATA_CPU,
    NODE_ATTRIBUTES,
    OP_TYPE,
    OPERATORS,
    OUTPUT,
    RESIDUAL,
)
from deploynorm.errors import ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.lowering import function_proto
from deploynorm.reference import filter_response_norm
from deploynorm.run.reference import ReferenceRunner
from deploynorm.trt.layers import Product
from deploynorm.trt.model import BODIES, TensorRTModel
from deploynorm.trt.settings import Way


def attributes(node: onnx.NodeProto) -> dict[str, str]:
    return {attribute.name: attribute.s.decode() for attribute in node.attribute}


@pytest.mark.parametrize("body", [True, False], ids=["with body", "without body"])
@pytest.mark.parametrize("named", [True, False], ids=["with attributes", "without attributes"])
@pytest.mark.parametrize("op_type", OPERATORS)
def test_the_plugin_is_named_and_nothing_stands_in_its_way(op_type: str, named: bool, body: bool) -> None:
    model = frn_model(body=body or None, residual=op_type == ADD_OP_TYPE)
    if not named:
        del model.graph.node[0].attribute[:]
    before = model.SerializeToString()
    proto = TensorRTModel.read(model).prepared("plugin")
    [node] = proto.graph.node
    assert (node.domain, node.op_type, attributes(node)) == (DOMAIN, op_type, NODE_ATTRIBUTES)
    assert not proto.functions
    assert model.SerializeToString() == before


@pytest.mark.parametrize("body", [True, False], ids=["with body", "without body"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("op_type", OPERATORS)
def test_the_native_way_computes_the_same_under_a_name_that_no_plugin_has(op_type: str, dtype: str, body: bool) -> None:
    model = frn_model(dtype, body=body or None, residual=op_type == ADD_OP_TYPE)
    before = model.SerializeToString()
    read = TensorRTModel.read(model)
    assert read.half == (dtype != "float32")
    proto = read.prepared("native")
    assert model.SerializeToString() == before
    [node] = proto.graph.node
    name = BODIES[op_type]
    assert (node.op_type, attributes(node), [f.name for f in proto.functions]) == (name, {}, [name])
    assert proto.functions[0].node == function_proto(OPSET, op_type, half=read.half).node
    if dtype == "float32":
        onnx.checker.check_model(proto, full_check=True)
        x = np.random.default_rng(0).normal(size=(2, CHANNELS, 3, 5)).astype(np.float32)
        feeds = {INPUTS[0]: x} | ({RESIDUAL: x[::-1]} if op_type == ADD_OP_TYPE else {})
        with ReferenceRunner(proto) as runner:
            got = runner.infer(feeds)[OUTPUT]
        wanted = filter_response_norm(x, *frn_parameters().values(), feeds.get(RESIDUAL))
        np.testing.assert_allclose(got, wanted, **OP_FLOAT32.kwargs())


def test_the_body_that_the_file_brings_is_the_one_that_is_built() -> None:
    body = function_proto(OPSET)
    body.node[0].name = "of the file"
    [function] = TensorRTModel.read(frn_model(body=body)).prepared("native").functions
    assert function.node[0].name == "of the file"


@pytest.mark.parametrize("op_type", OPERATORS)
def test_of_our_body_for_maps_the_one_on_rows_is_built(op_type: str) -> None:
    """Through onnx_ir too, as an exported file has it. TensorRT makes 3 layers of that for maps, and 1 or 2 of this."""
    model = frn_model(body=True, residual=op_type == ADD_OP_TYPE)
    for file in (model, onnx_ir.to_proto(onnx_ir.from_proto(model))):
        assert "Reshape" not in {node.op_type for node in file.functions[0].node}
        [function] = TensorRTModel.read(file).prepared("native").functions
        assert function.node == function_proto(OPSET, op_type).node


def test_inputs_nodes_and_types_are_known() -> None:
    model = conv_frn_conv("float16", ("N", 16, "H", "W"), layers=2)
    model.graph.node[1].name = ""
    read = TensorRTModel.read(model)
    assert read.file.inputs == (TensorSpec("x", ("N", 16, "H", "W"), "float16"),)
    assert read.frn == ("node_of_frn0", "frn1")
    assert read.products == {f"conv{index}": Product("float16", frozenset({"float16"})) for index in range(3)}


def test_types_pass_through_layers_without_a_body() -> None:
    """MatMul's weight may come from another node: its type is then that of the activation, past an FRN."""
    model = conv_frn_conv("bfloat16", (2, 16, 8, 8))
    del model.functions[:]
    model.graph.node[2].input[1] = "computed"
    model.graph.node.append(onnx.helper.make_node("Identity", ["weight1"], ["computed"]))
    assert TensorRTModel.read(model).products["conv1"].dtype == "bfloat16"


def test_what_a_product_is_dequantized_from_is_known() -> None:
    """Past a cast and a pooling of it, too: behind both TensorRT puts them."""
    model = quantized(conv_frn_conv("float16", (2, 16, 8, 8)), onnx.TensorProto.INT8)
    conv = next(node for node in model.graph.node if node.name == "conv1")
    for source, op_type in ((conv.input[0], "MaxPool"), ("pooled", "Identity")):
        attributes = {"kernel_shape": [1, 1]} if op_type == "MaxPool" else {}
        model.graph.node.append(
            onnx.helper.make_node(op_type, [source], ["pooled" if attributes else "same"], **attributes)
        )
    conv.input[0] = "same"
    half = quantized(conv_frn_conv("float16", (2, 16, 8, 8)), onnx.TensorProto.FLOAT8E4M3FN, weights=False)
    assert TensorRTModel.read(model).products["conv1"] == Product("float16", frozenset({"int8"}))
    assert TensorRTModel.read(half).products["conv1"] == Product("float16", frozenset({"float8", "float16"}))


@pytest.mark.parametrize("way", ["plugin", "native"])
@pytest.mark.parametrize("op_type", OPERATORS)
def test_nodes_in_subgraphs_and_functions_go_the_same_way(op_type: str, way: Way) -> None:
    model = frn_model(body=True, residual=op_type == ADD_OP_TYPE)
    frn = model.graph.node[0]
    inner = onnx.NodeProto()
    inner.CopyFrom(frn)
    inner.output[0] = "inner"
    value = onnx.helper.make_tensor_value_info("inner", ELEMENT_TYPES["float32"], None)
    branch = onnx.helper.make_graph([inner], "branch", [], [value])
    condition = onnx.helper.make_tensor_value_info("condition", onnx.TensorProto.BOOL, ())
    model.graph.input.append(condition)
    model.graph.node.append(onnx.helper.make_node("If", ["condition"], ["z"], then_branch=branch, else_branch=branch))
    model.functions.append(
        onnx.helper.make_function(
            "other", "Block", OPERATORS[op_type], ["Y"], [frn], [onnx.helper.make_opsetid(DOMAIN, 1)]
        )
    )
    read = TensorRTModel.read(model)
    assert len(read.frn) == 4
    proto = read.prepared(way)
    conditional, block = proto.graph.node[-1], next(f for f in proto.functions if f.name == "Block")
    graphs = [proto.graph, *(a.g for a in conditional.attribute), block]
    nodes = [node for graph in graphs for node in graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in nodes] == [op_type if way == "plugin" else BODIES[op_type]] * 4
    assert all(attributes(node) == (NODE_ATTRIBUTES if way == "plugin" else {}) for node in nodes)


def test_a_model_without_frn_passes_as_it_is() -> None:
    model = conv_frn_conv("float32", (2, 16, 8, 8), layers=0)
    del model.functions[:]
    read = TensorRTModel.read(model)
    assert read.frn == ()
    assert read.prepared("native") == model


Change = Callable[[onnx.NodeProto], object]


def changed(change: Change) -> Callable[[], onnx.ModelProto]:
    """A maker of our model with its node changed."""

    def make() -> onnx.ModelProto:
        model = frn_model(body=True)
        change(model.graph.node[0])
        return model

    return make


def _version(node: onnx.NodeProto) -> None:
    node.attribute[1].s = b"2"


def _left_out(node: onnx.NodeProto) -> None:
    node.input[3] = ""


def _short_gamma() -> onnx.ModelProto:
    return frn_model(body=True, parameters=frn_parameters() | {"gamma": np.ones(3, np.float32)})


def _rewritten() -> onnx.ModelProto:
    model = frn_model(body=True)
    onnx.helper.set_model_props(model, {METADATA_CPU: "{}"})
    return model


def _no_nodes() -> onnx.ModelProto:
    model = frn_model(body=True)
    model.graph.node.pop()
    return model


attribute = onnx.helper.make_attribute

REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "an epsilon of another exporter": (
        changed(lambda node: node.attribute.append(attribute("epsilon", 1))),
        rf"has an attribute that {DOMAIN}::{OP_TYPE} does not have. Got epsilon; expected eps .* as inputs",
    ),
    "a newer plugin": (
        changed(_version),
        r"names another plugin than ours. Got plugin_version = '2'; expected 1",
    ),
    "a plugin version that is no text": (
        changed(lambda node: node.attribute[1].CopyFrom(attribute("plugin_version", 1))),
        r"names another plugin than ours. Got plugin_version = 1",
    ),
    "four inputs": (changed(lambda node: node.input.pop()), "does not have the inputs"),
    "six inputs": (changed(lambda node: node.input.append("eps")), "does not have the inputs"),
    "an input left out": (changed(_left_out), "does not have the inputs.*none of them left out"),
    "two outputs": (changed(lambda node: node.output.append("z")), "does not have the inputs"),
    "one axis": (
        lambda: frn_model(body=True, shape=(CHANNELS,)),
        "X has too few axes. Got 1; expected samples, channels",
    ),
    "too few gammas": (_short_gamma, r"gamma does not fit the channels of X. Got \[3\]; expected \[4\]"),
    "float64": (lambda: frn_model("float64", body=True), "TensorRT has no float64"),
    "rewritten for a processor": (_rewritten, "was rewritten for ONNX Runtime on a processor"),
    "no nodes": (_no_nodes, "without nodes"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_tensorrt_would_trip_over_is_refused_before(
    make: Callable[[], onnx.ModelProto], message: str, tmp_path: Path
) -> None:
    model = make()
    onnx.save(model, tmp_path / "model.onnx")
    for form in (model, tmp_path / "model.onnx"):
        with pytest.raises(ModelError, match=message):
            TensorRTModel.read(form)


@pytest.mark.parametrize("way", ["plugin", "native"])
def test_another_function_of_the_name_is_refused(way: Way) -> None:
    """TensorRT finds functions by name only, and would compile the wrong one without a word."""
    model = frn_model(body=True)
    other = function_proto(OPSET)
    other.domain = "other"
    model.functions.insert(0, other)
    with pytest.raises(ModelError, match=f"TensorRT finds functions by name only. Got other::{OP_TYPE}"):
        TensorRTModel.read(model).prepared(way)


def test_an_opset_that_is_too_old_for_our_body_goes_the_way_of_the_plugin_alone() -> None:
    model = frn_model()
    model.opset_import[0].version = 13
    read = TensorRTModel.read(model)
    assert len(read.prepared("plugin").graph.node) == 1
    with pytest.raises(
        ModelError, match=r"brings no function body, and its opset is too old.*Got opset 13; expected 18"
    ):
        read.prepared("native")
