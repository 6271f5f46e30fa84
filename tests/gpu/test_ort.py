"""The operator on ONNX Runtime's CUDA provider: its numbers, that it is the kernel, and CUDA graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import CASES, NormCase, make_inputs, tolerance, want
from graphs import CHANNELS, OPSET, frn_model, frn_parameters
from tolerances import OP_FLOAT32

from deploynorm import ort, reference
from deploynorm.contract import INPUTS, OP_TYPE, OUTPUT, PARAMETERS
from deploynorm.lowering import function_proto

CUDA = "CUDAExecutionProvider"
DTYPES = ("float32", "float64", "float16")  # ONNX Runtime's Python does not take arrays of bfloat16


@pytest.fixture(scope="module")
def onnxruntime(library: Path, require: Callable[[str], None]) -> Any:
    require("ort")
    module = ort.import_onnxruntime()
    if CUDA not in module.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider (pip install onnxruntime-gpu)")
    return module


def options(onnxruntime: Any, library: Path) -> Any:
    made = onnxruntime.SessionOptions()
    made.register_custom_ops_library(str(library))
    return made


def providers(cuda_graph: bool = False) -> list[Any]:
    return [(CUDA, {"use_tf32": "0", "enable_cuda_graph": str(int(cuda_graph))}), "CPUExecutionProvider"]


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype in DTYPES and len(case.shape) > 1], ids=str)
def test_numbers(case: NormCase, onnxruntime: Any, library: Path) -> None:
    inputs = make_inputs(case)
    shape = tuple(f"axis_{axis}" for axis in range(len(case.shape)))
    parameters = {name: inputs[name] for name in PARAMETERS}
    model = frn_model(case.dtype, parameters=parameters, shape=shape)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options(onnxruntime, library), providers())
    (y,) = session.run(None, {INPUTS[0]: np.ascontiguousarray(inputs[INPUTS[0]])})
    np.testing.assert_allclose(y.astype(np.float64), want(case), **tolerance(case).kwargs())


def test_it_is_the_kernel_and_runs_on_the_device(onnxruntime: Any, library: Path, tmp_path: Path) -> None:
    made = options(onnxruntime, library)
    made.enable_profiling = True
    made.profile_file_prefix = str(tmp_path / "profile")
    content = frn_model(body=function_proto(OPSET)).SerializeToString()
    session = onnxruntime.InferenceSession(content, made, providers())
    session.run(None, {INPUTS[0]: np.zeros((1, CHANNELS, 8, 8), np.float32)})
    events = [event["args"] for event in json.loads(Path(session.end_profiling()).read_text()) if "args" in event]
    ran = {event.get("op_name"): event.get("provider") for event in events if event.get("provider")}
    assert ran[OP_TYPE] == CUDA
    assert "ReduceMean" not in ran


def test_a_cuda_graph_replays_it(onnxruntime: Any, library: Path) -> None:
    shape = (8, CHANNELS, 33, 17)
    content = frn_model(shape=shape).SerializeToString()
    session = onnxruntime.InferenceSession(content, options(onnxruntime, library), providers(cuda_graph=True))
    rng = np.random.default_rng(0)
    binding = session.io_binding()
    x = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), "cuda", 0)
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, np.nan, np.float32), "cuda", 0)
    binding.bind_ortvalue_input(INPUTS[0], x)
    binding.bind_ortvalue_output(OUTPUT, y)
    parameters = [value.astype(np.float64) for value in frn_parameters().values()]
    for _ in range(4):  # the first run captures
        values = rng.standard_normal(shape, dtype=np.float32)
        x.update_inplace(values)
        session.run_with_iobinding(binding)
        expected = reference.filter_response_norm(values.astype(np.float64), *parameters)
        np.testing.assert_allclose(y.numpy(), expected, **OP_FLOAT32.kwargs())


def test_few_large_planes_take_scratch_memory_and_give_it_back(onnxruntime: Any, library: Path) -> None:
    shape = (1, CHANNELS, 512, 700)
    session = onnxruntime.InferenceSession(
        frn_model(shape=shape).SerializeToString(), options(onnxruntime, library), providers()
    )
    rng = np.random.default_rng(0)
    parameters = [value.astype(np.float64) for value in frn_parameters().values()]
    for _ in range(20):
        values = rng.standard_normal(shape, dtype=np.float32)
        (y,) = session.run(None, {INPUTS[0]: values})
        expected = reference.filter_response_norm(values.astype(np.float64), *parameters)
        np.testing.assert_allclose(y, expected, **OP_FLOAT32.kwargs())


def test_our_session_registers_the_library_on_cuda(
    onnxruntime: Any, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "find_library", lambda: library)
    monkeypatch.setattr(ort, "library_path", lambda: library)
    model = frn_model(body=None)
    onnx.checker.check_model(model)
    session = ort.session(model.SerializeToString(), providers=["cuda", "cpu"])
    assert session.get_providers()[0] == CUDA
    session.run(None, {INPUTS[0]: np.ones((1, CHANNELS, 4, 4), np.float32)})
