from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from graphs import CHANNELS, OPSET, frn_model, frn_parameters, one_node
from tolerances import EXACT

from deploynorm.contract import DOMAIN, INPUTS, OP_TYPE
from deploynorm.errors import InputError, ModelError
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


def test_a_file_with_external_data_runs(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(frn_model(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    with ReferenceRunner(path) as runner:
        np.testing.assert_allclose(runner.infer({"X": X})["Y"], definition(), **EXACT.kwargs())
    (tmp_path / "model.data").unlink()
    with pytest.raises(ModelError, match=r"external data cannot be read.*Fix: keep the data file beside the model"):
        ReferenceRunner(path)


UNREADABLE = {
    "text": b"this is not a model" * 20,
    "cut short": frn_model().SerializeToString()[:-40],
    "empty": b"",
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_is_no_model_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.onnx: not an ONNX file, or cut short") as caught:
        ReferenceRunner(str(path))
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx: no such file"):
        ReferenceRunner(tmp_path / "none.onnx")


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


def test_feeds_are_checked_and_a_closed_runner_says_so() -> None:
    with ReferenceRunner(frn_model()) as runner, pytest.raises(InputError, match="wrong dtype"):
        runner.infer({"X": X.astype(np.float64)})
    with pytest.raises(InputError, match="the runner is closed"):
        runner.infer({"X": X})
