from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import CHANNELS, frn_model, one_node
from tolerances import OP_FLOAT32
from torch._subclasses.fake_tensor import FakeTensorMode

from deploynorm.contract import DOMAIN, OP_TYPE
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.run.onnxruntime import OnnxRuntimeRunner

X = np.random.default_rng(0).normal(size=(2, CHANNELS, 3, 5)).astype(np.float32)


def test_a_missing_package_is_an_error_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"Fix: pip install 'deploynorm\[cpu\]'") as caught:
        OnnxRuntimeRunner(b"")
    assert caught.value.exit_code == 3


@pytest.fixture
def ort(require: Callable[[str], None]) -> Any:
    require("ort")
    import onnxruntime

    return onnxruntime


MODEL = frn_model(body=True)
NEWER_IR, NEWER_OPSET = onnx.ModelProto(), onnx.ModelProto()
for newer in (NEWER_IR, NEWER_OPSET):
    newer.CopyFrom(MODEL)
NEWER_IR.ir_version = NEWER_OPSET.opset_import[0].version = 99


REFUSED: dict[str, tuple[bytes, type[DeployNormError], str]] = {
    "no body and no library": (
        frn_model().SerializeToString(),
        ModelError,
        f"{DOMAIN}::{OP_TYPE} without its function body, and the operator library.*Fix: run `deploynorm plugins build`",
    ),
    "unknown operator": (
        one_node("Nonsense", {"x": ("float32", (1,))}, ("float32", (1,))).SerializeToString(),
        ModelError,
        "holds an operator that onnxruntime .* does not know.*Nonsense.*Fix: pass the library",
    ),
    "newer IR": (
        NEWER_IR.SerializeToString(),
        BackendError,
        r"is newer than onnxruntime \d+\.\d+\.\d+ reads. Got Unsupported model IR version: 99.*Fix: upgrade",
    ),
    "newer opset": (
        NEWER_OPSET.SerializeToString(),
        BackendError,
        "is newer than onnxruntime .* reads.*Opset 99.*upgrade",
    ),
    "text": (b"this is not a model" * 20, ModelError, "not an ONNX file, or cut short"),
    "type that the operator does not have": (
        one_node("Selu", {"x": ("int64", (1,))}, ("int64", (1,))).SerializeToString(),
        ModelError,
        "holds an operator of a type that onnxruntime .* does not take.*Selu",
    ),
    "type that the kernel does not have": (
        one_node("Neg", {"x": ("bfloat16", (1,))}, ("bfloat16", (1,))).SerializeToString(),
        BackendError,
        "holds an operator that onnxruntime .* lacks for this type and provider.*Neg",
    ),
    "anything else": (
        one_node("Neg", {"x": ("float32", (1,))}, ("int64", (1,))).SerializeToString(),
        ModelError,
        "onnxruntime .* cannot run the model. Got Type Error: .*output arg",
    ),
}


@pytest.mark.usefixtures("ort")
@pytest.mark.parametrize("form", ["file", "bytes"])
@pytest.mark.parametrize(("content", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_cannot_be_loaded_is_reported_in_our_words_only(
    content: bytes,
    kind: type[DeployNormError],
    message: str,
    form: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        OnnxRuntimeRunner(path if form == "file" else content, plugins=())
    assert type(caught.value) is kind
    assert caught.value.where == (str(path) if form == "file" else "model (bytes)")
    assert "onnxruntime_src" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("ort")
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "bool"])
def test_inputs_and_outputs_of_every_dtype_pass_through(dtype: str) -> None:
    shape = ("N", 2, None)
    with OnnxRuntimeRunner(one_node("Identity", {"x": (dtype, shape)}, (dtype, shape)).SerializeToString()) as runner:
        assert runner.inputs == (TensorSpec("x", ("N", 2, "?"), dtype),)
        assert runner.output_names == ("y",)
        for size in (0, 1, 3):
            feed = (np.arange(4 * size).reshape(2, 2, size) % 3).astype(dtype)
            for array in (feed, feed[::-1], feed[:1].swapaxes(0, 0)):
                got = runner.infer({"x": array})["y"]
                assert got.dtype.name == dtype
                np.testing.assert_array_equal(got, array)


@pytest.mark.usefixtures("ort")
def test_bfloat16_keeps_the_rank_of_a_scalar_and_results_outlive_the_runner() -> None:
    model = one_node("Identity", {"x": ("bfloat16", ())}, ("bfloat16", ()))
    with OnnxRuntimeRunner(model.SerializeToString()) as runner:
        first = runner.infer({"x": np.array(1, "bfloat16")})["y"]
        runner.infer({"x": np.array(4, "bfloat16")})
    assert (first.shape, first.item()) == ((), 1)


@pytest.mark.usefixtures("ort")
def test_an_unknown_provider_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="Got 'rocm'; expected cpu or cuda or tensorrt"):
        OnnxRuntimeRunner(MODEL.SerializeToString(), providers=["rocm"])


