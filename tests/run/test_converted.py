"""What is their own of the runners of ncnn and MNN, which read files that are converted."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.numpy_helper
import onnx.parser
import pytest
import torch
import torch.nn.functional as F
from graphs import OPSET, frn_model, frn_parameters
from tolerances import EXACT, OP_FLOAT32

from deploynorm.contract import OUTPUT
from deploynorm.errors import BackendError, InputError, ModelError
from deploynorm.lowering import function_proto
from deploynorm.onnx_file import OnnxFile
from deploynorm.reference import filter_response_norm
from deploynorm.run import open_runner
from deploynorm.run.mnn import MnnRunner
from deploynorm.run.ncnn import NcnnRunner
from deploynorm.run.reference import ReferenceRunner

RUNNERS = {"ncnn": NcnnRunner, "mnn": MnnRunner}
RNG = np.random.default_rng(0)


@pytest.fixture(params=RUNNERS)
def backend(request: pytest.FixtureRequest, require: Callable[[str], None]) -> str:
    require(request.param)
    return str(request.param)


@pytest.fixture
def ncnn(require: Callable[[str], None]) -> None:
    require("ncnn")


def parse(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    head = f'<ir_version: 8, opset_import: ["": {OPSET}, "deploynorm": 1, "other": 1]> g '
    model = onnx.parser.parse_model(head + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def random(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def network() -> onnx.ModelProto:
    """Two inputs, the one that is read later first, outputs of different ranks, and sizes that the graph computes."""
    text = """(float[N,4,H,W] r, float[N,3,H,W] x) => (float[N,4,H,W] y, float[N,4] z, float[N,4,H,W] wide) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        y = deploynorm.FilterResponseNormalizationAdd (c, gamma, beta, tau, eps, r)
        f = deploynorm.FilterResponseNormalization (c, gamma, beta, tau, eps)
        p = GlobalAveragePool (f)
        z = Flatten (p)
        shape = Shape (x)
        size = Slice (shape, two, four)
        half = AveragePool <kernel_shape = [2,2], strides = [2,2]> (f)
        outer = Shape <end = 2> (half)
        sizes = Concat <axis = 0> (outer, size)
        wide = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
            (half, , , sizes)
    }"""
    return parse(text, two=np.array([2]), four=np.array([4]), w=random(4, 3, 3, 3), **frn_parameters())


def test_a_network_of_any_size_runs_batch_by_batch(backend: str) -> None:
    model = network()
    with RUNNERS[backend](model, threads=1) as runner, ReferenceRunner(model) as reference:
        for batch, height, width in ((3, 6, 5), (2, 6, 5), (1, 7, 9)):
            feeds = {"r": random(batch, 4, height, width), "x": random(batch, 3, height, width)}
            got, want = runner.infer(feeds), reference.infer(feeds)
            assert list(got) == ["y", "z", "wide"]
            for name, value in want.items():
                np.testing.assert_allclose(got[name], value, **OP_FLOAT32.kwargs())


def test_a_size_without_a_name_may_be_the_batch(backend: str) -> None:
    x = random(2, 4, 3, 5)
    with RUNNERS[backend](frn_model(shape=(None, 4, None, None))) as runner:  # type: ignore[arg-type]
        got = runner.infer({"X": x})[OUTPUT]
    np.testing.assert_allclose(got, filter_response_norm(x, *frn_parameters().values()), **OP_FLOAT32.kwargs())


def test_an_output_is_not_changed_by_the_next_call(backend: str) -> None:
    x = random(1, 4, 3, 5)
    with open_runner(OnnxFile.read(frn_model()), backend, threads=1) as runner:
        first = runner.infer({"X": x})[OUTPUT]
        kept = first.copy()
        runner.infer({"X": 1 - x})
    np.testing.assert_allclose(first, kept, **EXACT.kwargs())


@pytest.mark.usefixtures("ncnn")
def test_ncnn_is_right_about_frn_that_others_wrote_on_three_axes() -> None:
    """pnnx makes another file of (N, C, L), without a word."""
    text = """(float[N,3,H,W] x) => (float[N,4,H,W] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        y = deploynorm.FilterResponseNormalization (c, gamma, beta, tau, eps)
    }"""
    model = parse(text, w=random(4, 3, 3, 3), **frn_parameters())
    model.functions.append(function_proto(OPSET))
    loose = onnx.inliner.inline_local_functions(model)
    x = random(2, 3, 6, 5)
    with NcnnRunner(loose) as runner, ReferenceRunner(loose) as reference:
        np.testing.assert_allclose(runner.infer({"x": x})["y"], reference.infer({"x": x})["y"], **OP_FLOAT32.kwargs())


IMAGES = "(float[N,3,H,W] x) => (float[N,3,H,W] y)"
REFUSED = {
    "a half type": (frn_model("float16"), "is asked for float32 alone. Got a graph in float16"),
    "another type": (frn_model("float64"), "input 'X' is of a type .* Got double; expected float32"),
    "another type at the end": (
        parse("(float[N,3,H,W] x) => (int64[N,1,H,W] y) { y = ArgMax <axis = 1> (x) }"),
        "output 'y' is of a type .* Got int64; expected float32",
    ),
    "no graph": (parse(IMAGES + " { y = Relu (z) }"), "not a valid ONNX graph"),
}
REFUSED_BY_NCNN = {
    "sequences": (
        parse("(float[N,4,L] x) => (float[N,4,L] y) { y = Relu (x) }"),
        r"input 'x': ncnn is given images alone.* Got \[N,4,L\]; expected \(N, C, H, W\)",
    ),
    "an FRN of sequences": (frn_model(shape=("N", 4, "L")), r"ncnn computes FRN of .* alone. Got X of \[N,4,L\]"),
    "an FRN of vectors": (
        parse(
            """(float[N,3,H,W] x) => (float[N,4] y) {
                c = Conv (x, w) p = GlobalAveragePool (c) f = Flatten (p)
                y = deploynorm.FilterResponseNormalization (f, gamma, beta, tau, eps)
            }""",
            w=random(4, 3, 1, 1),
            **frn_parameters(),
        ),
        r"ncnn computes FRN of \(N, C, H, W\) alone. Got X of \[N,4\]",
    ),
    "a batch of two": (frn_model(shape=(2, 4, 3, 5)), r"input 'X': ncnn has no batch.* Fix: export it with a batch"),
    "an output without a batch": (
        parse("(float[N,3,H,W] x) => (float[1,3,H,W] y) { y = ReduceMean (x, axes) }", axes=np.array([0])),
        r"output 'y': ncnn has no batch.* Got \[1,3,H,W\]",
    ),
    "a mean over the batch": (
        parse(IMAGES + " { m = ReduceMean (x, axes) y = Sub (x, m) }", axes=np.array([-4])),
        "ReduceMean works across the images of a batch",
    ),
    "the largest of all": (parse(IMAGES + " { m = ReduceMax (x) y = Sub (x, m) }"), "ReduceMax works across"),
    "one image of the batch": (
        parse(IMAGES + " { m = Gather (x, first) y = Sub (x, m) }", first=np.array(0)),
        "Gather works across",
    ),
    "an axis that is the batch": (parse(IMAGES + " { y = Softmax <axis = 0> (x) }"), "Softmax works across"),
}


@pytest.mark.parametrize(("model", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_run_in_float32_is_refused(backend: str, model: onnx.ModelProto, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        RUNNERS[backend](model)


@pytest.mark.usefixtures("ncnn")
@pytest.mark.parametrize(("model", "problem"), REFUSED_BY_NCNN.values(), ids=REFUSED_BY_NCNN)
def test_what_ncnn_would_mistake_is_refused(model: onnx.ModelProto, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        NcnnRunner(model)


def test_what_works_within_an_image_is_not_refused(backend: str) -> None:
    text = (
        "{ s = Softmax <axis = -3> (x) m = ReduceMean (s, axes) t = Transpose <perm = [0,1,3,2]> (m) y = Add (x, t) }"
    )
    model = parse(IMAGES + " " + text, axes=np.array([1, 2, 3]))
    x = random(2, 3, 4, 5)
    with RUNNERS[backend](model) as runner, ReferenceRunner(model) as reference:
        np.testing.assert_allclose(runner.infer({"x": x})["y"], reference.infer({"x": x})["y"], **OP_FLOAT32.kwargs())


def test_empty_feeds_are_refused(backend: str) -> None:
    with RUNNERS[backend](frn_model()) as runner, pytest.raises(InputError, match=r"empty.*Got \{'X': \(0, 4, 3, 5\)"):
        runner.infer({"X": random(0, 4, 3, 5)})


@pytest.mark.usefixtures("ncnn")
def test_ncnn_takes_as_many_images_of_each_input() -> None:
    model = parse("(float[N,3,H,W] a, float[M,3,H,W] b) => (float[N,3,H,W] y) { y = Add (a, b) }")
    with pytest.raises(ModelError, match="input 'b': ncnn has no batch"):
        NcnnRunner(model)


def test_what_is_not_converted_is_said_in_a_line_and_nothing_stays(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = parse(IMAGES + " { y = other.Unknown (x) }")
    with pytest.raises(ModelError, match=r"does not convert the model: it ended with .*Unknown") as caught:
        RUNNERS[backend](model).infer({"x": random(1, 3, 4, 4)})
    assert "\n" not in str(caught.value)
    with RUNNERS[backend](frn_model()) as runner:
        runner.infer({"X": random(1, 4, 3, 5)})
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ncnn")
def test_without_pnnx_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pnnx", None)
    with pytest.raises(BackendError, match=r"pnnx: .*pip install 'deploynorm\[ncnn\]'"):
        NcnnRunner.check_available()


def test_mnn_keeps_off_the_output(require: Callable[[str], None], tmp_path: Path) -> None:
    """By itself it tells what the processor has and how precise it is, on the stream that `run --json -` writes to."""
    require("mnn")
    onnx.save(frn_model(), tmp_path / "model.onnx")
    program = f"""if True:
        import numpy as np
        from deploynorm.run.mnn import MnnRunner
        with MnnRunner({str(tmp_path / "model.onnx")!r}) as runner:
            print(len(runner.infer({{"X": np.zeros((1, 4, 3, 5), np.float32)}})))
    """
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).stdout == b"1\n"


def test_a_convolution_is_as_exact_as_float32(backend: str) -> None:
    """By default MNN is off by 5e-4 here."""
    x, w = random(1, 16, 12, 12), random(16, 16, 3, 3)
    model = parse("(float[N,16,H,W] x) => (float[N,16,H,W] y) { y = Conv <pads = [1,1,1,1]> (x, w) }", w=w)
    with RUNNERS[backend](model) as runner:
        got = runner.infer({"x": x})["y"]
    want = F.conv2d(*(torch.from_numpy(each).double() for each in (x, w)), padding=1).numpy()
    np.testing.assert_allclose(got / np.abs(want).max(), want / np.abs(want).max(), **OP_FLOAT32.kwargs())
