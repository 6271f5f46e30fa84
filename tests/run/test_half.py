"""Half precision rounded at every tensor, against NumPy's float16 and ml_dtypes' bfloat16."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
import torch
import torch.nn.functional as F
from graphs import ELEMENT_TYPES, OPSET, frn_model, frn_parameters, one_node
from tolerances import EXACT, OP_BFLOAT16, OP_FLOAT16, ROUNDED_BFLOAT16, ROUNDED_FLOAT16

from deploynorm import run
from deploynorm.contract import DOMAIN, INPUTS, OP_TYPE
from deploynorm.errors import BackendError, InputError, ModelError
from deploynorm.lowering import function_proto
from deploynorm.reference import filter_response_norm
from deploynorm.run import half as half_module
from deploynorm.run.half import HalfRunner
from deploynorm.run.onnxruntime import OnnxRuntimeRunner

Array = np.ndarray[Any, Any]
TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ROUNDED = {"float16": ROUNDED_FLOAT16, "bfloat16": ROUNDED_BFLOAT16}


@pytest.fixture(autouse=True)
def _needs_onnxruntime(require: Callable[[str], None]) -> None:
    require("ort")


def values(dtype: str, *shape: int, scale: float = 1.0, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(TYPES[dtype])


def graph(text: str, dtype: str) -> onnx.ModelProto:
    """A model in ONNX's own notation: `half` stands for the type, and #3 for 3 in it, whose bits the notation wants."""
    body = re.sub(r"#(\d+)", lambda found: str(np.array(float(found[1])).astype(TYPES[dtype]).view(np.uint16)), text)
    body = body.replace("half", dtype)
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {OPSET}]> g {body}')


def infer(model: onnx.ModelProto, **feeds: Array) -> Array:
    with HalfRunner(model) as runner:
        (got,) = runner.infer(feeds).values()
    return got


def operator(op_type: str, dtype: str, attributes: Mapping[str, Any], **feeds: Array) -> Array:
    model = one_node(
        op_type,
        {name: (x.dtype.name, tuple(f"{name}{axis}" for axis in range(x.ndim))) for name, x in feeds.items()},
        (dtype, None),
    )
    for name, value in attributes.items():
        model.graph.node[0].attribute.append(onnx.helper.make_attribute(name, value))
    return infer(model, **feeds)


# Every finite half value once, in an order that brings large and small ones together.
ALL = {
    name: (bits := np.random.default_rng(1).permutation(2**16).astype(np.uint16).view(dtype))[
        np.isfinite(bits.astype(np.float32))
    ]
    for name, dtype in TYPES.items()
}
BINARY = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Max": np.maximum}
UNARY = {"Sqrt": np.sqrt, "Abs": np.abs, "Neg": np.negative, "Relu": lambda x: np.maximum(x, x.dtype.type(0))}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", [*BINARY, *UNARY])
def test_elementwise_operators_are_those_of_numpy_to_the_last_bit(name: str, dtype: str) -> None:
    """With every number of the type: subnormal ones, and those whose result is infinite or not a number."""
    x, y = ALL[dtype], np.roll(ALL[dtype], 1)
    with np.errstate(all="ignore"):
        want = BINARY[name](x, y) if name in BINARY else UNARY[name](x)
    got = operator(name, dtype, {}, x=x, z=y) if name in BINARY else operator(name, dtype, {}, x=x)
    assert got.dtype == want.dtype == TYPES[dtype]
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    if name in ("Mul", "Div"):
        assert np.isinf(want.astype(np.float32)).sum() > 1000


def in_torch(function: Callable[..., torch.Tensor]) -> Callable[..., Array]:
    return lambda *arrays: function(*map(torch.from_numpy, arrays)).numpy()