def test_a_provider_that_was_not_built_in_is_an_error_of_the_environment(
    ort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="without the provider 'cuda'") as caught:
        OnnxRuntimeRunner(MODEL.SerializeToString(), providers=["cuda", "cpu"])
    assert "Got ['cpu']; expected cuda." in str(caught.value)
    assert "pip install 'deploynorm[gpu]'" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_provider_that_silently_gives_way_to_the_cpu_is_an_error(ort: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    else:
        # Told that it has CUDA, this build does what one does whose CUDA libraries are missing.
        monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(BackendError, match="'cuda' failed to start"):
        OnnxRuntimeRunner(MODEL.SerializeToString(), providers=["cuda"])


def test_the_session_gets_what_was_asked_for(ort: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def session(model: object, options: Any, **arguments: Any) -> None:
        seen.update(arguments, options=options)
        raise RuntimeError("seen enough")

    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ModelError, match="seen enough"):
        OnnxRuntimeRunner(b"", providers=["cuda", "cpu"], threads=3, optimize=False)
    assert seen["providers"] == [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]
    assert seen["enable_fallback"] == 0
    assert seen["options"].intra_op_num_threads == 3
    assert seen["options"].graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL


@pytest.mark.usefixtures("ort")
@pytest.mark.parametrize("content", [None, b"not a library"], ids=["missing", "not a library"])
def test_a_plugin_library_that_cannot_be_loaded_is_named(content: bytes | None, tmp_path: Path) -> None:
    library = tmp_path / "libplugin.so"
    if content is not None:
        library.write_bytes(content)
    with pytest.raises(
        BackendError, match=r"libplugin\.so: (no such|ONNX Runtime cannot load this) plugin lib"
    ) as caught:
        OnnxRuntimeRunner(MODEL.SerializeToString(), plugins=[library])
    assert caught.value.exit_code == 3


@pytest.mark.usefixtures("ort")
def test_a_failure_while_running_is_reported_in_our_words_only(capfd: pytest.CaptureFixture[str]) -> None:
    model = one_node("Reshape", {"x": ("float32", ("N",)), "shape": ("int64", ("R",))}, ("float32", None))
    with OnnxRuntimeRunner(model.SerializeToString()) as runner:
        with pytest.raises(ModelError, match=r"cannot run the model. Got .*cannot be reshaped"):
            runner.infer({"x": np.ones(6, np.float32), "shape": np.array([5])})
        got = runner.infer({"x": np.ones(6, np.float32), "shape": np.array([2, 3])})
    assert got["y"].shape == (2, 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("ort")
def test_optimizing_or_not_gives_the_same_numbers() -> None:
    content = MODEL.SerializeToString()
    with OnnxRuntimeRunner(content) as fast, OnnxRuntimeRunner(content, optimize=False, threads=1) as plain:
        got, want = fast.infer({"X": X})["Y"], plain.infer({"X": X})["Y"]
    np.testing.assert_allclose(got, want, **OP_FLOAT32.kwargs())


# ---- On PyTorch's tensors


@pytest.fixture
def bound(ort: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The addresses that ONNX Runtime is given for inputs, and those that it gives for outputs."""
    addresses: dict[str, int] = {}

    class Binding(ort.IOBinding):  # type: ignore[misc, name-defined]
        def bind_input(self, name: str, *given: Any) -> None:
            addresses[name] = given[-1]
            super().bind_input(name, *given)

        def get_outputs(self) -> list[Any]:
            values: list[Any] = super().get_outputs()
            addresses["output"] = values[0].data_ptr()
            return values

    monkeypatch.setattr(ort.InferenceSession, "io_binding", lambda session: Binding(session))
    return addresses


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "bool"])
def test_tensors_of_every_dtype_pass_without_copies(dtype: str, bound: dict[str, int]) -> None:
    shape = ("N", 2, None)
    with OnnxRuntimeRunner(one_node("Identity", {"x": (dtype, shape)}, (dtype, shape)).SerializeToString()) as runner:
        assert runner.device == torch.device("cpu")
        x = (torch.arange(12).reshape(3, 2, 2) % 3).to(getattr(torch, dtype))
        for part in (x, x[1:], x[:0]):
            y = runner.run({"x": part})["y"]
            assert y.dtype == x.dtype
            assert torch.equal(y, part)
            if part.numel():
                assert (part.data_ptr(), y.data_ptr()) == (bound["x"], bound["output"])
        for apart in (x[::2], x.transpose(0, 2)[..., :2].transpose(0, 2), x[:, :1].expand(3, 2, 2)):
            assert torch.equal(runner.run({"x": apart})["y"], apart)


@pytest.mark.usefixtures("ort")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensors_give_what_arrays_give_and_outlive_the_runner(dtype: str) -> None:
    with OnnxRuntimeRunner(frn_model(dtype, body=True).SerializeToString()) as runner:
        wanted, given = [], []
        for size in (1, 5, 2):  # each output of another size
            x = torch.from_numpy(np.resize(X, (size, CHANNELS, 3, size))).to(getattr(torch, dtype)).requires_grad_()
            wanted.append(runner.infer({"X": x.detach().numpy()})["Y"])
            given.append(runner.run({"X": x})["Y"])
    del runner
    for y, want in zip(given, wanted, strict=True):
        assert not y.requires_grad
        np.testing.assert_array_equal(y.numpy(), want)


@pytest.mark.usefixtures("ort")
def test_a_size_that_values_decide_and_a_scalar() -> None:
    with OnnxRuntimeRunner(
        one_node("NonZero", {"x": ("float32", ("N",))}, ("int64", None)).SerializeToString()
    ) as runner:
        for values in ([0.0, 2.0, 3.0], [0.0], [1.0]):
            assert torch.equal(runner.run({"x": torch.tensor(values)})["y"], torch.tensor(values).nonzero().T)
    with OnnxRuntimeRunner(one_node("Neg", {"x": ("float32", ())}, ("float32", ())).SerializeToString()) as runner:
        assert runner.run({"x": torch.tensor(2.0)})["y"].tolist() == -2.0
        assert runner.run({"x": torch.tensor(1 + 3j).conj().imag})["y"].tolist() == 3.0  # in memory it is 3, not -3


NONE = torch.zeros(X.shape)
TENSORS: dict[str, tuple[Any, str]] = {
    "an array": (X, r"input 'X' is none that can be bound. Got ndarray; expected a torch.Tensor. .*infer"),
    "on another device": (
        torch.empty(X.shape, device="meta"),
        r"Got meta; expected cpu. Fix: move it with .to\('cpu'\)",
    ),
    "another type": (
        torch.zeros(X.shape, dtype=torch.float64),
        r"Got torch.float64; expected float32. .*torch.float32",
    ),
    "sparse": (NONE.to_sparse(), r"Got torch.sparse_coo; expected a dense tensor"),
    "another rank": (torch.zeros(2, CHANNELS), r"'X' has the wrong rank. Got \(2, 4\); expected \(N, 4, H, W\)"),
    "another size": (torch.zeros(2, 3, 5, 5), r"the wrong size on axis 1. Got \(2, 3, 5, 5\)"),
}


@pytest.mark.usefixtures("ort")
@pytest.mark.parametrize(("value", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_cannot_be_bound(value: Any, message: str) -> None:
    with OnnxRuntimeRunner(MODEL.SerializeToString()) as runner:
        with pytest.raises(InputError, match=f"OnnxRuntimeRunner.run: .*{message}"):
            runner.run({"X": value})
        assert runner.run({"X": torch.from_numpy(X)})["Y"].shape == X.shape
    with pytest.raises(InputError, match=r"OnnxRuntimeRunner\.run: the runner is closed"):
        runner.run({"X": torch.from_numpy(X)})


@pytest.mark.usefixtures("ort")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_that_hold_no_values_are_refused() -> None:
    with OnnxRuntimeRunner(MODEL.SerializeToString()) as runner:
        with FakeTensorMode():
            fake = torch.zeros(X.shape)
        with pytest.raises(InputError, match=r"Got FakeTensor without memory; expected a tensor that holds values"):
            runner.run({"X": fake})
        with pytest.raises(InputError, match=r"without memory"):
            torch.func.vmap(lambda x: runner.run({"X": x})["Y"])(torch.from_numpy(X)[None])


@pytest.mark.usefixtures("ort")
def test_a_failure_on_tensors_is_reported_in_our_words() -> None:
    model = one_node("Reshape", {"x": ("float32", ("N",)), "shape": ("int64", ("R",))}, ("float32", None))
    with OnnxRuntimeRunner(model.SerializeToString()) as runner:
        with pytest.raises(ModelError, match=r"cannot run the model. Got .*cannot be reshaped"):
            runner.run({"x": torch.ones(6), "shape": torch.tensor([5])})
        assert runner.run({"shape": torch.tensor([2, 3]), "x": torch.ones(6)})["y"].shape == (2, 3)
