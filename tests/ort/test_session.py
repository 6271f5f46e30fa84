"""Sessions of ONNX Runtime with our operator library, for people with their own code."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import CHANNELS, frn_model, frn_parameters, one_node
from tolerances import OP_FLOAT32

from deploynorm import ort
from deploynorm.contract import OP_TYPE
from deploynorm.errors import BackendError, InputError, ModelError
from deploynorm.ort.sessions import _REGISTERED
from deploynorm.reference import filter_response_norm

X = np.random.default_rng(0).normal(size=(2, CHANNELS, 3, 5)).astype(np.float32)
WANT = filter_response_norm(X, *frn_parameters().values())


WITH_BODY, WITHOUT_BODY = (frn_model(body=body).SerializeToString() for body in (True, None))
WITH_RESIDUAL = frn_model(body=True, residual=True).SerializeToString()


@pytest.fixture
def onnxruntime(require: Callable[[str], None]) -> Any:
    require("ort")
    return ort.import_onnxruntime()


@pytest.fixture
def native(onnxruntime: Any, require: Callable[[str], None]) -> Any:
    require("native")
    return onnxruntime


def result(session: Any) -> np.ndarray[Any, Any]:
    return np.asarray(session.run(None, {"X": X})[0])


def test_a_session_runs_a_file_that_has_no_body(native: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(WITHOUT_BODY)
    session = ort.session(path)
    assert isinstance(session, native.InferenceSession)
    np.testing.assert_allclose(result(session), WANT, **OP_FLOAT32.kwargs())


def test_options_take_the_library_by_hand_or_from_us_once_or_twice(native: Any) -> None:
    ours, by_hand = native.SessionOptions(), native.SessionOptions()
    ort.register(ours)
    ort.register(ours)
    by_hand.register_custom_ops_library(str(ort.library_path()))
    assert result(ort.session(WITHOUT_BODY, options=ours)).shape == X.shape
    for options in (ours, by_hand):
        session = native.InferenceSession(WITHOUT_BODY, options)
        np.testing.assert_allclose(result(session), WANT, **OP_FLOAT32.kwargs())


def test_a_library_registered_by_hand_and_by_us_is_explained(native: Any) -> None:
    options = native.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(ort.library_path()))
    with pytest.raises(InputError, match=r"twice.*Fix: register it with deploynorm\.ort\.register"):
        ort.session(WITHOUT_BODY, options=options)


def test_options_of_ones_own_are_kept(native: Any, tmp_path: Path) -> None:
    options = native.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.session(WITH_BODY, options=options)
    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == [OP_TYPE]


def test_an_empty_list_of_plugins_is_the_stock_runtime(onnxruntime: Any, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.session(WITH_BODY, plugins=[], options=options)
    assert OP_TYPE not in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    np.testing.assert_allclose(result(session), WANT, **OP_FLOAT32.kwargs())


def test_providers_may_be_named_as_onnxruntime_names_them(onnxruntime: Any) -> None:
    session = ort.session(WITH_BODY, providers=["CPUExecutionProvider"])
    assert session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("model", "providers", "cuda_kernels", "registered", "warning"),
    [
        (WITH_BODY, ("cpu",), False, True, None),
        (WITH_RESIDUAL, ("cpu",), False, True, None),
        (WITH_BODY, ("cuda", "cpu"), True, True, None),
        (WITH_BODY, ("cuda", "cpu"), False, False, r"has no CUDA kernels\. Fix: deploynorm plugins build --cuda"),
        (WITH_RESIDUAL, ("cuda", "cpu"), True, True, None),
        (WITH_RESIDUAL, ("cuda", "cpu"), False, False, "has no CUDA kernels"),
        (WITH_BODY, ("tensorrt", "cuda"), True, False, None),
        (WITH_RESIDUAL, ("tensorrt", "cuda"), True, False, None),
    ],
    ids=[
        "cpu",
        "cpu, add",
        "cuda",
        "cuda, library without",
        "cuda, add",
        "cuda, add, library without",
        "tensorrt",
        "tensorrt, add",
    ],
)
def test_the_library_is_for_sessions_on_devices_that_it_has_kernels_for(
    model: bytes,
    providers: tuple[str, ...],
    cuda_kernels: bool,
    registered: bool,
    warning: str | None,
    native: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device a kernel for the CPU would bring copies to and fro, where the body stays on the device."""

    there = [full for full, _ in ort.PROVIDERS.values()]
    session = SimpleNamespace(
        get_providers=lambda: there, get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={})
    )
    monkeypatch.setattr(native, "InferenceSession", lambda *_, **__: session)
    monkeypatch.setattr(native, "get_available_providers", lambda: there)
    monkeypatch.setattr("deploynorm.ort.sessions.cuda_variants", lambda library: ["packed"] if cuda_kernels else [])
    options = native.SessionOptions()
    expected = pytest.warns(RuntimeWarning, match=warning) if warning else contextlib.nullcontext()
    with expected:
        assert ort.session(model, providers=providers, options=options) is session
    assert (options in _REGISTERED) == registered


def test_cuda_that_pip_has_brought_is_opened_for_sessions_on_a_device_alone(
    native: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def preload() -> None:
        calls.append(None)
        print("libcublas is missing")

    monkeypatch.setattr(native, "preload_dlls", preload)
    ort.session(WITH_BODY)
    assert not calls
    monkeypatch.setattr(native, "get_available_providers", lambda: [full for full, _ in ort.PROVIDERS.values()])
    with pytest.raises(ModelError, match="not in available provider names"):
        ort.session(WITH_BODY, providers=["tensorrt"])
    assert len(calls) == 1
    assert "libcublas" not in capsys.readouterr().out


@pytest.mark.usefixtures("onnxruntime", "without_library")
@pytest.mark.parametrize("form", ["file", "bytes"])
def test_without_the_library_the_body_runs_and_it_is_said(form: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(WITH_BODY)
    with pytest.warns(RuntimeWarning, match=r"operator library is not built.*Fix: deploynorm plugins build"):
        session = ort.session(path if form == "file" else WITH_BODY)
    np.testing.assert_allclose(result(session), WANT, **OP_FLOAT32.kwargs())


@pytest.mark.usefixtures("onnxruntime", "without_library")
def test_it_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            ort.session(WITH_BODY)
    assert len(caught) == 1


@pytest.mark.usefixtures("onnxruntime", "without_library")
def test_it_is_not_said_of_a_model_without_our_operator() -> None:
    ort.session(one_node("Relu", {"x": ("float32", ("N",))}, ("float32", ("N",))).SerializeToString())


@pytest.mark.usefixtures("onnxruntime", "without_library")
def test_without_body_and_library_the_remedy_is_reported() -> None:
    with pytest.raises(ModelError, match=r"without its function body.*Fix: run `deploynorm plugins build`"):
        ort.session(WITHOUT_BODY)


@pytest.mark.usefixtures("without_library")
def test_registering_a_library_that_is_not_there_is_an_error_of_the_environment(onnxruntime: Any) -> None:
    with pytest.raises(BackendError, match=r"Fix: .*deploynorm plugins build") as caught:
        ort.register(onnxruntime.SessionOptions())
    assert caught.value.exit_code == 3
