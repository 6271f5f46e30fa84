"""A model as TensorRT is to get it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest
from graphs import CHANNELS, ELEMENT_TYPES, OPSET, frn_model, frn_parameters
from rtx_builds import conv_frn_conv
from tolerances import OP_FLOAT32

from deploynorm.contract import DOMAIN, INPUTS, METADATA_CPU, NODE_ATTRIBUTES, OP_TYPE, OUTPUT
from deploynorm.errors import ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.lowering import function_proto
from deploynorm.reference import filter_response_norm
from deploynorm.run.reference import ReferenceRunner
from deploynorm.trt.model import BODY, TensorRTModel
from deploynorm.trt.settings import Way


def with_body(dtype: str = "float32") -> onnx.ModelProto:
    return frn_model(dtype, body=function_proto(OPSET, half=dtype in ("float16", "bfloat16")))


def attributes(node: onnx.NodeProto) -> dict[str, str]:
    return {attribute.name: attribute.s.decode() for attribute in node.attribute}


@pytest.mark.parametrize("body", [True, False], ids=["with body", "without body"])
def test_the_plugin_is_named_and_nothing_stands_in_its_way(body: bool) -> None:
    proto = TensorRTModel.read(with_body() if body else frn_model()).prepared("plugin")
    [node] = proto.graph.node
    assert (node.domain, node.op_type, attributes(node)) == (DOMAIN, OP_TYPE, NODE_ATTRIBUTES)
    assert not proto.functions


def test_a_node_that_does_not_name_the_plugin_gets_its_name() -> None:
    model = with_body()
    del model.graph.node[0].attribute[:]
    [node] = TensorRTModel.read(model).prepared("plugin").graph.node
    assert attributes(node) == NODE_ATTRIBUTES


@pytest.mark.parametrize("body", [True, False], ids=["with body", "without body"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_native_way_computes_the_same_under_a_name_that_no_plugin_has(dtype: str, body: bool) -> None:
    model = with_body(dtype) if body else frn_model(dtype)
    read = TensorRTModel.read(model)
    assert read.half == (dtype != "float32")
    proto = read.prepared("native")
    [node] = proto.graph.node
    assert (node.op_type, attributes(node), [f.name for f in proto.functions]) == (BODY, {}, [BODY])
    assert proto.functions[0].node == function_proto(OPSET, half=read.half).node
    if dtype == "float32":
        onnx.checker.check_model(proto, full_check=True)
        x = np.random.default_rng(0).normal(size=(2, CHANNELS, 3, 5)).astype(np.float32)
        with ReferenceRunner(proto) as runner:
            got = runner.infer({INPUTS[0]: x})[OUTPUT]
        np.testing.assert_allclose(got, filter_response_norm(x, *frn_parameters().values()), **OP_FLOAT32.kwargs())


def test_the_body_that_the_file_brings_is_the_one_that_is_built() -> None:
    body = function_proto(OPSET)
    body.node[0].name = "of the file"
    [function] = TensorRTModel.read(frn_model(body=body)).prepared("native").functions
    assert function.node[0].name == "of the file"


@pytest.mark.parametrize("way", ["plugin", "native"])
def test_reading_and_preparing_leave_the_model_as_it_is(way: Way) -> None:
    model = with_body()
    before = model.SerializeToString()
    TensorRTModel.read(model).prepared(way)
    assert model.SerializeToString() == before


def test_inputs_nodes_and_types_are_known() -> None:
    model = conv_frn_conv("float16", ("N", 16, "H", "W"), layers=2)
    model.graph.node[1].name = ""
    read = TensorRTModel.read(model)
    assert read.file.inputs == (TensorSpec("x", ("N", 16, "H", "W"), "float16"),)
    assert read.frn == ("node_of_frn0", "frn1")
    assert read.products == {"conv0": "float16", "conv1": "float16", "conv2": "float16"}


def test_types_pass_through_layers_without_a_body() -> None:
    """MatMul's weight may come from another node: its type is then that of the activation, past an FRN."""
    model = conv_frn_conv("bfloat16", (2, 16, 8, 8))
    del model.functions[:]
    model.graph.node[2].input[1] = "computed"
    model.graph.node.append(onnx.helper.make_node("Identity", ["weight1"], ["computed"]))
    assert TensorRTModel.read(model).products["conv1"] == "bfloat16"


