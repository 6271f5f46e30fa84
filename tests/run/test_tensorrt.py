"""The runner of engines. Where there is no GPU, on a TensorRT of Python that keeps TensorRT's rules."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from fake_tensorrt import ALIGNMENT, FakeGpu, fake_tensorrt, plan

from deploynorm import run
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.run import tensorrt, timing
from deploynorm.run.tensorrt import TensorRTRunner
from deploynorm.trt import gpu
from deploynorm.trt.engine import Engine, FrnRecord
from deploynorm.trt.manifest import manifest_path
from deploynorm.trt.settings import Range

IMAGES = ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 16, 16))
ENGINE = plan({"x": IMAGES}, {"y": "x"})


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """TensorRT 11 on a GPU of compute capability 9.0, neither of them real."""
    module = fake_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("deploynorm.trt.importing._LOGGERS", {})
    monkeypatch.setattr("deploynorm.trt.plugins._LOADED", {})
    monkeypatch.setattr(gpu, "_ALIGNMENT", ALIGNMENT)
    monkeypatch.setattr(tensorrt, "Gpu", FakeGpu)
    monkeypatch.setattr(tensorrt, "gpu_here", lambda: "9.0")
    monkeypatch.setattr(tensorrt, "find_library", lambda name: None)
    return module


def images(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_an_engine_runs_on_arrays_of_every_shape_of_its_range_until_it_is_closed() -> None:
    with TensorRTRunner(ENGINE) as runner:
        assert runner.name == "tensorrt (cpu)"
        assert runner.inputs == (TensorSpec("x", ("?", 3, "?", "?"), "float32"),)
        assert runner.output_names == ("y",)
        assert runner.precision is None
        for shape in (IMAGES[0], IMAGES[2], (3, 3, 9, 15), IMAGES[0]):
            x = images(*shape)
            got = runner.infer({"x": x})["y"]
            np.testing.assert_array_equal(got, 2 * x)
    runner.close()
    for call in (lambda: runner.infer({"x": images(*IMAGES[0])}), lambda: runner.run({})):
        with pytest.raises(InputError, match="the runner is closed"):
            call()


@pytest.mark.parametrize("dtype", ["FLOAT", "HALF", "BF16", "INT64"])
def test_every_dtype_passes_through(dtype: str) -> None:
    numpy = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}[dtype]
    x = np.arange(6).astype(ml_dtypes.bfloat16 if numpy == "bfloat16" else numpy).reshape(2, 3)
    with TensorRTRunner(plan({"x": ((2, 3),) * 3}, {"y": "x"}, dtype=dtype)) as runner:
        got = runner.infer({"x": x[:, ::-1]})["y"]
    assert got.dtype.name == numpy
    np.testing.assert_array_equal(got.astype(np.float64), 2 * x[:, ::-1].astype(np.float64))


def test_empty_tensors_have_an_address_too() -> None:
    with TensorRTRunner(plan({"x": ((0, 3), (2, 3), (2, 3))}, {"y": "x"})) as runner:
        assert runner.infer({"x": images(0, 3)})["y"].shape == (0, 3)


def test_tensors_need_not_be_contiguous_or_aligned() -> None:
    flat = torch.arange(2 * 3 * 8 * 8 + 1, dtype=torch.float32)
    with TensorRTRunner(ENGINE) as runner:
        for x in (flat[1:].view(2, 3, 8, 8), flat[:-1].view(2, 8, 8, 3).permute(0, 3, 1, 2)):
            before = x.clone()
            torch.testing.assert_close(runner.run({"x": x})["y"], 2 * before, rtol=0, atol=0)
            torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_results_are_not_changed_by_later_calls(cuda_graphs: bool) -> None:
    with TensorRTRunner(ENGINE, cuda_graphs=cuda_graphs) as runner:
        x = torch.ones(IMAGES[1])
        first = runner.run({"x": x})["y"]
        second = runner.run({"x": 5 * x})["y"]
    assert first.unique().tolist() == [2]
    assert second.unique().tolist() == [10]


def test_a_shape_is_captured_once_and_the_oldest_goes() -> None:
    with TensorRTRunner(ENGINE, cuda_graphs=True) as runner:
        gpu: Any = runner._gpu
        for shape in (IMAGES[0], IMAGES[1], IMAGES[0], IMAGES[1]):
            x = torch.from_numpy(images(*shape))
            torch.testing.assert_close(runner.run({"x": x})["y"], 2 * x, rtol=0, atol=0)
        assert gpu.captures == 2
        for width in range(8, 16):
            runner.run({"x": torch.zeros(1, 3, 8, width)})
        assert gpu.captures == 2 + 7
        assert len(runner._captured) == 8
        runner.run({"x": torch.zeros(IMAGES[1])})  # has gone: 8 others were used since
        assert gpu.captures == 2 + 7 + 1


def test_an_output_whose_size_depends_on_values_is_allocated_when_it_is_known() -> None:
    engine = plan({"x": ((0, 3), (2, 3), (4, 3))}, {"y": "x"}, values_decide=True)
    with TensorRTRunner(engine) as runner:
        for rows in (2, 4, 0):
            x = images(rows, 3)
            np.testing.assert_array_equal(runner.infer({"x": x})["y"], 2 * x)
        assert len(runner._contexts[0].context.kept) == 1  # or every output ever made would stay in memory
        assert [output._memory for output in runner._contexts[0].waiting.values()] == [None]
    with TensorRTRunner(engine, cuda_graphs=True) as runner, pytest.raises(InputError, match="cuda_graphs=False"):
        runner.infer({"x": images(2, 3)})


BIG = ((8, 3, 64, 64), (8, 3, 64, 64), (8, 3, 96, 96))
MORE = ((1, 3, 8, 8), (3, 3, 8, 8), (8, 3, 64, 64))
PROFILES = plan({"x": IMAGES}, {"y": "x"}, more_profiles=[{"x": BIG}, {"x": MORE}])


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_run_takes_the_profile_that_is_tuned_for_its_shapes_else_the_first_that_holds_them(cuda_graphs: bool) -> None:
    wanted = {IMAGES[0]: 0, BIG[1]: 1, BIG[2]: 1, MORE[1]: 2, (5, 3, 8, 8): 2, IMAGES[2]: 0}
    with TensorRTRunner(PROFILES, cuda_graphs=cuda_graphs) as runner:
        assert runner.inputs == (TensorSpec("x", ("?", 3, "?", "?"), "float32"),)
        taken = []
        for shape in (*wanted, *wanted):
            x = torch.from_numpy(images(*shape))
            torch.testing.assert_close(runner.run({"x": x})["y"], 2 * x, rtol=0, atol=0)
            made = [each.context for each in runner._captured.values()] if cuda_graphs else runner._contexts.values()
            taken += [each.context.profile for each in made if each.context.shapes["x"] == shape]
        assert taken == [*wanted.values()] * 2
        assert runner._engine.contexts == (1 + len(wanted) if cuda_graphs else 3)
        message = r"input 'x': is outside .* Got \(9, 3, 8, 8\); expected .* or \(8, 3, 64, 64\) to \(8, 3, 96, 96\) or"
        with pytest.raises(InputError, match=message):
            runner.run({"x": torch.zeros(9, 3, 8, 8)})


def test_shapes_that_no_profile_holds_together_are_refused() -> None:
    profiles = [{"a": ((rows, 2),) * 3, "b": ((rows,),) * 3} for rows in (1, 2)]
    with TensorRTRunner(plan(profiles[0], {"y": "a"}, more_profiles=profiles[1:])) as runner:
        assert runner.infer({"a": images(2, 2), "b": images(2)})["y"].shape == (2, 2)
        with pytest.raises(InputError, match=r"no profile holds all of them. Got {'a': \(1, 2\), 'b': \(2,\)}"):
            runner.infer({"a": images(1, 2), "b": images(2)})


def test_several_inputs_and_outputs_keep_their_names_and_order() -> None:
    engine = plan({"a": ((1, 2),) * 3, "b": ((3,),) * 3}, {"twice_b": "b", "twice_a": "a"})
    with TensorRTRunner(engine) as runner:
        assert [spec.name for spec in runner.inputs] == ["a", "b"]
        got = runner.infer({"b": images(3), "a": images(1, 2)})
    assert list(got) == ["twice_b", "twice_a"]
    np.testing.assert_array_equal(got["twice_a"], 2 * images(1, 2))


FEEDS: dict[str, tuple[Callable[[TensorRTRunner], object], str]] = {
    "outside the profile": (
        lambda runner: runner.infer({"x": images(5, 3, 8, 8)}),
        r"outside the shapes that the engine was built for. Got \(5, 3, 8, 8\); expected .*Fix: feed another shape",
    ),
    "another number of channels": (lambda runner: runner.infer({"x": images(1, 4, 8, 8)}), "wrong size on axis 1"),
    "another rank": (lambda runner: runner.run({"x": torch.zeros(3, 8, 8)}), "outside the shapes"),
    "another dtype": (lambda runner: runner.run({"x": torch.zeros(1, 3, 8, 8).half()}), "wrong dtype"),
    "another name": (lambda runner: runner.run({"z": torch.zeros(1, 3, 8, 8)}), r"not the engine's inputs.*\['x'\]"),
    "another device": (
        lambda runner: runner.run({"x": torch.zeros(1, 3, 8, 8, device="meta")}),
        "on another device. Got meta; expected cpu",
    ),
}


@pytest.mark.parametrize(("call", "message"), FEEDS.values(), ids=FEEDS)
def test_feeds_that_do_not_fit_are_refused(call: Callable[[TensorRTRunner], object], message: str) -> None:
    with TensorRTRunner(ENGINE) as runner:
        with pytest.raises(InputError, match=message):
            call(runner)
        np.testing.assert_array_equal(runner.infer({"x": images(*IMAGES[0])})["y"], 2 * images(*IMAGES[0]))


REFUSED: dict[str, tuple[bytes, type[DeployNormError], str]] = {
    "text": (b"not an engine" * 9, ModelError, "is not an engine of TensorRT 11.4.0, or is damaged"),
    "another version": (
        plan({"x": IMAGES}, {"y": "x"}, version="10.9.0"),
        BackendError,
        "is not an engine of TensorRT 11.4.0: another version.*expecting library version 11.4.0 got 10.9.0.*Fix: build",
    ),
    "another GPU": (
        plan({"x": IMAGES}, {"y": "x"}, compute="8.6"),
        BackendError,
        "was built for another kind of GPU.*compute 9.0 got compute 8.6.*Fix: build it here",
    ),
    "our plugin": (
        plan({"x": IMAGES}, {"y": "x"}, plugin=True),
        BackendError,
        "holds our FRN plugin, which TensorRT 11.4.0 has not loaded.*Fix: deploynorm plugins build --cuda",
    ),
    "code for the processor": (
        plan({"x": IMAGES}, {"y": "x"}, host_code=True),
        InputError,
        "holds code for the processor.*Fix: pass trust_engine=True",
    ),
    "a library that TensorRT runs in any case": (
        plan({"x": IMAGES}, {"y": "x"}, library=True),
        InputError,
        "holds code for the processor.*Fix: pass trust_engine=True",
    ),
    "input in the processor's memory": (
        plan({"host_sizes": ((2,),) * 3}, {"y": "host_sizes"}, dtype="INT64"),
        ModelError,
        "host_sizes: lies in the processor's memory",
    ),
}


@pytest.mark.parametrize(("content", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_an_engine_that_does_not_run_here_is_reported_in_our_words(
    content: bytes, kind: type[DeployNormError], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(content)
    for form in (content, path):
        with pytest.raises(kind, match=message) as caught:
            TensorRTRunner(form)
        assert type(caught.value) is kind


def test_the_plugin_is_loaded_once_for_engines_that_hold_it(
    fake: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "libplugin.so"
    library.touch()
    content = plan({"x": IMAGES}, {"y": "x"}, plugin=True)
    for _ in range(2):
        TensorRTRunner(content, plugins=[library]).close()
    assert fake.registry.libraries == [str(library)]


def test_an_engine_with_a_plugin_of_nvidias_runs(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    content = plan({"x": IMAGES}, {"y": "x"}, stock_plugin=True)
    TensorRTRunner(content).close()
    fake.registry.creators.clear()
    monkeypatch.delattr(fake, "init_libnvinfer_plugins")  # as in the lean runtime
    TensorRTRunner(ENGINE).close()
    with pytest.raises(BackendError, match=r"holds a plugin that TensorRT 11\.4\.0 has not loaded"):
        TensorRTRunner(content)


def _with_manifest(path: Path, **facts: object) -> Path:
    path.write_bytes(ENGINE)
    manifest_path(path).write_text(json.dumps({"engine": {"backend": "tensorrt", "version": "11.4.0", **facts}}))
    return path


def test_the_manifest_brings_the_names_of_free_axes_and_the_type(tmp_path: Path) -> None:
    path = _with_manifest(
        tmp_path / "model.engine",
        precision="float16",
        inputs=[{"name": "x", "dtype": "float32", "shape": ["N", 3, "H", "H"]}],
        compute_capabilities=["8.6", "9.0"],
    )
    with TensorRTRunner(path) as runner:
        assert runner.inputs == (TensorSpec("x", ("N", 3, "H", "H"), "float32"),)
        assert runner.precision == "float16"
        with pytest.raises(InputError, match="'H' is already 8 on axis 2"):
            runner.infer({"x": images(1, 3, 8, 9)})


MANIFESTS: dict[str, tuple[dict[str, object], type[DeployNormError], str]] = {
    "another flavour": (
        {"backend": "tensorrt-rtx", "version": "1.7.1"},
        BackendError,
        r"cannot be imported \(tensorrt_rtx: ",
    ),
    "another major version": (
        {"version": "10.9.0"},
        BackendError,
        "was built with another TensorRT. Got tensorrt 10.9.0; expected tensorrt 11.4.0, as installed here",
    ),
    "a later major version": (
        {"version": "12.0.0", "version_compatible": True},
        BackendError,
        "was built with another TensorRT. Got tensorrt 12.0.0; expected tensorrt 11.4.0, as installed here",
    ),
    "a flag that is none": ({"version_compatible": "yes"}, ModelError, "is damaged: version_compatible of the engine"),
    "another GPU": (
        {"compute_capabilities": ["8.6", "8.9"]},
        BackendError,
        "another kind of GPU. Got compute capability 8.6, 8.9; expected 9.0, as here.*--compute-capability 9.0",
    ),
    "a GPU whose number is inside another": (
        {"compute_capabilities": ["19.0", "9.05"]},
        BackendError,
        "another kind of GPU. Got compute capability 19.0, 9.05; expected 9.0",
    ),
    "a GPU as bare text": (
        {"compute_capabilities": "9.0"},
        ModelError,
        "is damaged: compute_capabilities of the engine",
    ),
    "the plugin, which is not built": ({"frn": {"way": "plugin"}}, BackendError, "Fix: .*deploynorm plugins build"),
}


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize(("facts", "kind", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_the_manifest_tells_of_a_misfit_before_tensorrt_does(
    facts: dict[str, object],
    kind: type[DeployNormError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(kind, match=message):
        TensorRTRunner(_with_manifest(tmp_path / "model.engine", **facts))


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_lean", "tensorrt_dispatch_bindings"])
def test_a_version_compatible_engine_runs_in_a_later_tensorrt_and_in_its_runtimes(
    module: str, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", module):
        monkeypatch.setitem(sys.modules, name, fake if name == module else None)
    path = _with_manifest(tmp_path / "model.engine", version="10.9.0", version_compatible=True)
    with TensorRTRunner(path) as runner:
        assert runner.name.startswith(module.removesuffix("_bindings").replace("_", "-"))
        assert runner.infer({"x": images(*IMAGES[0])})["y"].shape == IMAGES[0]
    path = _with_manifest(tmp_path / "model.engine", version="11.4.0", version_compatible=False)
    if module == "tensorrt":
        TensorRTRunner(path).close()
    else:
        with pytest.raises(
            BackendError, match=r"is not version compatible, and .* runtime 11.* no other engines.*Fix: build"
        ):
            TensorRTRunner(path, backend=module.removesuffix("_bindings").replace("_", "-"))


def test_a_pipe_or_a_folder_is_no_plugin_library(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for library in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(BackendError, match="no plugin library: not a regular file"):
            TensorRTRunner(ENGINE, plugins=[library])


@pytest.mark.parametrize("content", ["{", "[]", '{"engine": 3}'])
def test_a_damaged_manifest_is_named(content: str, tmp_path: Path) -> None:
    path = _with_manifest(tmp_path / "model.engine")
    manifest_path(path).write_text(content)
    with pytest.raises(ModelError, match=r"model\.engine\.json.*Fix: remove it, or build"):
        TensorRTRunner(path)


def test_files_that_are_no_engines_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.engine: no such file"):
        TensorRTRunner(tmp_path / "none.engine")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ModelError, match=r"is an ONNX file.*Fix: deploynorm build .*model\.onnx"):
        TensorRTRunner(tmp_path / "model.onnx")


def test_open_runner_knows_engines_by_their_ending_and_by_name(tmp_path: Path) -> None:
    for name, options in {"model.engine": {}, "model.plan": {}, "model": {"backend": "tensorrt"}}.items():
        (tmp_path / name).write_bytes(ENGINE)
        with run.open_runner(tmp_path / name, **options) as runner:
            assert isinstance(runner, TensorRTRunner)
    with pytest.raises(InputError, match=r"the tensorrt backend takes no (providers|threads)"):
        run.open_runner(tmp_path / "model.plan", threads=2)
    (tmp_path / "model.engine").write_bytes(plan({"x": IMAGES}, {"y": "x"}, host_code=True))
    with run.open_runner(tmp_path / "model.engine", trust_engine=True) as runner:
        assert runner.infer({"x": images(*IMAGES[0])})["y"].shape == IMAGES[0]
    with pytest.raises(InputError, match="the onnxruntime backend takes no trust_engine"):
        run.open_runner(tmp_path / "model.onnx", trust_engine=True)


def test_engines_are_timed_in_turns_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    closed: list[str] = []

    class Clock:
        """One tick a call."""

        def record(self) -> None:
            self.tick = len(calls)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Clock) -> float:
            # The first engine takes 2 ms a call, and once a hundred.
            first = calls[end.tick - 1] == "plugin"
            return (end.tick - self.tick) * (1.0 if not first else 100.0 if self.tick < 60 else 2.0)

    class Watched(TensorRTRunner):
        def run(self, feeds: Any) -> Any:
            calls.append("native" if self.inputs[0].name == "n" else "plugin")
            assert feeds[self.inputs[0].name].shape == (2, 3)
            return super().run(feeds)

        def close(self) -> None:
            closed.append(self.inputs[0].name)
            super().close()

    monkeypatch.setattr(timing, "TensorRTRunner", Watched)
    monkeypatch.setattr(timing, "_event", Clock)
    engines = {way: built(name) for way, name in (("plugin", "p"), ("native", "n"))}
    assert timing.milliseconds(engines) == {"plugin": 2.0, "native": 1.0}
    assert closed == ["p", "n"]
    rounds = calls[2 * timing._WARM_UP :]
    assert rounds.count("plugin") == rounds.count("native") == timing._ROUNDS * timing._CALLS
    assert rounds[: 2 * timing._CALLS] == ["plugin"] * timing._CALLS + ["native"] * timing._CALLS


def built(name: str) -> Engine:
    """What a build returns for a network of one input of that name."""
    shapes = Range((1, 3), (2, 3), (4, 3))
    return Engine(
        plan=plan({name: shapes}, {"y": name}, host_code=True),
        backend="tensorrt",
        version="11.4.0",
        compute_capabilities=("9.0",),
        inputs=(TensorSpec(name, ("N", 3), "float32"),),
        profiles=({name: shapes},),
        outputs=(TensorSpec("y", ("?", 3), "float32"),),
        frn=FrnRecord(0, None, 0, ""),
        layers=(),
        precision=None,
        verified_products=0,
        products=0,
        tf32=False,
    )


def test_a_machine_without_a_gpu_is_reported_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what `fake` has of a GPU
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"no CUDA device|was built without CUDA") as caught:
        TensorRTRunner(ENGINE)
    assert caught.value.exit_code == 3
    assert "PyTorch finds no GPU" in str(run.available()["tensorrt"])


def test_without_tensorrt_both_ways_to_get_it_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        BackendError, match="pip install tensorrt or, for RTX cards, pip install tensorrt_rtx"
    ) as caught:
        TensorRTRunner(ENGINE)
    assert run.available()["tensorrt"] == str(caught.value)
