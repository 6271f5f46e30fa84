"""`deploynorm.gs`: what a file loses on its way through onnx-graphsurgeon is put back, and FRN is one call."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
from graphs import frn_model

import deploynorm.gs
from deploynorm import reference
from deploynorm.contract import ADD_OP_TYPE, OP_TYPE
from deploynorm.errors import DeployNormError, InputError, ModelError
from deploynorm.gs import surgery
from deploynorm.onnx_file import OnnxFile
from deploynorm.rewrite.graphsurgeon import Operation
from deploynorm.run.onnxruntime import OnnxRuntimeRunner

C = 4
RELU = "y = Relu (x)"
LOOSE = "s = Mul (x, x) m = ReduceMean (s, axes) v = Add (m, eps) r = Sqrt (v) u = Div (x, r) y = Mul (u, g)"
CONSTANTS = "<int64[2] axes = {2, 3}, float eps = {0.5}, float[4, 1, 1] g = {1, 2, 3, 4}>"


@pytest.fixture(autouse=True)
def _needs(require: Callable[[str], None]) -> None:
    require("graphsurgeon")
    require("ort")


def _model(
    nodes: str = RELU, more: str = "", kind: str = "float", inputs: str = "", opset: int = 20
) -> onnx.ModelProto:
    maps = f"{kind}[N, {C}, H, W]"
    return onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["": {opset}, "other": 1]> '
        f"net ({maps} x{inputs}) => ({maps} y) {more} {{ {nodes} }}"
    )


def _operated(model: onnx.ModelProto, change: Callable[[Any], object] = lambda graph: None) -> tuple[ir.Model, bool]:
    operation = Operation(OnnxFile.read(model).to_ir())
    change(operation.graph)
    return operation.result()


def _infer(model: onnx.ModelProto | ir.Model | Path, **feeds: np.ndarray) -> np.ndarray:
    if isinstance(model, ir.Model):
        model = ir.to_proto(model)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    with OnnxRuntimeRunner(source, plugins=[]) as runner:
        return runner.infer(feeds)["y"]


def _notes(model: onnx.ModelProto) -> None:
    model.doc_string, model.domain, model.model_version = "a model", "net.example", 7
    model.graph.doc_string = "a graph"
    model.metadata_props.add(key="labels", value="bag, boot")
    model.graph.metadata_props.add(key="of", value="a graph")
    for message in (model.graph.input[0], model.graph.node[0]):
        message.doc_string = "a doc"
        message.metadata_props.add(key="of", value="a message")
    model.graph.input[0].type.denotation = "IMAGE"
    annotation = model.graph.quantization_annotation.add(tensor_name="y")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="x")


def _function(model: onnx.ModelProto) -> None:
    nodes = [onnx.helper.make_node("Neg", ["a"], ["b"])]
    info = [onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, None)]
    opsets = [onnx.helper.make_opsetid("", 20)]
    made = onnx.helper.make_function("other", "F", ["a"], ["b"], nodes, opsets, overload="v1", value_info=info)
    made.metadata_props.add(key="of", value="a function")
    model.functions.append(made)
    model.graph.node[0].overload = "v1"


def _attributes(model: onnx.ModelProto) -> None:
    makes = onnx.helper.make_attribute
    tensor, kind = onnx.helper.make_tensor("t", 1, [1], [1.0]), onnx.helper.make_tensor_type_proto(1, [2])
    given = {"type": kind, "tensors": [tensor], "tensor": tensor, "text": "text", "texts": ["a"], "floats": [1.5]}
    model.graph.node[0].attribute.extend(makes(name, value) for name, value in given.items())
    model.graph.node[0].attribute.add(name="no_numbers", type=onnx.AttributeProto.INTS, doc_string="a doc")
    model.graph.node[0].attribute[-2].doc_string = "a doc"


def _types(model: onnx.ModelProto) -> None:
    tensor = onnx.helper.make_tensor_type_proto(1, [2])
    for name, kind in {
        "optional": onnx.helper.make_optional_type_proto(tensor),
        "sequence": onnx.helper.make_sequence_type_proto(tensor),
        "sparse": onnx.helper.make_sparse_tensor_type_proto(1, [2]),
    }.items():
        model.graph.input.append(onnx.helper.make_value_info(name, kind))


def _branches(model: onnx.ModelProto) -> None:
    """Weights of one name in both, and one of the graph around."""
    branches = {}
    for name, numbers in {"then_branch": "{1, 2, 3, 4}", "else_branch": "{5, 6, 7, 8}"}.items():
        text = f"b () => (float[N, 4, H, W] z) <float[4, 1, 1] w = {numbers}> {{ k = Mul (x, w) z = Add (k, g) }}"
        branches[name] = onnx.parser.parse_graph(text)
        branches[name].node[0].metadata_props.add(key="of", value=name)
    model.graph.node.append(onnx.helper.make_node("If", ["yes"], ["b"], **branches))
    model.graph.node.append(onnx.helper.make_node("Mul", ["b", "g"], ["y"]))


KEPT: dict[str, tuple[str, str, str, Callable[[onnx.ModelProto], None]]] = {
    "notes": (RELU, "", "", _notes),
    "an input with a value": (LOOSE, CONSTANTS, ", int64[2] axes", lambda model: None),
    "functions": ("y = other.F (x)", "", "", _function),
    "attributes": ("y = other.F (x)", "", "", _attributes),
    "types": (RELU, "", "", _types),
    "branches": ("", "<float[4, 1, 1] g = {1, 2, 3, 4}>", ", bool yes", _branches),
    "shapes": (
        "t, k = Split <num_outputs = 2, axis = 0> (x) y = Concat <axis = 0> (k, t)",
        f"<float[half, {C}, H, W] t>",
        "",
        lambda model: None,
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_nothing_is_lost(name: str) -> None:
    nodes, constants, inputs, change = KEPT[name]
    model = _model(nodes, constants, inputs=inputs)
    change(model)
    before = model.SerializeToString()
    result, changed = _operated(model)
    assert not changed
    assert model.SerializeToString() == before
    result, changed = _operated(model, _with_another_output)
    assert changed
    written, expected = ir.to_proto(result), ir.to_proto(ir.from_proto(model))
    del written.graph.node[-1], written.graph.output[-1]
    assert _ordered(written) == _ordered(expected)


def _ordered(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the shapes of weights, which onnx_ir adds, its weights and shapes by their names."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    for field, items in (
        (graph.initializer, list(graph.initializer)),
        (graph.value_info, [info for info in graph.value_info if info.name not in weights]),
    ):
        del field[:]
        field.extend(sorted(items, key=_name))
    return model


def _name(message: Any) -> str:
    return str(message.name)


def _with_another_output(graph: Any) -> None:
    import onnx_graphsurgeon as gs

    graph.outputs.append(gs.Variable("more", np.float32, ["N", C, "H", "W"]))
    graph.nodes.append(gs.Node("Neg", inputs=[graph.inputs[0]], outputs=graph.outputs[-1:]))


def test_an_attribute_that_is_not_text_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    model = _model("y = other.F (x)")
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("bytes", b"\xff\xfe"))
    result, changed = _operated(model)
    assert not changed
    assert ir.to_proto(result).graph.node[0].attribute[0].s == b"\xff\xfe"


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float8_e4m3fn", "int4", "uint4", "float4_e2m1fn", "int2", "bool", "uint64"]
)
@pytest.mark.parametrize("size", [3, 5000], ids=["small", "large"])
def test_a_weight_that_is_read_keeps_its_type_and_values(dtype: str, size: int) -> None:
    array = (np.arange(size) % 2).astype(getattr(ml_dtypes, dtype, dtype))
    model = _model("k = Cast <to = 1> (w) y = Relu (x)")
    model.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, [size]))
    seen = []
    result, _ = _operated(model, lambda graph: seen.append(graph.tensors()["w"].values))
    np.testing.assert_array_equal(seen[0].astype(int), array.astype(int))
    weight = result.graph.initializers["w"].const_value
    assert weight is not None
    assert weight.dtype == ir.DataType(model.graph.initializer[0].data_type)
    np.testing.assert_array_equal(weight.numpy().astype(int), array.astype(int))


def test_a_changed_weight_is_written_and_one_of_another_file_stays_there_until_then(tmp_path: Path) -> None:
    model = _model("k = Add (x, w) y = Mul (k, v)")
    for name in "wv":
        array = np.arange(C * 500, dtype=np.float32).reshape(1, C, 1, 500)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    folder = tmp_path / "far"
    folder.mkdir()
    onnx.save(model, folder / "net.onnx", save_as_external_data=True, location="net.data")
    with surgery(folder / "net.onnx", tmp_path / "new.onnx") as graph:
        graph.tensors()["w"].values *= 2
    x = np.ones((2, C, 3, 500), np.float32)
    np.testing.assert_array_equal(_infer(tmp_path / "new.onnx", x=x), (x + 2 * array) * array)
    assert not (tmp_path / "new.onnx.data").exists()


TYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}


def _frn(graph: Any, **given: Any) -> None:
    """Puts FRN in the place of LOOSE, with constants of the graph as they stand there."""
    tensors = graph.tensors()
    arguments = {"gamma": tensors.get("g", 1), "beta": 0.25, "tau": -np.inf, "eps": tensors.get("eps", 0.5)} | given
    graph.frn(graph.inputs[0], **arguments, output=tensors["y"])


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("kind", TYPES)
def test_frn_is_one_node_with_its_body(kind: str, opset: int) -> None:
    nodes, constants = (LOOSE, CONSTANTS) if kind == "float" and opset == 20 else ("k = Neg (x) y = Neg (k)", "")
    result, changed = _operated(_model(nodes, constants, kind=kind, opset=opset), _frn)
    assert changed
    assert [node.op_type for node in result.graph] == [OP_TYPE]
    x = np.random.default_rng(0).normal(size=(2, C, 5, 3)).astype(TYPES[kind]) * 3
    got = _infer(result, x=x)
    wide = np.float64 if kind == "double" else np.float32
    gamma = np.arange(1, C + 1, dtype=wide) if constants else np.ones(C, wide)
    rest = (np.full(C, number, wide) for number in (0.25, -np.inf, 0.5))
    want = reference.filter_response_norm(x, gamma, *rest)
    np.testing.assert_allclose(
        got.astype(float), want.astype(float), rtol=2e-3 if kind == "float16" else 1e-6, atol=1e-6
    )


def test_a_residual_and_a_new_tensor() -> None:
    def change(graph: Any) -> None:
        x = graph.inputs[0]
        new = graph.frn(x, 1, np.arange(C), 0, 1e-3, residual=x)
        assert new.name == "x_frn"
        graph.nodes[0].inputs[0] = new

    result, _ = _operated(_model("y = Neg (x)"), change)
    assert [node.op_type for node in result.graph] == [ADD_OP_TYPE, "Neg"]
    x = np.random.default_rng(0).normal(size=(2, C, 5, 3)).astype(np.float32)
    parameters = (np.full(C, 1.0, np.float32), np.arange(C), np.zeros(C), np.full(C, 1e-3))
    want = -reference.filter_response_norm(x, *parameters, residual=x)
    np.testing.assert_allclose(_infer(result, x=x), want, rtol=1e-5, atol=1e-6)


def test_parameters_that_are_shared_are_copied() -> None:
    def change(graph: Any) -> None:
        _frn(graph)
        graph.tensors()["y_gamma"].values[:] = 0

    model = _model(f"{LOOSE} z = Mul (x, g)", CONSTANTS)
    model.graph.output.add().CopyFrom(model.graph.output[0])
    model.graph.output[1].name = "z"
    result, _ = _operated(model, change)
    weights = {name: value.const_value for name, value in result.graph.initializers.items()}
    assert weights["g"].numpy().any()
    assert not weights["y_gamma"].numpy().any()


def test_another_output_of_the_node_keeps_its_place() -> None:
    model = _model("k, y = Split <num_outputs = 2, axis = 2> (x)")
    model.graph.output.add(name="k").type.CopyFrom(model.graph.output[0].type)
    result, _ = _operated(model, _frn)
    split = next(node for node in result.graph if node.op_type == "Split")
    assert split.outputs[0].name == "k"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "eps": ({"eps": 0}, "eps is out of range. Expected greater than 0"),
    "NaN": ({"tau": np.nan}, "tau is out of range"),
    "channels": ({"beta": np.zeros(3)}, "beta is not one number for each channel. Got 3; expected 4"),
    "map": ({"beta": np.zeros((C, C))}, "more axes than that of the channels"),
    "text": ({"gamma": "one"}, "gamma is no number"),
    "residual": ({"residual": "x"}, "residual is no tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_parameters_are_refused(name: str) -> None:
    given, problem = WRONG[name]
    with pytest.raises(InputError, match=problem):
        _operated(_model(LOOSE, CONSTANTS), lambda graph: _frn(graph, **given))


WRONG_TENSORS = {
    "not constant": (lambda g, x, y: g.frn(x, y, 0, 0, 1), "gamma .y. is not constant"),
    "from itself": (lambda g, x, y: g.frn(x, 1, 0, 0, 1, output=x), "computed from itself"),
    "type": (lambda g, x, y: setattr(x, "dtype", None) or g.frn(x, 1, 0, 0, 1), "Got unknown; expected x.dtype"),
    "rank": (lambda g, x, y: setattr(x, "shape", [3]) or g.frn(x, 1, 0, 0, 1), "no channels"),
    "size": (lambda g, x, y: setattr(x, "shape", None) or g.frn(x, 1, 0, 0, 1), "number of channels of x is not known"),
    "residual": (lambda g, x, y: setattr(y, "dtype", np.float64) or g.frn(x, 1, 0, 0, 1, residual=y), "type and shape"),
    "shape": (lambda g, x, y: setattr(y, "shape", [1, C, 1]) or g.frn(x, 1, 0, 0, 1, residual=y), "type and shape"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors_are_refused(name: str) -> None:
    call, problem = WRONG_TENSORS[name]
    with pytest.raises(InputError, match=problem):
        _operated(_model(), lambda graph: call(graph, graph.inputs[0], graph.outputs[0]))


def _cycle(graph: Any) -> None:
    graph.nodes[1].inputs[0] = graph.nodes[-1].outputs[0]


def _twice(graph: Any) -> None:
    graph.nodes[1].outputs[0].name = graph.nodes[0].outputs[0].name


def _missing(graph: Any) -> None:
    graph.nodes.pop(0)


@pytest.mark.parametrize("change", [_cycle, _twice, _missing])
def test_what_is_no_graph_any_more_is_refused(change: Callable[[Any], None], tmp_path: Path) -> None:
    onnx.save(_model(LOOSE, CONSTANTS), tmp_path / "net.onnx")
    with (
        pytest.raises(ModelError, match="surgery: the graph is not valid any more"),
        surgery(tmp_path / "net.onnx", tmp_path / "new.onnx") as graph,
    ):
        change(graph)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_an_exception_goes_on_and_nothing_is_written(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "net.onnx")
    with pytest.raises(FileNotFoundError), surgery(tmp_path / "net.onnx", tmp_path / "new.onnx"):
        (tmp_path / "gone").read_text()
    with pytest.raises(InputError, match="MODEL itself"), surgery(tmp_path / "net.onnx", tmp_path / "net.onnx"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_a_long_graph_that_is_not_sorted() -> None:
    """onnx-graphsurgeon's own sort recurses too deep here."""
    count = 3000
    names = ["x", *(f"v{i}" for i in range(count - 1)), "y"]
    model = _model()
    del model.graph.node[:]
    model.graph.node.extend(onnx.helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names))
    result, _ = _operated(model, lambda graph: graph.nodes.reverse())
    assert [node.outputs[0].name for node in result.graph] == names[1:]


def test_a_body_of_ours_stays_with_its_node() -> None:
    result, changed = _operated(frn_model(body=True))
    assert not changed
    assert [function.name for function in result.functions.values()] == [OP_TYPE]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    onnx.save(_model(), tmp_path / "net.onnx")
    with (
        pytest.raises(DeployNormError, match=r"pip install 'deploynorm\[surgery\]'"),
        deploynorm.gs.surgery(tmp_path / "net.onnx", tmp_path / "new.onnx"),
    ):
        pass