@pytest.mark.parametrize("way", ["plugin", "native"])
def test_nodes_in_subgraphs_and_functions_go_the_same_way(way: Way) -> None:
    model = with_body()
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
        onnx.helper.make_function("other", "Block", INPUTS, ["Y"], [frn], [onnx.helper.make_opsetid(DOMAIN, 1)])
    )
    read = TensorRTModel.read(model)
    assert len(read.frn) == 4
    proto = read.prepared(way)
    conditional, block = proto.graph.node[1], next(f for f in proto.functions if f.name == "Block")
    nodes = [proto.graph.node[0], *(a.g.node[0] for a in conditional.attribute), block.node[0]]
    assert {node.op_type for node in nodes} == {OP_TYPE if way == "plugin" else BODY}
    assert all(attributes(node) == (NODE_ATTRIBUTES if way == "plugin" else {}) for node in nodes)


def test_a_model_without_frn_passes_as_it_is() -> None:
    model = conv_frn_conv("float32", (2, 16, 8, 8), layers=0)
    del model.functions[:]
    read = TensorRTModel.read(model)
    assert read.frn == ()
    assert read.prepared("native") == model


Change = Callable[[onnx.ModelProto], object]


def changed(change: Change, model: onnx.ModelProto | None = None) -> onnx.ModelProto:
    model = with_body() if model is None else model
    change(model)
    return model


def node_of(model: onnx.ModelProto) -> onnx.NodeProto:
    return model.graph.node[0]


def _attribute(name: str, value: object) -> Change:
    return lambda model: node_of(model).attribute.append(onnx.helper.make_attribute(name, value))


def _version(model: onnx.ModelProto) -> None:
    node_of(model).attribute[1].s = b"2"


def _set_input(index: int, name: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        node_of(model).input[index] = name

    return change


def _short_gamma(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones(3, np.float32), "gamma"))


def _rewritten(model: onnx.ModelProto) -> None:
    onnx.helper.set_model_props(model, {METADATA_CPU: "{}"})


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "an epsilon of another exporter": (
        lambda: changed(_attribute("epsilon", 1)),
        rf"has an attribute that {DOMAIN}::{OP_TYPE} does not have. Got epsilon; expected eps .* as inputs",
    ),
    "a newer plugin": (
        lambda: changed(_version),
        r"names another plugin than ours. Got plugin_version = '2'; expected 1",
    ),
    "a plugin version that is no text": (
        lambda: changed(
            lambda model: node_of(model).attribute[1].CopyFrom(onnx.helper.make_attribute("plugin_version", 1))
        ),
        r"names another plugin than ours. Got plugin_version = 1",
    ),
    "four inputs": (lambda: changed(lambda model: node_of(model).input.pop()), "does not have the inputs"),
    "six inputs": (lambda: changed(lambda model: node_of(model).input.append("eps")), "does not have the inputs"),
    "an input left out": (lambda: changed(_set_input(3, "")), "does not have the inputs.*none of them left out"),
    "two outputs": (lambda: changed(lambda model: node_of(model).output.append("z")), "does not have the inputs"),
    "one axis": (
        lambda: frn_model(body=function_proto(OPSET), shape=(CHANNELS,)),
        "X has too few axes. Got 1; expected samples, channels",
    ),
    "too few gammas": (
        lambda: changed(_short_gamma),
        r"gamma does not fit the channels of X. Got \[3\]; expected \[4\]",
    ),
    "float64": (lambda: with_body("float64"), "TensorRT has no float64"),
    "rewritten for a processor": (lambda: changed(_rewritten), "was rewritten for ONNX Runtime on a processor"),
    "no nodes": (lambda: changed(lambda model: model.graph.node.pop()), "without nodes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_tensorrt_would_trip_over_is_refused_before(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    model = make()
    onnx.save(model, tmp_path / "model.onnx")
    for form in (model, tmp_path / "model.onnx"):
        with pytest.raises(ModelError, match=message):
            TensorRTModel.read(form)


@pytest.mark.parametrize("way", ["plugin", "native"])
def test_another_function_of_the_name_is_refused(way: Way) -> None:
    """TensorRT finds functions by name only, and would compile the wrong one without a word."""
    model = with_body()
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


@pytest.mark.parametrize(
    "content", [b"", b"not protobuf", with_body().SerializeToString()[:-40]], ids=["empty", "text", "cut"]
)
def test_files_that_are_not_onnx_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ModelError, match=r"model\.onnx: no such file"):
        TensorRTModel.read(path)
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx: not an ONNX file, or cut short"):
        TensorRTModel.read(path)
