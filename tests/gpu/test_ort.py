"""The operator on ONNX Runtime's CUDA provider: its numbers on arrays and tensors, CUDA graphs, and a whole network."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cases import ADD_CASES, CASES, NormCase
from graphs import CHANNELS, OPSET, frn_model, frn_parameters
from references import check_forward, inputs_of
from tolerances import OP_BFLOAT16, OP_FLOAT16, OP_FLOAT32

from deploynorm import ort, reference
from deploynorm._check.comparison import DEFAULT_TOLERANCE
from deploynorm._export import export
from deploynorm._fold import fold
from deploynorm.contract import INPUTS, OP_TYPE, OUTPUT, PARAMETERS
from deploynorm.errors import InputError
from deploynorm.lowering import function_proto
from deploynorm.models import frn_resnet, mabn_resnet
from deploynorm.run.onnxruntime import OnnxRuntimeRunner

CUDA = "CUDAExecutionProvider"
DTYPES = ("float32", "float64", "float16")  # of NumPy's arrays; bfloat16 is tested on PyTorch's tensors


@pytest.fixture(scope="module")
def onnxruntime(library: Path, require: Callable[[str], None]) -> Any:
    require("ort")
    module = ort.import_onnxruntime()
    if CUDA not in module.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider (pip install onnxruntime-gpu)")
    return module


@pytest.fixture(scope="module")
def open_session(onnxruntime: Any, library: Path) -> Callable[..., Any]:
    """open_session(model, cuda_graph=True): a session with the library on the CUDA provider."""

    def open_session(model: onnx.ModelProto, *, cuda_graph: bool = False, profile: Path | None = None) -> Any:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library))
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        providers = [(CUDA, {"use_tf32": "0", "enable_cuda_graph": str(int(cuda_graph))}), "CPUExecutionProvider"]
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers)

    return open_session


def check(y: np.ndarray[Any, Any], x: np.ndarray[Any, Any]) -> None:
    expected = reference.filter_response_norm(x.astype(np.float64), *frn_parameters("float64").values())
    np.testing.assert_allclose(y, expected, **OP_FLOAT32.kwargs())


@pytest.mark.parametrize("case", [case for case in (*CASES, *ADD_CASES) if case.dtype in DTYPES], ids=str)
def test_numbers(case: NormCase, open_session: Callable[..., Any]) -> None:
    inputs = inputs_of(case)
    shape = tuple(f"axis_{axis}" for axis in range(len(case.shape)))
    parameters = {name: inputs[name] for name in PARAMETERS}
    session = open_session(frn_model(case.dtype, parameters=parameters, shape=shape, residual=case.residual))
    feeds = {name: np.ascontiguousarray(value) for name, value in inputs.items() if name not in parameters}
    check_forward(session.run(None, feeds)[0], case)


def test_it_is_the_kernel_and_runs_on_the_device(open_session: Callable[..., Any], tmp_path: Path) -> None:
    session = open_session(frn_model(body=function_proto(OPSET)), profile=tmp_path / "profile")
    session.run(None, {INPUTS[0]: np.zeros((1, CHANNELS, 8, 8), np.float32)})
    events = [event["args"] for event in json.loads(Path(session.end_profiling()).read_text()) if "args" in event]
    ran = {event.get("op_name"): event.get("provider") for event in events if event.get("provider")}
    assert ran[OP_TYPE] == CUDA
    assert "ReduceMean" not in ran


def test_a_cuda_graph_replays_it(onnxruntime: Any, open_session: Callable[..., Any]) -> None:
    shape = (8, CHANNELS, 33, 17)
    session = open_session(frn_model(shape=shape), cuda_graph=True)
    rng = np.random.default_rng(0)
    binding = session.io_binding()
    x = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), "cuda", 0)
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, np.nan, np.float32), "cuda", 0)
    binding.bind_ortvalue_input(INPUTS[0], x)
    binding.bind_ortvalue_output(OUTPUT, y)
    for _ in range(4):  # the first run captures
        values = rng.standard_normal(shape, dtype=np.float32)
        x.update_inplace(values)
        session.run_with_iobinding(binding)
        check(y.numpy(), values)


def test_few_large_planes_take_scratch_memory_and_give_it_back(open_session: Callable[..., Any]) -> None:
    shape = (1, CHANNELS, 512, 700)
    session = open_session(frn_model(shape=shape))
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.standard_normal(shape, dtype=np.float32)
        check(session.run(None, {INPUTS[0]: values})[0], values)


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


TENSORS = {"float32": OP_FLOAT32, "float16": OP_FLOAT16, "bfloat16": OP_BFLOAT16}


@pytest.mark.usefixtures("onnxruntime")
@pytest.mark.parametrize("dtype", TENSORS)
def test_tensors_are_taken_in_the_order_of_the_callers_stream(dtype: str, library: Path) -> None:
    """The input is written late on the stream; the output is read there, and then its memory is used again."""
    model = frn_model(dtype, body=function_proto(OPSET, half=dtype != "float32")).SerializeToString()
    with OnnxRuntimeRunner(model, providers=["cuda", "cpu"], plugins=[library]) as runner:
        assert runner.device == torch.device("cuda", 0)
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            for size in (64, 7, 300):
                x = torch.randn(2, CHANNELS, size, size).to(getattr(torch, dtype))
                given = x.cuda()
                torch.cuda.synchronize()
                with torch.cuda.stream(stream):
                    late = torch.zeros_like(given)
                    torch.cuda._sleep(20_000_000)
                    late.copy_(given)
                    y = runner.run({INPUTS[0]: late})[OUTPUT]
                    late.fill_(float("nan"))
                    got = y.double()
                    del y
                    runner.run({INPUTS[0]: late})
                stream.synchronize()
                want = reference.filter_response_norm(x.double().numpy(), *frn_parameters("float64").values())
                np.testing.assert_allclose(got.cpu().numpy(), want, **TENSORS[dtype].kwargs())
        with pytest.raises(InputError, match=r"Got cpu; expected cuda:0"):
            runner.run({INPUTS[0]: x})


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    batch_norm = mabn_resnet.resnet20(10, norm="bn").eval()
    return {"frn": frn_resnet.resnet20(10).eval(), "bn": batch_norm}


@pytest.mark.usefixtures("onnxruntime")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("way", ["our operator", "residual form", "function body", "batch norm folded"])
def test_a_whole_network(
    way: str, dtype: str, networks: dict[str, torch.nn.Module], library: Path, tmp_path: Path
) -> None:
    network = networks["bn" if way == "batch norm folded" else "frn"]
    images = torch.randn(8, 3, 32, 32)
    kind = getattr(torch, dtype)
    folded, _ = fold(network, (images,))
    half = None if dtype == "float32" else kind
    export(folded, (images,), dtype=half, residual=way == "residual form").save(tmp_path / "model.onnx")
    plugins = [library] if way in ("our operator", "residual form") else []
    with OnnxRuntimeRunner(tmp_path / "model.onnx", providers=["cuda", "cpu"], plugins=plugins) as runner:
        for batch in (8, 1, 3):
            x = images[:batch].to(kind)
            (y,) = runner.run({runner.inputs[0].name: x.cuda()}).values()
            with torch.no_grad():
                want = copy.deepcopy(network).double()(x.double())
            error = (y.double().cpu() - want).abs().max() / want.abs().max()
            assert error <= DEFAULT_TOLERANCE[dtype].rtol
