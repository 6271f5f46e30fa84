"""What is OpenVINO's own among the runners, and our extension in code that has no deploynorm around it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from cases import ADD_CASES, CASES, NormCase, make_inputs, tolerance, want
from graphs import CHANNELS, frn_model, frn_parameters, one_node
from tolerances import EXACT, OP_FLOAT32

import deploynorm
from deploynorm.contract import OUTPUT, PARAMETERS
from deploynorm.errors import BackendError, ModelError
from deploynorm.reference import filter_response_norm
from deploynorm.run.openvino import OpenVinoRunner

X = np.random.default_rng(0).normal(size=(2, CHANNELS, 3, 5)).astype(np.float32)


@pytest.fixture(autouse=True)
def _installed(require: Callable[[str], None]) -> None:
    require("openvino")


@pytest.mark.parametrize("body", [True, None], ids=["body", "no_body"])
@pytest.mark.parametrize("sizes", [("N", CHANNELS, "H", "W"), X.shape], ids=["free", "fixed"])
def test_a_core_reads_our_file_by_the_extension(sizes: tuple[int | str, ...], body: Any, tmp_path: Path) -> None:
    import openvino

    path = tmp_path / "model.onnx"
    onnx.save(frn_model(body=body, shape=sizes), path)
    core = openvino.Core()
    with pytest.raises(Exception, match="FilterResponseNormalization"):
        core.read_model(path)
    core.add_extension(deploynorm.openvino_extension())
    got = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([X])[0]
    np.testing.assert_allclose(got, filter_response_norm(X, *frn_parameters().values()), **OP_FLOAT32.kwargs())


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 7), (4, 3, 5, 6), (4, 3, 2, 3, 4)], ids=str)
def test_each_channel_has_its_own_epsilon(shape: tuple[int, ...]) -> None:
    """Of a mean over (N, C, L) OpenVINO fuses the addition that follows, with another axis than that of channels."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values = ([1, 0.5, 2], [0, 1, -1], [-np.inf, 0, -0.5], [0.1, 0.5, 2])
    parameters = {name: np.array(value, np.float32) for name, value in zip(PARAMETERS, values, strict=True)}
    with OpenVinoRunner(frn_model(parameters=parameters, shape=shape)) as runner:
        got = runner.infer({"X": x})["Y"]
    np.testing.assert_allclose(got, filter_response_norm(x, *parameters.values()), **OP_FLOAT32.kwargs())


@pytest.mark.parametrize(
    "case", [case for case in (*CASES, *ADD_CASES) if case.dtype == "bfloat16" and "plain" in case.name], ids=str
)
def test_bfloat16_goes_in_and_out(case: NormCase) -> None:
    inputs = make_inputs(case)
    parameters = {name: inputs.pop(name) for name in PARAMETERS}
    model = frn_model(case.dtype, parameters=parameters, shape=case.shape, residual=case.residual)
    with OpenVinoRunner(model) as runner:
        got = runner.infer(inputs)[OUTPUT]
    assert got.dtype.name == case.dtype
    np.testing.assert_allclose(got.astype(np.float64), want(case), **tolerance(case).kwargs())


def test_float32_is_computed_in_float32() -> None:
    """2^-20 is lost in bfloat16, which OpenVINO takes by itself where the processor has it."""
    model = one_node("MatMul", {"a": ("float32", (64, 64)), "b": ("float32", (64, 64))}, ("float32", (64, 64)))
    a = np.full((64, 64), 1 + 2.0**-20, np.float32)
    with OpenVinoRunner(model, threads=1) as runner:
        np.testing.assert_allclose(runner.infer({"a": a, "b": np.eye(64, dtype=np.float32)})["y"], a, **EXACT.kwargs())


def test_an_output_is_not_changed_by_the_next_call() -> None:
    with OpenVinoRunner(frn_model()) as runner:
        first = runner.infer({"X": X})["Y"]
        kept = first.copy()
        runner.infer({"X": 1 - X})
    np.testing.assert_allclose(first, kept, **EXACT.kwargs())


REFUSED = {
    "an operator that it does not know": (
        '<ir_version: 8, opset_import: ["": 18, "other": 1]> g (float[N] x) => (float[N] y) { y = other.Unknown(x) }',
        "OpenVINO refuses the model: No conversion rule found for operations: other.Unknown",
    ),
    "an FRN of unknown rank": (
        """<ir_version: 8, opset_import: ["": 18, "deploynorm": 1]>
        g (float[N] x, int64[R] shape, float[C] p) => (float[] y) {
            z = Reshape(x, shape)  y = deploynorm.FilterResponseNormalization(z, p, p, p, p)
        }""",
        r"OpenVINO refuses the model: .*Normalization: the rank of X is not known\. Fix",
    ),
}


@pytest.mark.parametrize(("text", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_openvino_refuses_is_said_in_a_line(text: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem) as caught:
        OpenVinoRunner(onnx.parser.parse_model(text))
    assert "\n" not in str(caught.value)


def test_sizes_that_the_graph_cannot_take_are_said_with_the_feeds() -> None:
    text = """<ir_version: 8, opset_import: ["": 18]>
    g (float[N, 3] a, float[M, 3] b) => (float[K, 3] y) { y = Add(a, b) }"""
    with (
        OpenVinoRunner(onnx.parser.parse_model(text)) as runner,
        pytest.raises(ModelError, match=r"OpenVINO failed: .*Got \{'a': \(2, 3\), 'b': \(4, 3\)\}"),
    ):
        runner.infer({"a": np.zeros((2, 3), np.float32), "b": np.zeros((4, 3), np.float32)})


def test_without_the_package_the_extension_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"pip install 'deploynorm\[openvino\]'"):
        deploynorm.openvino_extension()
