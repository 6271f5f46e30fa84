"""The operator in every runner that needs no GPU, against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
import torch
from cases import ADD_CASES, CASES, NormCase, make_inputs, tolerance, want
from graphs import frn_model

from deploynorm.contract import OUTPUT, PARAMETERS
from deploynorm.inputs import TensorSpec
from deploynorm.layers.functional import filter_response_norm, tlu
from deploynorm.run import Runner
from deploynorm.run.eager import EagerRunner
from deploynorm.run.half import HalfRunner
from deploynorm.run.mnn import MnnRunner
from deploynorm.run.ncnn import NcnnRunner
from deploynorm.run.onnxruntime import OnnxRuntimeRunner
from deploynorm.run.openvino import OpenVinoRunner
from deploynorm.run.reference import ReferenceRunner

Parameters = dict[str, np.ndarray]


class Layer(torch.nn.Module):
    """The operator with constant parameters, and an addition where a residual is given."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        self.values = [torch.from_numpy(value) for value in parameters.values()]

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        gamma, beta, tau, eps = self.values
        if residual is None:
            return filter_response_norm(x, gamma, beta, tau, eps)
        wide = filter_response_norm(x.to(eps.dtype), gamma, beta, None, eps) + residual
        return tlu(wide, tau).to(x.dtype)


def model(specs: list[TensorSpec], parameters: Parameters, *, body: bool) -> onnx.ModelProto:
    given = specs[0]
    return frn_model(given.dtype, body=body or None, parameters=parameters, shape=given.shape, residual=len(specs) > 1)


RUNNERS: Mapping[str, Callable[[list[TensorSpec], Parameters], Runner]] = {
    "eager": lambda specs, parameters: EagerRunner(Layer(parameters), specs, [OUTPUT]),
    "reference-body": lambda *given: ReferenceRunner(model(*given, body=True)),
    "reference-operator": lambda *given: ReferenceRunner(model(*given, body=False)),
    "onnxruntime-body": lambda *given: OnnxRuntimeRunner(model(*given, body=True).SerializeToString(), plugins=()),
    "onnxruntime-library": lambda *given: OnnxRuntimeRunner(model(*given, body=False).SerializeToString()),
    "openvino": lambda *given: OpenVinoRunner(model(*given, body=False)),
    "ncnn": lambda *given: NcnnRunner(model(*given, body=False)),
    "mnn": lambda *given: MnnRunner(model(*given, body=False)),
    "half-body": lambda *given: HalfRunner(model(*given, body=True)),
}


# Each is converted in a process of its own, which takes time; and neither takes other types, or an empty batch.
_IMAGES = (
    *("odd_7x7", "map_1x1_learned_eps", "one_channel", "channels_last_odd", "huge", "no_tlu_zeros", "eps_per_channel"),
    *("add_odd_7x7", "add_no_tlu"),
)
_CONVERTED = {"ncnn": _IMAGES, "mnn": (*_IMAGES, "n_c", "1d", "3d", "add_n_c", "add_1d", "add_3d")}


def runs(runner: str, case: NormCase) -> bool:
    if runner in _CONVERTED:
        return case.dtype == "float32" and case.name in _CONVERTED[runner]
    # OpenVINO computes float64 in float32; bfloat16 is one case of its own file.
    return runner != "openvino" or case.dtype not in ("float64", "bfloat16")


PAIRS = [(name, case) for name in RUNNERS for case in (*CASES, *ADD_CASES) if runs(name, case)]


@pytest.mark.parametrize(("runner", "case"), PAIRS, ids=str)
def test_every_runner_computes_the_definition(runner: str, case: NormCase, require: Callable[[str], None]) -> None:
    if runner.startswith(("onnxruntime", "half")):
        require("ort")
    if runner in ("openvino", "ncnn", "mnn"):
        require(runner)
    if runner.endswith("library"):
        require("native")
    inputs = make_inputs(case)
    parameters = {name: inputs.pop(name) for name in PARAMETERS}
    sizes = tuple(f"D{axis}" if axis != 1 else size for axis, size in enumerate(case.shape))
    specs = [TensorSpec(name, sizes, case.dtype) for name in inputs]
    with RUNNERS[runner](specs, parameters) as opened:
        assert opened.inputs == tuple(specs)
        assert opened.output_names == (OUTPUT,)
        got = opened.infer(inputs)[OUTPUT]
    assert got.dtype.name == case.dtype
    assert got.shape == case.shape
    np.testing.assert_allclose(got.astype(np.float64), want(case), **tolerance(case).kwargs())
