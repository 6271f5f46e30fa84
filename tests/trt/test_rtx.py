"""What the real TensorRT-RTX builds, which needs no GPU for it, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx.parser
import pytest
import torch
from graphs import frn_model
from rtx_builds import OPSET, build_rtx, conv_frn_conv, quantized

from deploynorm import checkpoint, fold, libraries
from deploynorm._export import export
from deploynorm.contract import ADD_OP_TYPE, DOMAIN, OP_TYPE
from deploynorm.lowering import function_proto

REPOSITORY = Path(__file__).parents[2]
FREE = ("N", 64, "H", "W")
RANGE = {
    "min_shapes": {"": (1, 64, 28, 28)},
    "opt_shapes": {"": (8, 64, 56, 56)},
    "max_shapes": {"": (8, 64, 112, 112)},
}
CARDS = {"float32": ["8.0", "8.6", "8.9", "12.0"], "float16": ["7.5", "8.0", "8.6", "8.9", "12.0"]}
CARDS["bfloat16"] = CARDS["float32"]


@pytest.fixture(autouse=True)
def _needs_tensorrt_rtx(require: Callable[[str], None]) -> None:
    require("trt-rtx")


@pytest.fixture
def plugin(cuda_libraries: Path) -> list[Path]:
    """Our plugin library, as `plugins` of build takes it."""
    return [cuda_libraries / libraries.TENSORRT_LIBRARY]


@pytest.fixture
def plugins(way: str, request: pytest.FixtureRequest) -> list[Path] | None:
    """The same where the way is that of the plugin."""
    return request.getfixturevalue("plugin") if way == "plugin" else None


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """shipped("float16") is the trained FRN ResNet-20 of this repository, as exported in that type."""
    folder = tmp_path_factory.mktemp("shipped")
    example = (torch.zeros(2, 1, 28, 28),)
    folded, _ = fold(checkpoint.load(REPOSITORY / "models/frn_resnet20_fashion.pt").model, example)

    def path(dtype: str, **options: Any) -> Path:
        path = folder / f"{dtype}-{'-'.join(options)}.onnx"
        if not path.exists():
            export(folded, example, dynamic="all", dtype=getattr(torch, dtype), **options).save(path)
        return path

    return path


OTHERS = [("float16", "7.5"), ("float32", "8.0"), ("bfloat16", "8.6"), ("float32", "12.0")]
"""Each card and each type once; of one small network every type is built for all of its cards."""

SHIPPED_RANGE = {"opt_shapes": {"": (8, 1, 28, 28)}, "max_shapes": {"": (16, 1, 56, 56)}}


@pytest.mark.parametrize(
    ("dtype", "card", "way"),
    [
        ("float16", "8.9", "plugin"),
        pytest.param("float16", "8.9", "native", marks=pytest.mark.slow),
        *(pytest.param(*each, way, marks=pytest.mark.slow) for each in OTHERS for way in ("native", "plugin")),
    ],
)
def test_the_shipped_network_is_built(
    shipped: Callable[..., Path], dtype: str, card: str, way: str, plugins: list[Path] | None
) -> None:
    built = build_rtx(shipped(dtype), compute_capabilities=[card], frn=way, plugins=plugins, **SHIPPED_RANGE)
    assert built.error == "", built.message
    facts = built.facts
    frn = facts["frn"]
    assert (frn["nodes"], frn["way"], frn["plugin_layers"]) == (21, way, 21 if way == "plugin" else 0)
    assert facts["compute_capabilities"] == [card]
    assert (facts["precision"], facts["verified_products"], facts["products"]) == (dtype, 22, 22)
    [profile] = facts["profiles"]
    assert (profile["x"]["min"], profile["x"]["max"]) == ([1, 1, 28, 28], [16, 1, 56, 56])
    if way == "native":
        assert not any(layer["plugin"] for layer in built.layers)
    elif dtype != "bfloat16":  # for which RTX has no channels-last layout
        # Into the layout of the convolutions, out of it, and around the last product: none at the plugins.
        assert built.moves <= 4


@pytest.mark.slow
def test_the_shipped_network_in_float32_needs_ampere(shipped: Callable[..., Path]) -> None:
    built = build_rtx(shipped("float32"), compute_capabilities=["7.5"], frn="native", **SHIPPED_RANGE)
    assert built.error == "InputError"
    assert "does not have in this type for GPUs of compute capability 7.5" in built.message


@pytest.mark.slow
def test_a_network_of_two_types_is_called_mixed(shipped: Callable[..., Path]) -> None:
    path = shipped("float16", keep_float32=["fc"], keep_io_types=True)
    built = build_rtx(path, compute_capabilities=["8.9"], frn="native", **SHIPPED_RANGE)
    assert built.error == "", built.message
    assert (built.facts["precision"], built.facts["verified_products"]) == ("mixed", 22)
    assert built.facts["inputs"][0]["dtype"] == "float32"


def test_one_engine_serves_several_cards_and_holds_the_plugin(shipped: Callable[..., Path], plugin: list[Path]) -> None:
    options: dict[str, Any] = {"frn": "plugin", "plugins": plugin, **SHIPPED_RANGE}
    lean, whole = (
        build_rtx(shipped("float32"), compute_capabilities=CARDS["float32"], embed_plugin=embed, **options)
        for embed in (False, True)
    )
    [library] = plugin
    assert lean.facts["embedded_plugins"] == []
    assert whole.facts["embedded_plugins"] == [library.name]
    assert whole.size - lean.size >= library.stat().st_size


def test_an_engine_of_two_profiles_is_built(tmp_path: Path, plugin: list[Path]) -> None:
    path = saved(conv_frn_conv("float16", FREE), tmp_path)
    small, large = (1, 64, 28, 28), (8, 64, 112, 112)
    options: dict[str, Any] = {"compute_capabilities": ["8.9"], "frn": "plugin", "plugins": plugin}
    built = build_rtx(path, opt_shapes=[{"": small}, {"": large}], **options)
    assert built.error == "", built.message
    assert [profile["x"]["opt"] for profile in built.facts["profiles"]] == [[*small], [*large]]
    assert (built.facts["precision"], built.facts["frn"]["plugin_layers"]) == ("float16", 1)


@pytest.mark.parametrize("way", ["native", "plugin"])
@pytest.mark.parametrize("free", [False, True], ids=["fixed", "free"])
@pytest.mark.parametrize("dtype", CARDS)
def test_a_typed_graph_gives_an_engine_of_that_type(
    dtype: str, free: bool, way: str, tmp_path: Path, plugins: list[Path] | None
) -> None:
    path = saved(conv_frn_conv(dtype, FREE if free else (8, 64, 28, 28)), tmp_path)
    built = build_rtx(path, compute_capabilities=CARDS[dtype], frn=way, plugins=plugins, **(RANGE if free else {}))
    assert built.error == "", built.message
    assert (built.facts["precision"], built.facts["verified_products"]) == (dtype, 2)
    assert built.facts["inputs"][0]["dtype"] == built.facts["outputs"][0]["dtype"] == dtype
    between = built.between_products()
    if way == "native":
        assert not any(layer["plugin"] for layer in between)
        assert len(between) <= 2  # what TensorRT makes of the body: one or two passes
    elif dtype == "bfloat16":  # for which RTX has no channels-last layout
        assert [layer["plugin"] for layer in between if not layer["moves_only"]] == [True]
    else:
        assert [layer["plugin"] for layer in between] == [True]


INT8, FLOAT8 = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN

QUANTIZED: dict[str, tuple[str, int, dict[str, Any], str, str, int]] = {
    "int8": ("float32", INT8, {}, "8.9", "int8", 2),
    "float8": ("float32", FLOAT8, {}, "8.9", "float8", 2),
    "int8 in float16": ("float16", INT8, {}, "8.6", "int8", 2),
    "float8 in bfloat16": ("bfloat16", FLOAT8, {}, "12.0", "float8", 2),
    "weights in float16": ("float16", INT8, {"weights": False}, "8.9", "float16", 2),
    "int8 on Turing, which multiplies in float16": ("float16", INT8, {}, "7.5", "float16", 2),
}
"""Type of the graph, that of the Q/DQ nodes, how else, the card; what the products are built in, and how many."""


@pytest.mark.parametrize(
    ("dtype", "kind", "how", "card", "precision", "count"),
    [pytest.param(*each, id=name, marks=[pytest.mark.slow] if " " in name else []) for name, each in QUANTIZED.items()],
)
def test_a_quantized_network_is_built_and_its_type_told(
    dtype: str, kind: int, how: dict[str, Any], card: str, precision: str, count: int, tmp_path: Path
) -> None:
    path = saved(quantized(conv_frn_conv(dtype, (2, 16, 16, 16)), kind, **how), tmp_path)
    built = build_rtx(path, compute_capabilities=[card], frn="native")
    assert built.error == "", built.message
    assert (built.facts["precision"], built.facts["verified_products"]) == (precision, count)


def test_a_network_of_volumes_is_built_without_a_copy_at_the_plugin(tmp_path: Path, plugin: list[Path]) -> None:
    path = saved(conv_frn_conv("float32", (2, 32, 8, 8, 8)), tmp_path)
    built = build_rtx(path, compute_capabilities=["8.9"], frn="plugin", plugins=plugin)
    assert built.error == "", built.message
    assert [layer["plugin"] for layer in built.between_products()] == [True]


@pytest.mark.parametrize("size", [7, 28, 224])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_square_is_kept_in_half_precision(dtype: str, size: int, tmp_path: Path) -> None:
    """Where FRN takes more than one pass, what lies between them is float32: a square overflows float16 at 256."""
    path = saved(conv_frn_conv(dtype, (8, 64, size, size)), tmp_path)
    built = build_rtx(path, compute_capabilities=["8.9"], frn="native")
    between = built.between_products()
    kept = [dtype for layer in between[:-1] for dtype in layer["outputs"]]
    assert set(kept) <= {"float32"}
    assert len(between) == (1 if size == 28 else 2)


TEXTBOOK = f"""
<opset_import: ["": {OPSET}], domain: "{DOMAIN}">
{OP_TYPE} (X, gamma, beta, tau, eps) => (Y) {{
    axes = Constant <value_ints = [2, 3]> ()
    columns = Constant <value_ints = [1, 2]> ()
    square = Mul (X, X)
    mean = ReduceMean (square, axes)
    wide = Cast <to = 1> (mean)
    eps_column = Unsqueeze (eps, columns)
    positive = Add (wide, eps_column)
    root = Sqrt (positive)
    gamma_column = Unsqueeze (gamma, columns)
    factor = Div (gamma_column, root)
    half_factor = CastLike (factor, X)
    scaled = Mul (X, half_factor)
    beta_column = Unsqueeze (beta, columns)
    half_beta = CastLike (beta_column, X)
    shifted = Add (scaled, half_beta)
    tau_column = Unsqueeze (tau, columns)
    half_tau = CastLike (tau_column, X)
    Y = Max (shifted, half_tau)
}}
"""


@pytest.mark.parametrize("way", ["native", "plugin"])
def test_norm_addition_and_threshold_are_one_layer(way: str, plugins: list[Path] | None, tmp_path: Path) -> None:
    model = conv_frn_conv("float16", (8, 64, 28, 28))
    model.graph.node[1].op_type = ADD_OP_TYPE
    model.graph.node[1].input.append("x")
    model.functions[0].CopyFrom(function_proto(OPSET, ADD_OP_TYPE, half=True))
    built = build_rtx(saved(model, tmp_path), compute_capabilities=["8.9"], frn=way, plugins=plugins)
    assert built.error == "", built.message
    assert len(built.between_products()) == 1


def test_the_textbook_body_is_what_ours_avoids(tmp_path: Path) -> None:
    """So that the test above can fail: a body of this kind keeps the square in float16, and takes three passes."""
    body = onnx.parser.parse_function(TEXTBOOK)
    path = saved(conv_frn_conv("float16", (8, 64, 56, 56), body=body), tmp_path)
    between = build_rtx(path, compute_capabilities=["8.9"], frn="native").between_products()
    assert len(between) == 3
    assert between[0]["outputs"] == ["float16"]


@pytest.mark.slow
def test_a_network_of_timm_is_built(timm: ModuleType, tmp_path: Path, plugin: list[Path]) -> None:
    network = timm.create_model("resnetv2_50d_frn", num_classes=5).eval()
    export(network, (torch.zeros(2, 3, 64, 64),), dynamic="all").save(tmp_path / "net.onnx")
    for way, layers in (("plugin", 51), ("native", 0)):
        shapes = {"": (8, 3, 224, 224)}
        built = build_rtx(
            tmp_path / "net.onnx", compute_capabilities=["8.9"], frn=way, plugins=plugin, opt_shapes=shapes
        )
        assert built.error == "", built.message
        assert (built.facts["frn"]["nodes"], built.facts["frn"]["plugin_layers"]) == (51, layers)


def test_auto_without_a_gpu_counts_and_says_that_nothing_was_timed(
    shipped: Callable[..., Path], plugin: list[Path]
) -> None:
    built = build_rtx(shipped("float32"), compute_capabilities=["8.9"], plugins=plugin, **SHIPPED_RANGE)
    frn = built.facts["frn"]
    assert set(frn["layers_that_write"]) == {"plugin", "native"}
    assert frn["milliseconds"] == {}
    assert "nothing was timed" in frn["reason"]
    best = min(("native", "plugin"), key=lambda way: frn["layers_that_write"][way])
    assert (frn["way"], built.passes) == (best, frn["layers_that_write"][best])


def test_auto_is_native_where_both_take_as_many_passes(tmp_path: Path, plugin: list[Path]) -> None:
    path = saved(conv_frn_conv("float16", (8, 64, 28, 28)), tmp_path)
    frn = build_rtx(path, compute_capabilities=["8.9"], plugins=plugin).facts["frn"]
    assert frn["layers_that_write"]["plugin"] == frn["layers_that_write"]["native"]
    assert frn["way"] == "native"


@pytest.mark.parametrize(
    "shape", [("N", 4), ("N", 4, "L"), ("N", 4, "D", "H", "W")], ids=lambda shape: f"rank {len(shape)}"
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_rank_and_empty_shapes_are_built(dtype: str, shape: tuple[int | str, ...], tmp_path: Path) -> None:
    path = saved(frn_model(dtype, body=True, shape=shape), tmp_path)
    built = build_rtx(
        path,
        compute_capabilities=["8.9"],
        frn="native",
        min_shapes={"X": tuple(0 if isinstance(size, str) else size for size in shape)},
        opt_shapes={"X": tuple(5 if isinstance(size, str) else size for size in shape)},
    )
    assert built.error == "", built.message
    assert built.facts["precision"] is None  # no convolution and no product tells it


def test_weights_beside_the_file_are_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = conv_frn_conv("float32", (2, 16, 8, 8))
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert build_rtx(path, compute_capabilities=["8.9"], frn="native").error == ""
    (tmp_path / "model.onnx.data").unlink()
    built = build_rtx(path, compute_capabilities=["8.9"], frn="native")
    assert built.error == "ModelError"
    assert "its external data cannot be read" in built.message


def test_what_the_plugin_refuses_is_told_by_the_logger_of_tensorrt_rtx(tmp_path: Path, plugin: list[Path]) -> None:
    model = frn_model(shape=(2, 4, 8, 8))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = onnx.TensorProto.INT32
    built = build_rtx(saved(model, tmp_path), compute_capabilities=["8.9"], frn="plugin", plugins=plugin)
    assert "input X is of the wrong type. Got int32; expected float32, float16 or bfloat16" in built.message


def _nonsense() -> onnx.ModelProto:
    model = frn_model(body=True)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Nonsense", ""
    return model


NET = conv_frn_conv("float32", (2, 16, 8, 8))

RTX_REFUSES: dict[str, tuple[onnx.ModelProto, dict[str, Any], str, str]] = {
    "bfloat16 on 7.5": (
        conv_frn_conv("bfloat16", (2, 16, 8, 8)),
        {"compute_capabilities": ["7.5", "8.9"]},
        "InputError",
        "holds bfloat16, which GPUs of compute capability 7.5 do not have",
    ),
    "float8 on 8.6": (
        quantized(NET, FLOAT8),
        {"compute_capabilities": ["8.6"]},
        "InputError",
        "holds float8, which GPUs have from compute capability 8.9 on",
    ),
    "a quantized bias": (
        quantized(NET, INT8, bias=True),
        {},
        "ModelError",
        "dequantizes an int32 tensor, as a quantized bias is, and TensorRT-RTX",
    ),
    "an operator that is not there": (
        _nonsense(),
        {"opt_shapes": {"": (2, 4, 8, 8)}},
        "ModelError",
        "holds an operator that TensorRT-RTX 1.7.1.116 does not know. Got Nonsense",
    ),
    "a card that is not there": (
        NET,
        {"compute_capabilities": ["9.0"]},
        "InputError",
        "TensorRT-RTX 1.7.1.116 does not build for this. Got '9.0'; expected 7.5, 8.0, 8.6, 8.9, 12.0",
    ),
    "version compatible": (
        NET,
        {"version_compatible": True},
        "InputError",
        "--version-compatible: TensorRT-RTX 1.7.1.116 does not have this",
    ),
    "a library that is not one": (
        NET,
        {"frn": "plugin", "plugins": [__file__]},
        "BackendError",
        "does not load this plugin library",
    ),
    "a library that is not there": (
        NET,
        {"frn": "plugin", "plugins": ["none.so"]},
        "BackendError",
        "no such plugin library",
    ),
}


@pytest.mark.parametrize(("model", "options", "kind", "message"), RTX_REFUSES.values(), ids=RTX_REFUSES)
def test_what_tensorrt_rtx_refuses_is_reported_in_our_words(
    model: onnx.ModelProto, options: dict[str, Any], kind: str, message: str, tmp_path: Path
) -> None:
    built = build_rtx(saved(model, tmp_path), **{"frn": "native", "compute_capabilities": ["8.9"], **options})
    assert built.error == kind, built
    assert message in built.message
