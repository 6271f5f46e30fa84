"""The TensorRT plugin, driven as TensorRT drives one, over the kernels in the emulation on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES, NUMPY_DTYPES, NormCase, make_inputs, tolerance, want
from emulated import build_host, build_plugin
from tensorrt_host import (
    LAYOUTS,
    RUNTIME,
    Field,
    FieldType,
    Format,
    Host,
    Plugin,
    Tensor,
    formats_of,
    inputs_and_output,
    run,
)

from deploynorm.contract import DOMAIN, INPUTS, NODE_ATTRIBUTES, OP_TYPE, PARAMETERS, VERSION
from deploynorm.libraries import TENSORRT_LIBRARY

HOSTS = ("libnvinfer.so.10", "libtensorrt_rtx.so.1")
DTYPES = ("float32", "float16", "bfloat16")
OURS = [case for case in CASES if case.dtype in DTYPES]

SHAPES = {rank: (2, 12, *[4] * (rank - 2)) for rank in range(1, 9)} | {1: (12,)}
"""A shape of each rank that TensorRT knows."""


@pytest.fixture(scope="session")
def headers(require: Callable[[str], None]) -> Path:
    require("compiler")
    require("trt-headers")
    return Path(os.environ["TENSORRT_INCLUDE_DIR"])


@pytest.fixture(scope="session")
def built(headers: Path, build_once: Callable[..., Path]) -> Path:
    """A folder of the plugin on the emulation and of two hosts for it."""

    def build(folder: Path) -> None:
        build_plugin(folder, headers)
        for name in HOSTS:
            build_host(folder, headers, name)

    return build_once("plugin", build)


@pytest.fixture(scope="session")
def host(built: Path) -> Host:
    return Host(built / HOSTS[0], built / TENSORRT_LIBRARY)


@pytest.fixture(scope="session")
def rtx(built: Path) -> Host:
    """A host that the plugin has to take for TensorRT-RTX."""
    return Host(built / HOSTS[1], built / TENSORRT_LIBRARY)


@pytest.fixture
def plugin(host: Host) -> Plugin:
    made = host.create()
    assert made is not None
    return made


TAKEN = [(dtype, format) for dtype in DTYPES for format in formats_of(dtype, 4)]
"""Every type in every format."""


# ---- What it computes


@pytest.mark.parametrize("case", OURS, ids=str)
def test_every_case_in_every_format(case: NormCase, host: Host) -> None:
    for format in formats_of(case.dtype, len(case.shape)):
        y = run(host, case, format)
        assert y.dtype == NUMPY_DTYPES[case.dtype]
        np.testing.assert_allclose(y.astype(np.float64), want(case), **tolerance(case).kwargs(), err_msg=format.name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 9, 16, 67])
def test_channels_off_the_vector_of_a_format(channels: int, dtype: str, host: Host) -> None:
    case = NormCase(f"{channels}_channels", (2, channels, 5, 3), dtype)
    for format in formats_of(dtype, 4):
        got = run(host, case, format).astype(np.float64)
        np.testing.assert_allclose(got, want(case), **tolerance(case).kwargs(), err_msg=format.name)


@pytest.mark.parametrize("rank", [2, 6, 7, 8])
def test_every_rank_of_tensorrt(rank: int, host: Host) -> None:
    for dtype in DTYPES:
        case = NormCase(f"rank_{rank}", (2, 3, *range(2, rank)), dtype)
        got = run(host, case, Format.LINEAR).astype(np.float64)
        np.testing.assert_allclose(got, want(case), **tolerance(case).kwargs())


# ---- Shapes that change

LARGEST = (4, 12, 31, 40)
SEQUENCE = [LARGEST, (1, 12, 1, 1), LARGEST, (2, 12, 7, 9), (0, 12, 7, 9), (3, 12, 0, 5), (1, 12, 31, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_engine_runs_every_shape_of_its_profile(dtype: str, host: Host) -> None:
    """What was seen while building, or at the last shape, is not what counts now."""
    for format in formats_of(dtype, 4):
        engine = host.build(dtype, format, (0, 12, 0, 1), LARGEST)
        with engine.context() as context, engine.context() as other:
            for index, shape in enumerate(SEQUENCE):
                case = NormCase(f"shape_{index}", shape, dtype, eps="per_channel")
                for each in (context, other):
                    got = each.run(make_inputs(case)).astype(np.float64)
                    where = f"{format.name}, {shape}"
                    np.testing.assert_allclose(got, want(case), **tolerance(case).kwargs(), err_msg=where)


def test_a_size_that_the_network_leaves_open_may_be_the_channels(host: Host) -> None:
    for format in formats_of("float16", 4):
        with host.build("float16", format, (1, 1, 3, 3), (2, 20, 9, 9)).context() as context:
            for channels in (20, 1, 8, 13):
                case = NormCase(f"{channels}_of_20", (2, channels, 5, 5), "float16")
                got = context.run(make_inputs(case)).astype(np.float64)
                np.testing.assert_allclose(got, want(case), **tolerance(case).kwargs(), err_msg=format.name)


def test_the_workspace_of_the_largest_shape_serves_all_smaller_ones(plugin: Plugin) -> None:
    rng = np.random.default_rng(0)
    largest = (5, 40, 300, 300)
    for dtype, format in TAKEN:
        most = plugin.workspace(inputs_and_output(Tensor(largest, dtype, format)))
        assert most > 0, "of so large a shape it is of use"
        for _ in range(200):
            shape = tuple(int(rng.integers(0, size + 1)) for size in largest)
            assert plugin.workspace(inputs_and_output(Tensor(shape, dtype, format))) <= most, (dtype, format, shape)


def test_the_workspace_is_that_of_the_profile_s_largest_shape(plugin: Plugin) -> None:
    x = Tensor((-1, 4, -1, -1), "float32", Format.LINEAR, largest=(2, 4, 400, 400))
    fixed = Tensor((2, 4, 400, 400))
    assert plugin.workspace(inputs_and_output(x)) == plugin.workspace(inputs_and_output(fixed)) > 0


def test_few_large_planes_use_the_workspace(host: Host, plugin: Plugin) -> None:
    """In test_every_case_in_every_format the guards around it say nothing unless it is written."""
    case = NormCase("two_large_planes", (1, 2, 300, 301))
    tensors = inputs_and_output(Tensor(case.shape))
    with_it = run(host, case, Format.LINEAR)
    inputs = make_inputs(case)
    y = np.full_like(with_it, np.nan)
    workspace = np.full(plugin.workspace(tensors), 0x5A, np.uint8)
    before = workspace.copy()
    addresses = [inputs[name].ctypes.data for name in INPUTS]
    assert plugin.enqueue(tensors, addresses, y.ctypes.data, workspace.ctypes.data) == 0
    assert (workspace != before).any()
    np.testing.assert_array_equal(y, with_it)


# ---- Formats


@pytest.mark.parametrize("rank", range(2, 9))
def test_the_formats_that_it_takes(rank: int, plugin: Plugin) -> None:
    for dtype in DTYPES:
        taken = [f for f in Format if plugin.supports(0, inputs_and_output(Tensor(SHAPES[rank], dtype, f)))]
        assert set(taken) == set(formats_of(dtype, rank)), dtype


@pytest.mark.parametrize("rank", range(2, 9))
def test_tensorrt_rtx_is_offered_one_format_of_each_type(rank: int, rtx: Host) -> None:
    """It takes the first that is offered. HWC is what its convolutions have; it has none of bfloat16."""
    made = rtx.create()
    assert made is not None
    with made as plugin:
        for dtype in DTYPES:
            taken = [f for f in Format if plugin.supports(0, inputs_and_output(Tensor(SHAPES[rank], dtype, f)))]
            assert taken == [Format.HWC if rank == 4 and dtype != "bfloat16" else Format.LINEAR], dtype


def test_what_tensorrt_rtx_takes_is_computed_as_elsewhere(host: Host, rtx: Host) -> None:
    """Both hosts are in this process, over one copy of the plugin."""
    case = NormCase("rtx", (2, 13, 9, 9), "float16")
    np.testing.assert_array_equal(run(rtx, case, Format.HWC), run(host, case, Format.HWC))


def test_the_parameters_are_float32_and_linear_whatever_x_is(plugin: Plugin) -> None:
    for dtype, format in TAKEN:
        tensors = inputs_and_output(Tensor(SHAPES[4], dtype, format))
        for position, other, layout in product(range(1, 5), ("float32", "float16", "bfloat16", "int32"), Format):
            asked = [*tensors]
            asked[position] = replace(asked[position], type=other, format=layout)
            wanted = other == "float32" and layout == Format.LINEAR
            assert plugin.supports(position, asked) == wanted, (position, other, layout)


def test_the_output_is_of_the_type_and_format_of_x(plugin: Plugin) -> None:
    for (dtype, format), (other, layout) in product(TAKEN, TAKEN):
        asked = inputs_and_output(Tensor(SHAPES[4], dtype, format))
        asked[5] = Tensor(SHAPES[4], other, layout)
        assert plugin.supports(5, asked) == ((dtype, format) == (other, layout))


def test_integers_are_in_no_format_taken(plugin: Plugin) -> None:
    for dtype, format in product(("int8", "int32", "int64"), Format):
        assert not plugin.supports(0, inputs_and_output(Tensor(SHAPES[4], dtype, format)))


# ---- Names, clones and plans


def test_creator_and_plugin_have_the_names_of_the_contract(host: Host, plugin: Plugin) -> None:
    names = [OP_TYPE, str(VERSION), DOMAIN]
    assert host.creator_names() == names
    kinds = ["PLUGIN", "PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME"]
    assert plugin.names() == names + kinds
    assert host.attribute_count() == 0, "TensorRT warns of each attribute that a node does not have"


def test_timings_are_cached(plugin: Plugin) -> None:
    assert plugin.timing_id()


def test_a_clone_outlives_what_it_was_made_of(plugin: Plugin) -> None:
    with plugin:
        clone, attached = plugin.clone(), plugin.attach()
        assert len({plugin.address, clone.address, attached.address}) == 3
    for each in (clone, attached):
        with each:
            assert each.shape_change(inputs_and_output(Tensor((2, 3, 4, 5)))) == 0


def test_a_plan_becomes_a_plugin_with_the_same_plan(host: Host, plugin: Plugin) -> None:
    fields = plugin.fields()
    assert fields
    restored = host.create(fields, RUNTIME)
    assert restored is not None
    with restored:
        assert restored.fields() == fields


ONE = (1).to_bytes(4, "little")
PLANS: dict[str, list[Field] | None] = {
    "no_fields": [],
    "null": None,
    "version_0": [Field("plan_version", FieldType.INT32, 1, bytes(4))],
    "version_2": [Field("plan_version", FieldType.INT32, 1, (2).to_bytes(4, "little"))],
    "version_257": [Field("plan_version", FieldType.INT32, 1, (257).to_bytes(4, "little"))],
    "another_name": [Field("version", FieldType.INT32, 1, ONE)],
    "no_name": [Field(None, FieldType.INT32, 1, ONE)],
    "no_data": [Field("plan_version", FieldType.INT32, 1, None)],
    "empty": [Field("plan_version", FieldType.INT32, 0, ONE)],
    "too_long": [Field("plan_version", FieldType.INT32, 2, ONE * 2)],
    "negative_length": [Field("plan_version", FieldType.INT32, -1, ONE)],
    "bytes": [Field("plan_version", FieldType.UNKNOWN, 4, ONE)],
    "one_byte": [Field("plan_version", FieldType.INT8, 1, b"\1")],
    "one_more": [Field("plan_version", FieldType.INT32, 1, ONE), Field("epsilon", FieldType.FLOAT32, 1, bytes(4))],
    "twice": [Field("plan_version", FieldType.INT32, 1, ONE)] * 2,
    "another_plugin_s": [Field("epsilon", FieldType.FLOAT32, 1, bytes(4))],
}


@pytest.mark.parametrize("fields", PLANS.values(), ids=PLANS)
def test_a_plan_that_is_not_ours_is_refused(
    fields: list[Field] | None, host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    assert host.create(fields, RUNTIME) is None
    words = capfd.readouterr().err
    assert words.startswith(f"{DOMAIN}::{OP_TYPE}: the engine was built with another version of this plugin. Got ")
    assert words.endswith("Fix: build the engine again\n")


# ---- What it refuses while an engine is built


@pytest.mark.parametrize(
    "field",
    [
        Field("epsilon", FieldType.FLOAT32, 1, bytes(4)),
        Field("epsilon", FieldType.INT32, 1, bytes(4)),
        Field("eps", FieldType.FLOAT32, 1, bytes(4)),
        Field("gamma", FieldType.FLOAT32, 3, bytes(12)),
        Field(None, FieldType.FLOAT32, 0, None),
    ],
    ids=lambda field: f"{field.name}_{field.type.name}",
)
def test_an_attribute_is_refused_and_not_ignored(field: Field, host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    assert host.create([field]) is None
    words = capfd.readouterr().err
    assert f"there is no attribute {field.name or 'without a name'}. Fix: export" in words


def test_the_attributes_by_which_it_is_found_are_allowed(host: Host) -> None:
    fields = [Field(name, FieldType.CHAR, len(text), text.encode()) for name, text in NODE_ATTRIBUTES.items()]
    for given in (fields, None):
        made = host.create(given)
        assert made is not None
        made.call("destroy", returns=None)


X = Tensor(SHAPES[4])


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 1), (6, 1), (1, 1), (0, 1), (5, 2), (4, 2)], ids=str)
def test_a_wrong_number_of_inputs_or_outputs(
    inputs: int, outputs: int, plugin: Plugin, capfd: pytest.CaptureFixture[str]
) -> None:
    parameters = [replace(X, shape=SHAPES[1])] * 5
    tensors = [*[X, *parameters][:inputs], *[X] * outputs]
    calls: dict[str, Callable[[], int]] = {
        "types": lambda: plugin.output_types([t.type for t in tensors[:inputs]], outputs)[0],
        "shapes": lambda: plugin.output_axes([len(t.shape) for t in tensors[:inputs]], outputs)[0],
        "configure": lambda: plugin.configure(tensors, outputs),
        "shape_change": lambda: plugin.shape_change(tensors, outputs),
    }
    for name, call in calls.items():
        assert call() == -1, name
        words = capfd.readouterr().err
        assert f"Got {inputs} and {outputs}; expected X, gamma, beta, tau and eps, and Y. Fix: export" in words, name
    assert plugin.workspace(tensors, outputs) == 0
    for position in range(len(tensors)):
        assert not plugin.supports(position, tensors, outputs)


def with_input(position: int, **changes: Any) -> list[Tensor]:
    tensors = inputs_and_output(X)
    tensors[position] = replace(tensors[position], **changes)
    return tensors


@pytest.mark.parametrize(
    ("position", "dtype"),
    [*product(range(5), ("int8", "int32", "int64")), *product(range(1, 5), ("float16", "bfloat16"))],
    ids=str,
)
def test_a_wrong_type(position: int, dtype: str, plugin: Plugin, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = with_input(position, type=dtype)
    calls: dict[str, Callable[[], int]] = {
        "types": lambda: plugin.output_types([t.type for t in tensors[:5]])[0],
        "configure": lambda: plugin.configure(tensors),
        "shape_change": lambda: plugin.shape_change(tensors),
    }
    for name, call in calls.items():
        assert call() == -1, name
        assert f"input {INPUTS[position]} is of the wrong type. Got {dtype}; expected float32" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("position", "shape"),
    [(0, ()), (0, (12,)), *[(position, shape) for position in range(1, 5) for shape in ((), (1, 12), (1, 12, 1, 1))]],
    ids=str,
)
def test_a_wrong_rank(position: int, shape: tuple[int, ...], plugin: Plugin, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = with_input(position, shape=shape)
    calls: dict[str, Callable[[], int]] = {
        "shapes": lambda: plugin.output_axes([len(t.shape) for t in tensors[:5]])[0],
        "configure": lambda: plugin.configure(tensors),
        "shape_change": lambda: plugin.shape_change(tensors),
    }
    for name, call in calls.items():
        assert call() == -1, name
        words = capfd.readouterr().err
        assert f"input {INPUTS[position]} has the wrong rank. Got {len(shape)} axes; expected (" in words, name


@pytest.mark.parametrize("position", range(1, 5))
@pytest.mark.parametrize("size", [0, 1, 11, 13])
def test_a_parameter_of_another_size_than_the_channels(
    position: int, size: int, plugin: Plugin, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = with_input(position, shape=(size,))
    for call in (plugin.configure, plugin.shape_change):
        assert call(tensors) == -1
        assert (
            f"input {INPUTS[position]} has the wrong size. Got {size}; expected as many as X has channels, 12"
            in capfd.readouterr().err
        )


@pytest.mark.parametrize("position", range(5))
def test_a_size_that_only_a_run_gives_is_not_refused_before(position: int, plugin: Plugin) -> None:
    open_shape = (-1,) * (1 if position else 4)
    assert plugin.configure(with_input(position, shape=open_shape, largest=(12,) * len(open_shape))) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (2, 12, 4, 5)},
        {"shape": (2, 12, 4)},
        {"type": "float16"},
        {"format": Format.HWC},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_output_unlike_x(changes: dict[str, Any], plugin: Plugin, capfd: pytest.CaptureFixture[str]) -> None:
    for call in (plugin.configure, plugin.shape_change):
        assert call(with_input(5, **changes)) == -1
        assert "the output is not of X's shape, type and format" in capfd.readouterr().err


def test_a_format_that_was_not_offered(plugin: Plugin, capfd: pytest.CaptureFixture[str]) -> None:
    for rank, dtype, format in product((3, 4, 5), DTYPES, Format):
        if format in formats_of(dtype, rank):
            continue
        assert plugin.shape_change(inputs_and_output(Tensor(SHAPES[rank], dtype, format))) == -1
        assert "input X is in a format that is not taken" in capfd.readouterr().err
    assert plugin.configure(with_input(2, format=Format.CHW32)) == -1
    assert "input beta is not linear" in capfd.readouterr().err


# ---- What it refuses while it runs


def test_a_run_with_the_wrong_shapes_writes_nothing(plugin: Plugin, capfd: pytest.CaptureFixture[str]) -> None:
    y = np.full(SHAPES[4], np.nan, np.float32)
    values = [np.ones(SHAPES[4], np.float32), *[np.ones(12, np.float32)] * len(PARAMETERS)]
    addresses = [value.ctypes.data for value in values]
    refused = {"gamma has the wrong size": {"shape": (2, 13, 4, 4)}, "the output is not of X's": {"type": "float16"}}
    for words, changes in refused.items():
        assert plugin.enqueue(with_input(0, **changes), addresses, y.ctypes.data, 0) == -1
        assert words in capfd.readouterr().err
    assert np.isnan(y).all()
    assert plugin.enqueue(inputs_and_output(X), addresses, y.ctypes.data, 0) == 0
    assert not np.isnan(y).any()


def test_an_error_of_cuda_is_passed_on(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMULATED_MAX_GRID", "0")  # a device on which nothing can be launched
    values = [np.ones(SHAPES[4], np.float32), *[np.ones(12, np.float32)] * len(PARAMETERS)]
    y = np.empty(SHAPES[4], np.float32)
    assert plugin.enqueue(inputs_and_output(X), [value.ctypes.data for value in values], y.ctypes.data, 0) == -1
    assert capfd.readouterr().err == f"{DOMAIN}::{OP_TYPE}: CUDA: cudaErrorInvalidConfiguration (9)\n"


def test_every_format_of_the_plugin_has_a_layout_here() -> None:
    assert {format for dtype in DTYPES for format in formats_of(dtype, 4)} == set(LAYOUTS)
