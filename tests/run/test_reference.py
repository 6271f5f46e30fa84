from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import pytest
from graphs import CHANNELS, OPSET, frn_model, frn_parameters, one_node
from tolerances import EXACT

from deploynorm.contract import DOMAIN, INPUTS, OP_TYPE
from deploynorm.errors import ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.reference import filter_response_norm
from deploynorm.run.reference import ReferenceRunner

X = np.random.default_rng(0).normal(size=(2, CHANNELS, 3, 5)).astype(np.float32)
NEGATION = onnx.parser.parse_function(
    f'<opset_import: ["": {OPSET}], domain: "{DOMAIN}"> {OP_TYPE} ({", ".join(INPUTS)}) => (Y) {{ Y = Neg (X) }}'
)
"""A body that is wrong on purpose, to tell who ran."""


def definition() -> np.ndarray:
    return filter_response_norm(X, *frn_parameters().values())


WHO_RUNS = {
    "a body": (NEGATION, True, lambda: -X),
    "a body that is not wanted": (NEGATION, False, definition),
    "no body": (None, True, definition),
}


@pytest.mark.parametrize(("body", "use_function", "want"), WHO_RUNS.values(), ids=WHO_RUNS)
def test_the_models_own_body_runs_where_there_is_one_and_it_is_wanted(
    body: onnx.FunctionProto | None, use_function: bool, want: Callable[[], np.ndarray]
) -> None:
    with ReferenceRunner(frn_model(body=body), use_function=use_function) as runner:
        got = runner.infer({"X": X})
    assert list(got) == ["Y"] == list(runner.output_names)
    np.testing.assert_allclose(got["Y"], want(), **EXACT.kwargs())


def test_half_arithmetic_is_half_arithmetic() -> None:
    model = one_node("Mul", {"a": ("float16", (1,)), "b": ("float16", (1,))}, ("float16", (1,)))
    feed = np.array([300.0], np.float16)
    with ReferenceRunner(model) as runner:
        assert runner.infer({"a": feed, "b": feed})["y"].tolist() == [np.inf]


def test_inputs_are_those_of_the_graph_without_its_constants() -> None:
    with ReferenceRunner(frn_model("bfloat16")) as runner:
        assert runner.inputs == (TensorSpec("X", ("N", CHANNELS, "H", "W"), "bfloat16"),)
    model = frn_model()
    model.graph.input.append(onnx.helper.make_tensor_value_info("gamma", onnx.TensorProto.FLOAT, (CHANNELS,)))
    with ReferenceRunner(model) as runner:
        assert [spec.name for spec in runner.inputs] == ["X"]


def test_a_size_without_a_name_is_free() -> None:
    model = one_node("Add", {"a": ("float32", (None, 1)), "b": ("float32", (1, None))}, ("float32", (None, None)))
    with ReferenceRunner(model) as runner:
        got = runner.infer({"a": np.ones((2, 1), np.float32), "b": np.ones((1, 3), np.float32)})
    assert got["y"].shape == (2, 3)


UNRUNNABLE = {
    "unknown operator": (
        one_node("Nonsense", {"x": ("float32", (1,))}, ("float32", (1,))),
        "reference evaluator refuses the model: .*Nonsense",
    ),
    "no shape": (one_node("Neg", {"x": ("float32", None)}, ("float32", None)), "'x' is not a numeric tensor of known"),
}


@pytest.mark.parametrize(("model", "message"), UNRUNNABLE.values(), ids=UNRUNNABLE)
def test_a_model_that_cannot_be_run_is_refused(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ReferenceRunner(model)


def test_a_failure_of_the_evaluator_is_reported_with_the_shapes() -> None:
    model = one_node("Add", {"a": ("float32", ("A",)), "b": ("float32", ("B",))}, ("float32", ("C",)))
    with (
        ReferenceRunner(model) as runner,
        pytest.raises(ModelError, match=r"failed with TypeError: .*'Add'.*Got .*'a': \(2,\)"),
    ):
        runner.infer({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)})
