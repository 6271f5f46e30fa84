from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import CHANNELS, UNREADABLE, frn_model, frn_parameters, one_node
from tolerances import EXACT, OP_FLOAT32

from deploynorm import run
from deploynorm.errors import InputError, ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.onnx_file import OnnxFile
from deploynorm.reference import filter_response_norm
from deploynorm.run.base import Runner, check_feeds
from deploynorm.run.half import HalfRunner
from deploynorm.run.mnn import MnnRunner
from deploynorm.run.ncnn import NcnnRunner
from deploynorm.run.onnxruntime import OnnxRuntimeRunner
from deploynorm.run.openvino import OpenVinoRunner
from deploynorm.run.reference import ReferenceRunner

RUNNERS: dict[str, Callable[..., Runner]] = {
    "onnxruntime": OnnxRuntimeRunner,
    "half": HalfRunner,
    "openvino": OpenVinoRunner,
    "ncnn": NcnnRunner,
    "mnn": MnnRunner,
    "reference": ReferenceRunner,
}
X = np.random.default_rng(0).normal(size=(2, CHANNELS, 3, 5)).astype(np.float32)


@pytest.fixture(params=RUNNERS)
def backend(request: pytest.FixtureRequest, require: Callable[[str], None]) -> str:
    """Each runner of ONNX files, by name."""
    if request.param != "reference":
        require(request.param if request.param in ("openvino", "ncnn", "mnn") else "ort")
    return str(request.param)


def test_a_file_opens_in_every_backend(backend: Any, tmp_path: Path) -> None:
    assert run.available()[backend] is None
    path = tmp_path / "model.onnx"
    shape = ("N", 1, "H", "W")  # of images, which ncnn takes alone
    onnx.save(one_node("Neg", {"x": ("float32", shape)}, ("float32", shape)), path)
    with run.open_runner(path, backend) as runner:
        assert runner.name.startswith(backend)
        assert runner.infer({"x": np.array([[[[1, -2]]]], np.float32)})["y"].tolist() == [[[[-1, 2]]]]


def test_a_file_with_external_data_runs_until_the_data_is_gone(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(frn_model(body=True), path, save_as_external_data=True, location="model.data", size_threshold=0)
    with RUNNERS[backend](path) as runner:
        want = filter_response_norm(X, *frn_parameters().values())
        np.testing.assert_allclose(runner.infer({"X": X})["Y"], want, **OP_FLOAT32.kwargs())
    (tmp_path / "model.data").unlink()
    with pytest.raises(ModelError, match=r"external data cannot be read.*Fix: keep the data file beside the model"):
        RUNNERS[backend](path)


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_is_no_model_is_named(backend: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    wrong = "no such file" if content is None else "not an ONNX file, or cut short"
    for form in (path, str(path)):
        with pytest.raises(ModelError, match=rf"broken\.onnx: {wrong}") as caught:
            RUNNERS[backend](form)
        assert caught.value.exit_code == 2


def test_feeds_are_checked_and_a_closed_runner_says_so(backend: str) -> None:
    with RUNNERS[backend](OnnxFile.read(frn_model(body=True))) as runner:
        for feed, wrong in ((X.astype(np.float64), "wrong dtype"), (X[:, 1:], "wrong size on axis 1")):
            with pytest.raises(InputError, match=wrong):
                runner.infer({"X": feed})
        first = runner.infer({"X": X})["Y"]
        np.testing.assert_allclose(runner.infer({"X": X})["Y"], first, **EXACT.kwargs())
    runner.close()
    with pytest.raises(InputError, match="the runner is closed"):
        runner.infer({"X": X})


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=re.escape("Got 'onnx'; expected 'onnxruntime', 'half', 'reference', 'openv")):
        run.open_runner("model.onnx", "onnx")


@pytest.mark.parametrize("option", [{"providers": ("cuda",)}, {"plugins": ("lib.so",)}, {"threads": 1}], ids=str)
def test_the_reference_backend_refuses_options_that_it_would_ignore(option: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"the reference backend takes no (providers|plugins|threads)"):
        run.open_runner("model.onnx", "reference", **option)


def test_a_backend_that_is_missing_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnxruntime", "openvino", "ncnn", "MNN"):
        monkeypatch.setitem(sys.modules, module, None)
    available = run.available()
    assert available["eager"] is None
    assert available["reference"] is None
    for backend in ("onnxruntime", "half"):
        assert "pip install 'deploynorm[cpu]'" in str(available[backend])
    for backend in ("openvino", "ncnn", "mnn"):
        assert f"pip install 'deploynorm[{backend}]'" in str(available[backend])


IMAGE = TensorSpec("image", ("N", 3, "S", "S"), "float32")
MASK = TensorSpec("mask", ("N", "?", "?"), "bool")


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


ACCEPTED = {
    "sizes that change": {"image": zeros(2, 3, 8, 8), "mask": zeros(2, 5, 6, dtype="bool")},
    "an empty batch": {"image": zeros(0, 3, 8, 8), "mask": zeros(0, 5, 5, dtype="bool")},
    "another order": {"mask": zeros(1, 1, 1, dtype="bool"), "image": zeros(1, 3, 1, 1)},
    "strided": {"image": zeros(4, 3, 8, 8)[::2], "mask": zeros(2, 5, 6, dtype="bool")},
}


@pytest.mark.parametrize("feeds", ACCEPTED.values(), ids=ACCEPTED)
def test_feeds_that_fit_pass(feeds: dict[str, np.ndarray]) -> None:
    check_feeds("here", (IMAGE, MASK), feeds)


GOOD = ACCEPTED["sizes that change"]
REFUSED = {
    "missing": ({"image": GOOD["image"]}, r"inputs missing: \['mask'\]. Got \['image'\]; expected \['image', 'mask'\]"),
    "unknown": ({**GOOD, "extra": GOOD["mask"]}, r"unknown inputs: \['extra'\]"),
    "not an array": ({**GOOD, "mask": [True]}, "input 'mask' is not a NumPy array. Got list"),
    "float64": ({**GOOD, "image": zeros(2, 3, 8, 8, dtype="float64")}, "wrong dtype. Got float64; expected float32"),
    "float16": ({**GOOD, "image": zeros(2, 3, 8, 8, dtype="float16")}, "wrong dtype. Got float16; expected float32"),
    "foreign bytes": (
        {**GOOD, "image": zeros(2, 3, 8, 8).astype(np.dtype("f4").newbyteorder())},
        "Got float32 in foreign byte order",
    ),
    "rank": ({**GOOD, "image": zeros(3, 8, 8)}, r"wrong rank. Got \(3, 8, 8\); expected \(N, 3, S, S\)"),
    "fixed size": ({**GOOD, "image": zeros(2, 4, 8, 8)}, r"wrong size on axis 1. Got \(2, 4, 8, 8\).*network fixes it"),
    "one symbol in one input": ({**GOOD, "image": zeros(2, 3, 8, 9)}, "axis 3.*'S' is already 8 on axis 2 of input"),
    "one symbol in two inputs": (
        {**GOOD, "mask": zeros(3, 5, 6, dtype="bool")},
        "input 'mask' has the wrong size on axis 0.*'N' is already 2 on axis 0 of input 'image'",
    ),
}


@pytest.mark.parametrize(("feeds", "message"), REFUSED.values(), ids=REFUSED)
def test_feeds_that_do_not_fit_are_refused_with_what_was_expected(feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_feeds("here", (IMAGE, MASK), feeds)
    assert str(caught.value).startswith("here: ")
    assert "Fix: " in str(caught.value)
    assert caught.value.exit_code == 2
