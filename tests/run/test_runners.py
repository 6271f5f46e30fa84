"""The operator in every runner that needs no GPU, against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
import torch
from cases import CASES, NormCase, make_inputs, tolerance, want
from graphs import frn_model

from deploynorm.contract import INPUTS, OUTPUT, PARAMETERS
from deploynorm.inputs import TensorSpec
from deploynorm.layers.functional import filter_response_norm
from deploynorm.run import Runner
from deploynorm.run.eager import EagerRunner
from deploynorm.run.half import HalfRunner
from deploynorm.run.onnxruntime import OnnxRuntimeRunner
from deploynorm.run.reference import ReferenceRunner

Parameters = dict[str, np.ndarray]


class Layer(torch.nn.Module):
    """The operator with constant parameters."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        self.values = [torch.from_numpy(value) for value in parameters.values()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gamma, beta, tau, eps = self.values
        return filter_response_norm(x, gamma, beta, tau, eps)


def model(spec: TensorSpec, parameters: Parameters, *, body: bool) -> onnx.ModelProto:
    return frn_model(spec.dtype, body=body or None, parameters=parameters, shape=spec.shape)


RUNNERS: Mapping[str, Callable[[TensorSpec, Parameters], Runner]] = {
    "eager": lambda spec, parameters: EagerRunner(Layer(parameters), [spec], [OUTPUT]),
    "reference-body": lambda *given: ReferenceRunner(model(*given, body=True)),
    "reference-operator": lambda *given: ReferenceRunner(model(*given, body=False)),
    "onnxruntime-body": lambda *given: OnnxRuntimeRunner(model(*given, body=True).SerializeToString(), plugins=()),
    "onnxruntime-library": lambda *given: OnnxRuntimeRunner(model(*given, body=False).SerializeToString()),
    "half-body": lambda *given: HalfRunner(model(*given, body=True)),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_every_runner_computes_the_definition(runner: str, case: NormCase, require: Callable[[str], None]) -> None:
    if runner.startswith(("onnxruntime", "half")):
        require("ort")
    if runner.endswith("library"):
        require("native")
    inputs = make_inputs(case)
    x = inputs[INPUTS[0]]
    sizes = (f"D{axis}" if axis != 1 else size for axis, size in enumerate(case.shape))
    spec = TensorSpec(INPUTS[0], tuple(sizes), case.dtype)
    with RUNNERS[runner](spec, {name: inputs[name] for name in PARAMETERS}) as opened:
        assert opened.inputs == (spec,)
        assert opened.output_names == (OUTPUT,)
        got = opened.infer({INPUTS[0]: x})[OUTPUT]
    assert got.dtype.name == case.dtype
    assert got.shape == case.shape
    np.testing.assert_allclose(got.astype(np.float64), want(case), **tolerance(case).kwargs())