SHAPES: dict[str, tuple[Callable[..., Array], dict[str, tuple[int, ...]]]] = {
    "Conv": (in_torch(F.conv2d), {"x": (2, 32, 7, 9), "w": (8, 32, 3, 3), "b": (8,)}),
    "ConvTranspose": (in_torch(F.conv_transpose2d), {"x": (2, 32, 7, 9), "w": (32, 8, 3, 3)}),
    "MatMul": (np.matmul, {"x": (16, 300), "z": (300, 12)}),
    "Gemm": (lambda x, y, b: x @ y + b, {"x": (16, 300), "z": (300, 12), "b": (12,)}),
    "GlobalAveragePool": (lambda x: x.mean((2, 3), keepdims=True), {"x": (2, 8, 30, 30)}),
    "Softmax": (in_torch(lambda x: F.softmax(x, -1)), {"x": (5, 100)}),
    "Sigmoid": (lambda x: 1 / (1 + np.exp(-x)), {"x": (50, 50)}),
    "Exp": (np.exp, {"x": (50, 50)}),
    "Tanh": (np.tanh, {"x": (50, 50)}),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_sums_run_in_float32_and_are_rounded_once(name: str, dtype: str) -> None:
    definition, shapes = SHAPES[name]
    feeds = {each: values(dtype, *shape, seed=seed) for seed, (each, shape) in enumerate(shapes.items())}
    want = definition(*(x.astype(np.float64) for x in feeds.values()))
    got = operator(name, dtype, {}, **feeds)
    assert got.dtype == TYPES[dtype]
    np.testing.assert_allclose(got.astype(np.float64), want, **ROUNDED[dtype].kwargs())
    assert np.abs(got.astype(np.float64) - want).max() > 1e-5 * np.abs(want).max(), "nothing was rounded"


@pytest.mark.parametrize("dtype", TYPES)
def test_float32_statistics_beside_a_half_input_stay_float32(dtype: str) -> None:
    """A variance of 1e6 would be infinite in float16."""
    x = values(dtype, 2, 4, 5, 5, scale=1000)
    one, small, large = np.ones(4, np.float32), np.full(4, 1e-7, np.float32), np.full(4, 1e6, np.float32)
    got = operator("BatchNormalization", dtype, {}, x=x, scale=one, bias=small, mean=small, variance=large)
    want = in_torch(F.batch_norm)(*(v.astype(np.float64) for v in (x, small, large, one, small)))
    np.testing.assert_allclose(got.astype(np.float64), want, **ROUNDED[dtype].kwargs())


def test_a_sum_past_the_largest_float16_is_an_infinity_and_none_in_bfloat16() -> None:
    for dtype, finite in (("float16", False), ("bfloat16", True)):
        ones = np.full((1, 64, 3, 3), 20, TYPES[dtype])
        got = operator("Conv", dtype, {}, x=ones, w=np.full((1, 64, 3, 3), 300, TYPES[dtype]))
        assert np.isfinite(got.astype(np.float32)).all() == finite  # 64 * 9 * 6000 = 3.5 million


CHAIN = "(half[N] x) => (half[N] y) { a = Mul(x, x) b = Add(a, x) c = Sqrt(b) d = Div(c, x) y = Sub(d, a) }"


@pytest.mark.parametrize("dtype", TYPES)
def test_every_tensor_in_between_is_rounded(dtype: str) -> None:
    x = ALL[dtype]
    with np.errstate(all="ignore"):
        square = x * x
        want = np.sqrt(square + x) / x - square
        once = x.astype(np.float32)
        once = (np.sqrt(once * once + once) / once - once * once).astype(TYPES[dtype])
    got = infer(graph(CHAIN, dtype), x=x)
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    assert (once.astype(np.float32) != want.astype(np.float32)).mean() > 0.2, "rounding once would do as well"


def test_onnxruntime_itself_hides_an_overflow() -> None:
    """Why this runner exists; the day this fails, ONNX Runtime has half arithmetic."""
    model, x = graph("(half[N] x) => (half[N] y) { a = Mul(x, x) y = Sqrt(a) }", "float16"), np.full(1, 300, np.float16)
    with OnnxRuntimeRunner(model.SerializeToString()) as stock:
        assert stock.infer({"x": x})["y"].tolist() == [300]
    assert infer(model, x=x).tolist() == [np.inf]


CONSTANTS = {
    "weight": "(half[N] x) => (half[N] y) <half[1] w = {#300}> { y = Mul(x, w) }",
    "weight used twice": "(half[N] x) => (half[N] y) <half[1] w = {#300}> { a = Add(x, w) b = Sub(a, w) "
    "y = Mul(b, w) }",
    "weight that is expanded": "(half[N] x) => (half[N] y) <half[1] w = {#3}> { s = Shape(x) "
    "a = Expand(w, s) b = Mul(x, a) y = Identity(b) }",
    "Constant": "(half[N] x) => (half[N] y) { w = Constant<value = half[1] {#300}>() y = Mul(x, w) }",
    "ConstantOfShape": "(half[N] x) => (half[N] y) { s = Shape(x) w = ConstantOfShape<value = half[1] {#300}>(s) "
    "y = Mul(x, w) }",
    "dtype of EyeLike": "(half[N] x) => (half[N] y) { s = Constant<value_ints = [1, 1]>() a = ConstantOfShape(s) "
    "e = EyeLike<dtype = TYPE>(a) f = Constant<value_ints = [-1]>() r = Reshape(e, f) b = Mul(x, r) "
    "w = Constant<value = half[1] {#300}>() y = Mul(b, w) }",
    "CastLike": "(half[N] x) => (half[N] y) { w = Constant<value = float[1] {300.0}>() h = CastLike(w, x) "
    "y = Mul(x, h) }",
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_every_kind(name: str, dtype: str) -> None:
    text = CONSTANTS[name].replace("TYPE", str(ELEMENT_TYPES[dtype]))
    factor = TYPES[dtype].type(3 if name == "weight that is expanded" else 300)
    x = np.array([1, 300], TYPES[dtype])
    with np.errstate(over="ignore"):
        want = x * factor if name != "weight used twice" else ((x + factor) - factor) * factor
    np.testing.assert_array_equal(infer(graph(text, dtype), x=x).astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("dtype", TYPES)
def test_branches_are_rounded_too(dtype: str) -> None:
    model = graph(
        "(half[N] x, bool c) => (half[N] y) { y = If(c) <"
        "then_branch = yes () => (half[N] t) { a = Mul(x, x) t = Sqrt(a) }, "
        "else_branch = no () => (half[N] e) { e = Identity(x) }> }",
        dtype,
    )
    x = np.array([1.01, 300, 3e-5], TYPES[dtype])
    with np.errstate(over="ignore", under="ignore"):
        want = np.sqrt(x * x)
    np.testing.assert_array_equal(infer(model, x=x, c=np.array(True)).astype(float), want.astype(float))
    np.testing.assert_array_equal(infer(model, x=x, c=np.array(False)).astype(float), x.astype(float))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("body", ["ours", "none", "squares in half"])
def test_frn_runs_through_its_body_or_as_the_kernels_do(body: str, dtype: str) -> None:
    """A body that squares in half precision is seen through: its output is zero where it should be near one."""
    naive = f"""<opset_import: ["": {OPSET}], domain: "{DOMAIN}"> {OP_TYPE} ({", ".join(INPUTS)}) => (Y) {{
        axes = Constant<value_ints = [2, 3]>() square = Mul(X, X) mean = ReduceMean(square, axes)
        root = Sqrt(mean) Y = Div(X, root) }}"""
    bodies = {
        "ours": function_proto(OPSET, half=True),
        "none": None,
        "squares in half": onnx.parser.parse_function(naive),
    }
    x = values(dtype, 2, 4, 9, 9, scale=1000)
    got = infer(frn_model(dtype, body=bodies[body]), X=x).astype(np.float64)
    if body == "squares in half":
        assert np.abs(got).max() == 0 if dtype == "float16" else np.abs(got).mean() > 0.5
        return
    want = filter_response_norm(x.astype(np.float64), *(v.astype(np.float64) for v in frn_parameters().values()))
    np.testing.assert_allclose(got, want, **(OP_FLOAT16 if dtype == "float16" else OP_BFLOAT16).kwargs())


def test_a_value_of_unknown_type_is_named() -> None:
    model = one_node("Nonsense", {"x": ("float16", (1,))}, ("float16", (1,)))
    model.graph.node[0].output[0] = "unknown"
    model.graph.node.append(onnx.helper.make_node("Relu", ["unknown"], ["y"]))
    with pytest.raises(
        ModelError, match=r"the type of value unknown is not known\. Got the output of ai\.onnx::Nonsense"
    ):
        HalfRunner(model)


def test_a_file_with_external_data_runs(tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    onnx.save(graph(CONSTANTS["weight"], "float16"), path, save_as_external_data=True, location="d", size_threshold=0)
    with HalfRunner(path) as runner:
        assert runner.infer({"x": np.ones(1, np.float16)})["y"].tolist() == [300]


def test_an_onnxruntime_that_drops_the_rounding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unrounded(OnnxRuntimeRunner):
        def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
            return {"y": np.abs(feeds["x"])}

    half_module._assert_rounding.cache_clear()
    monkeypatch.setattr(half_module, "OnnxRuntimeRunner", Unrounded)
    with pytest.raises(BackendError, match="does not round to float16 where the graph says so"):
        HalfRunner(graph(CHAIN, "float16"))


@pytest.mark.parametrize("dtype", ["float32", *TYPES])
def test_a_half_file_opens_in_this_runner_unless_another_is_named(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    text = f"(half[N] x) => (half[N] y) {{ a = Mul(x, x) y = Cast<to = {ELEMENT_TYPES[dtype]}>(a) }}"
    onnx.save(graph(text, "float" if dtype == "float32" else dtype), path)
    with run.open_runner(path) as chosen, run.open_runner(path, "reference") as reference:
        assert isinstance(chosen, OnnxRuntimeRunner if dtype == "float32" else HalfRunner)
        assert chosen.precision == reference.precision == (None if dtype == "float32" else dtype)
        assert chosen.name == ("onnxruntime (cpu)" if dtype == "float32" else f"half ({dtype}, each tensor rounded)")
    if dtype == "float16":
        for options in ({"backend": "onnxruntime"}, {"plugins": []}):
            with run.open_runner(path, **options) as stock:
                assert isinstance(stock, OnnxRuntimeRunner)
                assert stock.precision == "float16"


@pytest.mark.parametrize("option", [{"providers": ("cuda",)}, {"plugins": ()}], ids=str)
def test_options_that_it_would_ignore_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the half backend takes no (providers|plugins)"):
        run.open_runner(tmp_path / "model.onnx", "half", **option)


def test_the_model_given_is_left_as_it_is() -> None:
    model = graph(CHAIN, "float16")
    before = model.SerializeToString()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HalfRunner(model).close()
    assert model.SerializeToString() == before
    np.testing.assert_allclose(infer(model, x=np.ones(1, np.float16)), [np.sqrt(np.float16(2)) - 1], **EXACT.kwargs())
