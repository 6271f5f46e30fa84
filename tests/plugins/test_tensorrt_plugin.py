"""The TensorRT plugin, driven as TensorRT drives one, over the kernels in the emulation on the CPU: what it takes and
refuses. tests/gpu/test_plugin.py has its numbers."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import NormCase
from emulated import HOSTS, build_plugin
from references import inputs_of
from tensorrt_host import (
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

from deploynorm.contract import ADD_OP_TYPE, DOMAIN, INPUTS, NODE_ATTRIBUTES, OP_TYPE, OPERATORS, PARAMETERS, VERSION
from deploynorm.libraries import TENSORRT_LIBRARY, source_folder

DTYPES = ("float32", "float16", "bfloat16")

SHAPES = {rank: (2, 12, *[4] * (rank - 2)) for rank in range(1, 9)} | {1: (12,)}
"""A shape of each rank that TensorRT knows."""


@pytest.fixture(scope="session")
def built(emulated_library: Path, require: Callable[[str], None], build_once: Callable[..., Path]) -> Path:
    require("trt-headers")
    return build_once("plugin", lambda folder: build_plugin(folder, emulated_library))


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


# ---- Workspace


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
    """Where numbers are checked, the guards around it say nothing unless it is written."""
    case = NormCase("two_large_planes", (1, 2, 300, 301))
    tensors = inputs_and_output(Tensor(case.shape))
    with_it = run(host, case, Format.LINEAR)
    inputs = inputs_of(case)
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
    """It takes the first that is offered. HWC is what its convolutions have; it has none of bfloat16, nor DHWC."""
    rows = {("float32", 4): Format.HWC, ("float16", 4): Format.HWC, ("float32", 5): Format.DHWC}
    made = rtx.create()
    assert made is not None
    with made as plugin:
        for dtype in DTYPES:
            taken = [f for f in Format if plugin.supports(0, inputs_and_output(Tensor(SHAPES[rank], dtype, f)))]
            assert taken == [rows.get((dtype, rank), Format.LINEAR)], dtype


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


def test_creator_and_plugin_have_the_names_of_the_contract(host: Host) -> None:
    for each, op_type in zip((host, host.adding()), OPERATORS, strict=True):
        names = [op_type, str(VERSION), DOMAIN]
        assert each.creator_names() == names
        kinds = ["PLUGIN", "PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME"]
        made = each.create()
        assert made is not None
        with made as plugin:
            assert plugin.names() == names + kinds
        assert each.attribute_count() == 0, "TensorRT warns of each attribute that a node does not have"


def test_timings_are_those_of_these_kernels(built: Path, cuda_libraries: Path) -> None:
    """In a cache of timings of others, what is found for the plugin would be wrong."""
    made = Host(built / HOSTS[0], cuda_libraries / TENSORRT_LIBRARY).create()
    assert made is not None
    kernels = [source_folder() / "kernels" / "frn.cu", *(source_folder() / "kernels").glob("*.cuh")]
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(kernels))
    with made:
        assert made.timing_id() == hashlib.sha256(digests.encode()).hexdigest()


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


PLAN = Field("plan_version", FieldType.INT32, 1, (1).to_bytes(4, "little"))
PLANS: dict[str, list[Field] | None] = {
    "no_fields": [],
    "null": None,
    **{f"version_{n}": [replace(PLAN, data=n.to_bytes(4, "little"))] for n in (0, 2, 257)},
    "another_name": [replace(PLAN, name="version")],
    "no_name": [replace(PLAN, name=None)],
    "no_data": [replace(PLAN, data=None)],
    "empty": [replace(PLAN, length=0)],
    "too_long": [replace(PLAN, length=2, data=(PLAN.data or b"") * 2)],
    "negative_length": [replace(PLAN, length=-1)],
    "bytes": [replace(PLAN, type=FieldType.UNKNOWN, length=4)],
    "one_byte": [replace(PLAN, type=FieldType.INT8, data=b"\1")],
    "one_more": [PLAN, Field("epsilon", FieldType.FLOAT32, 1, bytes(4))],
    "twice": [PLAN] * 2,
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
    assert host.adding().create(fields, RUNTIME) is None
    assert capfd.readouterr().err == words.replace(OP_TYPE, ADD_OP_TYPE)


# ---- What it refuses while an engine is built


@pytest.mark.parametrize(
    ("name", "version"), [(HOSTS[0], 101601), (HOSTS[0], 110400), (HOSTS[1], 10400), (HOSTS[1], 10701)]
)
def test_what_it_refuses_goes_to_the_logger_of_who_asked(
    name: str, version: int, built: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    host = Host(built / name, built / TENSORRT_LIBRARY)
    made = host.create()
    assert made is not None
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: host.create([Field("epsilon", FieldType.FLOAT32, 1, bytes(4))]), "there is no attribute epsilon"),
        (lambda: host.create([], RUNTIME), "the engine was built with another version"),
        (lambda: made.enqueue(with_input(1, shape=(13,)), [0] * 5, 0, 0), "input gamma has the wrong size"),
        *(
            (lambda m=method: m(made, with_input(0, type="int8", shape=()), 1), "input X ")
            for method in METHODS.values()
        ),
    ]
    host.call("be", ctypes.c_int32(version), returns=None)
    for call, words in calls:
        call()
        assert host.call("logged", returns=ctypes.c_char_p).decode().startswith(f"1 {DOMAIN}::{OP_TYPE}: {words}")
    host.call("be", ctypes.c_int32(90300), returns=None)  # one whose logger is not known
    calls[0][0]()
    assert words not in (said := capfd.readouterr().err)
    assert said.startswith(f"{DOMAIN}::{OP_TYPE}: there is no attribute epsilon")
    host.call("be", ctypes.c_int32(0), returns=None)


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


def with_input(position: int, **changes: Any) -> list[Tensor]:
    """The tensors for X, one of them changed; the last is the output."""
    tensors = inputs_and_output(X)
    tensors[position] = replace(tensors[position], **changes)
    return tensors


METHODS: dict[str, Callable[[Plugin, list[Tensor], int], int]] = {
    "types": lambda plugin, tensors, outputs: plugin.output_types([t.type for t in tensors[:-outputs]], outputs)[0],
    "shapes": lambda plugin, tensors, outputs: plugin.output_axes([len(t.shape) for t in tensors[:-outputs]], outputs)[
        0
    ],
    "configure": Plugin.configure,
    "shape_change": Plugin.shape_change,
}
"""Name -> the call of a method that looks at the tensors."""


@pytest.fixture
def refused(plugin: Plugin, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """refused(tensors, words, *methods): all of METHODS, or those, refuse these tensors with the words."""

    def refused(tensors: list[Tensor], words: str, *methods: str, outputs: int = 1) -> None:
        for name in methods or METHODS:
            assert METHODS[name](plugin, tensors, outputs) == -1, name
            assert words in capfd.readouterr().err, name

    return refused


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 1), (6, 1), (1, 1), (0, 1), (5, 2), (4, 2)], ids=str)
def test_a_wrong_number_of_inputs_or_outputs(
    inputs: int, outputs: int, plugin: Plugin, refused: Callable[..., None]
) -> None:
    tensors = [*[X, *[Tensor(SHAPES[1])] * 5][:inputs], *[X] * outputs]
    words = f"Got {inputs} and {outputs}; expected X, gamma, beta, tau and eps, and Y. Fix: export"
    refused(tensors, words, outputs=outputs)
    assert plugin.workspace(tensors, outputs) == 0
    for position in range(len(tensors)):
        assert not plugin.supports(position, tensors, outputs)


@pytest.mark.parametrize(
    ("position", "dtype"),
    [*product(range(5), ("int8", "int32", "int64")), *product(range(1, 5), ("float16", "bfloat16"))],
    ids=str,
)
def test_a_wrong_type(position: int, dtype: str, refused: Callable[..., None]) -> None:
    words = f"input {INPUTS[position]} is of the wrong type. Got {dtype}; expected float32"
    refused(with_input(position, type=dtype), words, "types", "configure", "shape_change")


@pytest.mark.parametrize(
    ("position", "shape"),
    [(0, ()), (0, (12,)), *product(range(1, 5), ((), (1, 12), (1, 12, 1, 1)))],
    ids=str,
)
def test_a_wrong_rank(position: int, shape: tuple[int, ...], refused: Callable[..., None]) -> None:
    words = f"input {INPUTS[position]} has the wrong rank. Got {len(shape)} axes; expected ("
    refused(with_input(position, shape=shape), words, "shapes", "configure", "shape_change")


@pytest.mark.parametrize("position", range(1, 5))
@pytest.mark.parametrize("size", [0, 1, 11, 13])
def test_a_parameter_of_another_size_than_the_channels(position: int, size: int, refused: Callable[..., None]) -> None:
    words = f"input {INPUTS[position]} has the wrong size. Got {size}; expected as many as X has channels, 12"
    refused(with_input(position, shape=(size,)), words, "configure", "shape_change")


@pytest.mark.parametrize("position", range(5))
def test_a_size_that_only_a_run_gives_is_not_refused_before(position: int, plugin: Plugin) -> None:
    open_shape = (-1,) * (1 if position else 4)
    assert plugin.configure(with_input(position, shape=open_shape, largest=(12,) * len(open_shape))) == 0


@pytest.mark.parametrize(
    "changes",
    [{"shape": (2, 12, 4, 5)}, {"shape": (2, 12, 4)}, {"type": "float16"}, {"format": Format.HWC}],
    ids=lambda changes: next(iter(changes)),
)
def test_an_output_unlike_x(changes: dict[str, Any], refused: Callable[..., None]) -> None:
    words = "the output is not of X's shape, type and format"
    refused(with_input(5, **changes), words, "configure", "shape_change")


RESIDUALS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "type": ({"type": "float16"}, "is of the wrong type. Got float16; expected that of X, float32", ("types",)),
    "rank": ({"shape": (2, 12, 4)}, "has the wrong rank. Got 3 axes; expected those of X, 4", ("shapes",)),
    "shape": ({"shape": (1, 12, 4, 4)}, "is not of X's shape, type and format", ()),
    "format": ({"format": Format.HWC}, "is not of X's shape, type and format", ()),
}


@pytest.mark.parametrize(("changes", "words", "methods"), RESIDUALS.values(), ids=RESIDUALS)
def test_a_residual_unlike_x(
    changes: dict[str, Any], words: str, methods: tuple[str, ...], host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    made = host.adding().create()
    assert made is not None
    tensors = inputs_and_output(X, residual=True)
    right = [*tensors]
    tensors[5] = replace(X, **changes)
    with made as plugin:
        for name in (*methods, "configure", "shape_change"):
            assert METHODS[name](plugin, tensors, 1) == -1, name
            assert capfd.readouterr().err.startswith(f"{DOMAIN}::{ADD_OP_TYPE}: the residual {words}"), name
            assert METHODS[name](plugin, right, 1) == 0, name
            assert METHODS[name](plugin, inputs_and_output(X), 1) == -1, name
            assert "expected X, gamma, beta, tau and eps, and the residual, and Y" in capfd.readouterr().err, name
        if not methods or "types" in methods:
            assert plugin.supports(5, tensors) == (changes.keys() == {"shape"})
        assert plugin.supports(5, right)


def test_a_format_that_was_not_offered(refused: Callable[..., None]) -> None:
    for rank, dtype, format in product((3, 4, 5), DTYPES, Format):
        if format not in formats_of(dtype, rank):
            tensors = inputs_and_output(Tensor(SHAPES[rank], dtype, format))
            refused(tensors, "input X is in a format that is not taken", "shape_change")
    refused(with_input(2, format=Format.CHW32), "input beta is not linear", "configure")


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
