"""ONNX -> engine: what each TensorRT is asked for, and what is refused before or after it has seen the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from fake_tensorrt import STOCK
from machines import install_builder
from rtx_builds import conv_frn_conv

from deploynorm._build import build
from deploynorm.contract import OP_TYPE
from deploynorm.errors import BackendError, InputError, ModelError

FREE = ("N", 64, "H", "W")
RANGE = {"min_shapes": {"": (1, 64, 8, 8)}, "opt_shapes": {"": (4, 64, 8, 8)}, "max_shapes": {"": (8, 64, 16, 16)}}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """full("10.9.0") makes it the TensorRT of this machine, one of Python that builds."""
    return functools.partial(install_builder, monkeypatch)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libplugin.so"
    path.touch()
    return path


NET = conv_frn_conv("float16", (2, 16, 8, 8))


@pytest.mark.parametrize("version", ["10.3.0", "10.9.0", "11.4.0"])
@pytest.mark.parametrize("way", ["native", "plugin"])
def test_every_version_builds_typed_networks_down_the_way_asked_for(
    version: str, way: Any, full: Callable[..., Any], library: Path
) -> None:
    module, before = full(version), NET.SerializeToString()
    engine = build(NET, frn=way, plugins=[library])
    assert (engine.backend, engine.version, engine.compute_capabilities) == ("tensorrt", version, ("9.0",))
    assert (engine.precision, engine.frn.way) == ("float16", way)
    assert engine.frn.plugin_layers == (way == "plugin")
    assert module.seen["strongly typed"] is (True if version.startswith("10") else None)
    parsed = onnx.load_from_string(module.seen["model"])
    # Before TensorRT 10.7 a function beats a plugin: on the way of the plugin none is left.
    assert [function.name for function in parsed.functions] == ([] if way == "plugin" else [f"{OP_TYPE}Body"])
    assert NET.SerializeToString() == before


def test_options_reach_tensorrt(full: Callable[..., Any], library: Path) -> None:
    module = full()
    options: dict[str, Any] = {"version_compatible": True, "hardware_compatible": "ampere+", "optimization_level": 2}
    options |= {"embed_plugin": True, "timing_cache": b"old ", "workspace": 2**20}
    engine = build(NET, frn="plugin", plugins=[library], **options)
    assert engine.timing_cache == b"old and new"
    assert engine.to_dict()["version_compatible"] is True
    assert engine.embedded == (library.name,)
    config = module.seen["config"]
    assert config.plugins_to_serialize == [str(library)]
    assert config.pools == {"WORKSPACE": 2**20}
    assert config.flags == {"VERSION_COMPATIBLE", "STRICT_NANS"}  # and TF32 is cleared
    assert (config.hardware_compatibility_level, config.builder_optimization_level) == ("AMPERE_PLUS", 2)
    assert config.profiling_verbosity == "DETAILED"


def test_a_timing_cache_that_tensorrt_does_not_take_is_begun_anew(full: Callable[..., Any]) -> None:
    full()
    for given in (b"of another GPU", b"damaged"):
        engine = build(NET, frn="native", timing_cache=given)
        assert engine.timing_cache == b"and new"
        assert "the timing cache was begun anew" in str(engine)
        assert list(engine.notes) == engine.to_dict()["notes"]
    assert build(NET, frn="native", timing_cache=b"").notes == ()


def test_gpus_of_one_kind_are_a_choice_of_tensorrt_10_9_and_later(full: Callable[..., Any]) -> None:
    full("10.8.0")
    with pytest.raises(InputError, match=r"--hardware-compatible same: TensorRT 10\.8\.0 does not have this.*10\.9"):
        build(NET, frn="native", hardware_compatible="same")
    module = full("10.9.0")
    build(NET, frn="native", hardware_compatible="same")
    assert module.seen["config"].hardware_compatibility_level == "SAME_COMPUTE_CAPABILITY"


@pytest.mark.parametrize("way", ["native", "plugin"])
def test_stock_plugins_are_there_for_the_parser(way: Any, full: Callable[..., Any], library: Path) -> None:
    module = full()
    build(NET, frn=way, plugins=[library])
    assert STOCK in module.registry.creators


def test_tf32_is_for_those_who_ask_and_free_axes_get_their_range(full: Callable[..., Any]) -> None:
    module = full()
    assert build(NET, frn="native", tf32=True).tf32
    assert "TF32" in module.seen["config"].flags
    assert module.seen["config"].profiles == []
    build(conv_frn_conv("float16", FREE), frn="native", **RANGE)
    assert module.seen["config"].profiles == [{"x": tuple(RANGE[f"{key}_shapes"][""] for key in ("min", "opt", "max"))}]


def test_several_optimization_profiles_reach_tensorrt_and_the_record(full: Callable[..., Any]) -> None:
    module, model = full(), conv_frn_conv("float16", FREE)
    small, large = (1, 64, 8, 8), (8, 64, 64, 64)
    engine = build(model, frn="native", min_shapes=[{"": small}] * 2, max_shapes=[{"": small}, {"x": large}])
    assert module.seen["config"].profiles == [{"x": (small, small, small)}, {"x": (small, large, large)}]
    assert [profile["x"]["max"] for profile in engine.to_dict()["profiles"]] == [[*small], [*large]]
    assert "8x64x64x64" in str(engine)
    several = [{"": small}, {"": large}]
    with pytest.raises(InputError, match=r"--min-shapes: is given for another number of profiles\. Got 1; expected 2"):
        build(model, frn="native", min_shapes={"": small}, opt_shapes=several)
    with pytest.raises(InputError, match="two optimization profiles are the same"):
        build(model, frn="native", opt_shapes=several[:1] * 2)


def test_the_types_of_an_engine_are_those_that_its_layers_tell(full: Callable[..., Any]) -> None:
    full(layer_dtype="Float")
    with pytest.raises(ModelError, match="built 2 of 2 products in another type than the graph has"):
        build(NET, frn="native")
    full(layer_dtype=None)
    engine = build(NET, frn="native")
    assert (engine.precision, engine.verified_products, engine.products) == (None, 0, 2)
    full(in_log=False)  # and the inspector tells it
    engine = build(NET, frn="native")
    assert (engine.precision, engine.verified_products) == ("float16", 2)


def test_an_engine_with_the_plugin_inside_is_inspected(full: Callable[..., Any], library: Path) -> None:
    """For which the library in it must be permitted to run."""
    full(in_log=False)
    engine = build(NET, frn="plugin", plugins=[library])
    assert (engine.precision, engine.verified_products, engine.frn.plugin_layers) == ("float16", 2, 1)


@pytest.mark.parametrize("in_log", [True, False])
@pytest.mark.parametrize(("where", "verb"), [("parser", "take"), ("builder", "keep")])
def test_a_plugin_that_was_not_taken_is_an_error(
    where: str, verb: str, in_log: bool, full: Callable[..., Any], library: Path
) -> None:
    full(loses_plugin_in=where, in_log=in_log)
    with pytest.raises(ModelError, match=rf"did not {verb} the plugin for every FRN layer. Got 0; expected 1"):
        build(NET, frn="plugin", plugins=[library])


def test_a_library_without_our_plugin_is_reported(full: Callable[..., Any], library: Path) -> None:
    full().registry.brings = {("Other", "1", "")}
    with pytest.raises(BackendError, match="none of them brings our FRN plugin"):
        build(NET, frn="plugin", plugins=[library])


@pytest.mark.parametrize("faster", ["native", "plugin"])
def test_auto_keeps_the_faster_on_this_gpu(
    faster: Any, full: Callable[..., Any], library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full()
    times = {"plugin": 2.0, "native": 2.0, faster: 1.5}
    monkeypatch.setattr("deploynorm.run.timing.milliseconds", lambda engines: {way: times[way] for way in engines})
    engine = build(NET, plugins=[library])
    assert engine.frn.way == faster
    assert dict(engine.frn.milliseconds) == times
    assert "the faster on this machine" in engine.frn.reason
    assert f"{faster} 1.500 ms" in engine.frn.reason


@pytest.mark.usefixtures("without_library")
def test_auto_without_the_plugin_is_native_and_says_why(full: Callable[..., Any]) -> None:
    full()
    engine = build(NET)
    assert engine.frn.way == "native"
    assert "the plugin is not there" in engine.frn.reason
    with pytest.raises(BackendError, match="deploynorm plugins build --cuda"):
        build(NET, frn="plugin")


def test_auto_does_not_pass_over_a_library_that_the_user_named(full: Callable[..., Any], library: Path) -> None:
    module = full()
    with pytest.raises(BackendError, match=r"none\.so: no such plugin library"):
        build(NET, plugins=[library.with_name("none.so")])
    module.registry.brings = {("Other", "1", "")}
    engine = build(NET, plugins=[library])
    assert engine.frn.way == "native"
    assert "none of them brings our FRN plugin" in engine.frn.reason


def test_a_model_without_frn_needs_no_way(full: Callable[..., Any]) -> None:
    full()
    model = conv_frn_conv("float16", (2, 16, 8, 8), layers=0)
    engine = build(model)
    assert (engine.frn.way, engine.frn.nodes) == (None, 0)
    with pytest.raises(ModelError, match=r"has no node .*, so there is nothing for the plugin"):
        build(model, frn="plugin")


def test_without_a_driver_tensorrt_itself_cannot_build(full: Callable[..., Any]) -> None:
    full(gpu=None)
    with pytest.raises(BackendError, match=r"needs an NVIDIA GPU.*Fix: install the driver; only TensorRT-RTX"):
        build(NET, frn="native")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another GPU than this": ({"compute_capabilities": ["8.9"]}, "the GPU of this machine only. Got 8.9; expected 9.0"),
    "an unknown way": ({"frn": "fast"}, "unknown way for FRN. Got 'fast'"),
    "an unknown backend": ({"backend": "tensorflow"}, "no backend that builds. Got 'tensorflow'"),
    "one that only runs engines": ({"backend": "tensorrt-lean"}, "no backend that builds. Got 'tensorrt-lean'"),
    "an unknown compatibility": ({"hardware_compatible": "all"}, "--hardware-compatible: unknown"),
    "less than no workspace": ({"workspace": -1}, "--workspace: out of range"),
    "more workspace than TensorRT can be told": ({"workspace": 2**64}, "--workspace: out of range"),
    "a level out of range": ({"optimization_level": 6}, "--optimization-level: out of range. Got 6; expected 0 to 5"),
    "a shape for no input": ({"opt_shapes": {"z": (1,)}}, "no input is called 'z'"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str, full: Callable[..., Any]) -> None:
    full()
    with pytest.raises(InputError, match=message):
        build(NET, **options)


def test_a_free_input_without_a_range_is_named(full: Callable[..., Any]) -> None:
    full()
    with pytest.raises(InputError, match=r"input x: some of its axes are dynamic.*Got Nx64xHxW.*Fix: --min-shapes"):
        build(conv_frn_conv("float16", FREE))
