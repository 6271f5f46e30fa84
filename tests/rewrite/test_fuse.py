"""`fuse`: the forms of FRN that become one node, the graphs that look like one and stay, and the numbers of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import fuse as fuse_benchmark
import loose_forms
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from loose_forms import CHANNELS, FORMS, exported
from tolerances import FUSED, OP_FLOAT16, OP_FLOAT32, Tolerance
from torch import nn

from deploynorm.contract import ADD_OP_TYPE, DOMAIN, OP_TYPE
from deploynorm.errors import InputError
from deploynorm.onnx_file import OnnxFile
from deploynorm.rewrite import rewrite
from deploynorm.rewrite.fuse import fuse
from deploynorm.rewrite.result import RewriteResult
from deploynorm.run.onnxruntime import OnnxRuntimeRunner

FRN, ADDED = f"{DOMAIN}::{OP_TYPE}", f"{DOMAIN}::{ADD_OP_TYPE}"
SHAPES = ((2, CHANNELS, 9, 7), (3, CHANNELS, 4, 6))


@pytest.fixture(autouse=True)
def _needs(require: Callable[[str], None]) -> None:
    require("ort")


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def _fused(proto: bytes | onnx.ModelProto) -> RewriteResult:
    """Runs the pass; the model given stays as it is, and a second run finds nothing."""
    model = ir.from_proto(onnx.load_model_from_string(proto) if isinstance(proto, bytes) else proto)
    original = _bytes(model)
    result = fuse(model)
    assert _bytes(model) == original, "the model given was changed"
    onnx.checker.check_model(ir.to_proto(result.model))
    again = fuse(result.model)
    assert not again.modified
    assert again.model is result.model
    return result


def _compare(proto: bytes, model: ir.Model, feeds: Mapping[str, np.ndarray], tolerance: Tolerance = OP_FLOAT32) -> None:
    outputs = []
    for candidate in (proto, _bytes(model)):
        with OnnxRuntimeRunner(candidate, plugins=[]) as runner:
            outputs.append(runner.infer(feeds))
    want, got = outputs
    assert list(got) == list(want)
    for name in want:
        assert np.isfinite(want[name]).all()
        assert want[name].std() > 0
        assert got[name].shape == want[name].shape
        np.testing.assert_allclose(got[name].astype(float), want[name].astype(float), **tolerance.kwargs())


def _maps(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("exporter", ["TorchScript 11", "TorchScript 17"])
@pytest.mark.parametrize("form", FORMS)
def test_form_is_fused(form: str, exporter: str) -> None:
    proto = exported(form, exporter)
    if proto is None:
        assert form.startswith("rms_norm")
        return
    _is_one_node(form, proto)


@pytest.mark.slow
@pytest.mark.parametrize("form", [name for name in FORMS if name.startswith(("float16", "rms_norm"))])
def test_form_of_the_new_exporter_that_stands_alone_is_fused(form: str) -> None:
    """The others are in one network below."""
    proto = exported(form, "dynamo 20")
    assert proto is not None
    _is_one_node(form, proto)


def _is_one_node(form: str, proto: bytes) -> None:
    result = _fused(proto)
    if form.startswith("residual"):  # of a ReLU of a difference, and that of x itself
        assert result.after == Counter({"Sub": 1, "Relu": 1, ADDED: 1}) | Counter(Constant=result.after["Constant"])
    else:
        assert result.after == Counter({FRN: 1})
    half = form.startswith("float16")
    for shape in SHAPES:
        x = _maps(shape, np.float16 if half else np.float32)
        _compare(proto, result.model, {"x": x}, OP_FLOAT16 if half else OP_FLOAT32)


class Network(nn.Module):
    """Every form behind a convolution of its own."""

    def __init__(self, forms: list[str]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, CHANNELS, 3, padding=1) for _ in forms)
        self.forms = nn.ModuleList(map(loose_forms.loose, forms))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [form(conv(x)) for conv, form in zip(self.convolutions, self.forms, strict=True)]


VIEWS = ("all flattened", "rms_norm of a view", "sum by the size", "residual")


@pytest.mark.parametrize(
    ("exporter", "forms"),
    [("dynamo 23", VIEWS), *(pytest.param(f"dynamo {n}", FORMS, marks=pytest.mark.slow) for n in (18, 20, 23))],
    ids=["views", "opset 18", "opset 20", "opset 23"],
)
def test_one_network_of_many_forms(exporter: str, forms: Iterable[str]) -> None:
    """The new exporter takes seconds for each call, and knows sizes by names and sums of names."""
    names = [name for name in forms if not name.startswith("float16")]
    names = [name for name in names if exporter == "dynamo 23" or not name.startswith("rms_norm")]
    torch.manual_seed(0)
    proto = loose_forms.export(Network(names).eval(), torch.randn(2, 3, 9, 7), exporter)
    result = _fused(proto)
    added = sum(name.startswith("residual") for name in names)  # each with a ReLU of a difference, and that of x itself
    expected = {"Conv": len(names), FRN: len(names) - added, ADDED: added, "Sub": added, "Relu": added}
    assert result.after - Counter(Constant=added) == +Counter(expected)
    assert not [change for change in result.changes if change.outcome != "rewritten"]
    for shape in ((2, 3, 9, 7), (1, 3, 4, 6)):
        _compare(proto, result.model, {"x": _maps(shape)})


class Graph:
    """A graph in ONNX's text form over x (N, C, H, W), C = 8, with constants by name.

    Constants are g, b, t, e (1, C, 1, 1); flat (C,); column (C, 1); last (1, 1, 1, C); four (C, 1, 1, 1) and
    five (1, 1, C, 1, 1); map and wide, which
    change along H and W, and along N; numbers; and axes.

    Attributes:
        nodes: Its nodes.
        after: Nodes of each operator besides FRN, or other counts of it.
        x, y: Shapes of the input and the output.
        dtype: Of both.
        inputs, outputs: More of them, in ONNX's text.
        defaults: Inputs that have a constant too, which is used where they are not fed.
        runs: Whether a runtime takes it.
    """

    def __init__(
        self,
        nodes: str,
        after: Mapping[str, int] | None = None,
        *,
        x: str = f"N, {CHANNELS}, H, W",
        y: str | None = None,
        dtype: str = "float",
        inputs: str = "",
        outputs: str = "",
        defaults: tuple[str, ...] = (),
        runs: bool = True,
    ) -> None:
        self.after = Counter({FRN: 1, **(after or {})})
        self.nodes, self.x, self.y, self.dtype, self.runs = nodes, x, y or x, dtype, runs
        self.inputs, self.outputs, self.defaults = inputs, outputs, defaults

    def model(self) -> onnx.ModelProto:
        proto = onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": 20, "other": 1]>
            net ({self.dtype}[{self.x}] x{self.inputs}) => ({self.dtype}[{self.y}] y{self.outputs})
            {{ {self.nodes.replace(";", "")} }}"""
        )
        rng = np.random.default_rng(0)
        numbers = {
            "two": 2,
            "half": 0.5,
            "eps": 1e-3,
            "zero": 0,
            "slope": 0.1,
            "large": 6,
            "minus": -0.5,
            "nan": np.nan,
        }
        shapes = {
            **dict.fromkeys("gbt", (1, CHANNELS, 1, 1)),
            "e": (1, CHANNELS, 1, 1),
            "flat": (CHANNELS,),
            "column": (CHANNELS, 1),
            "last": (1, 1, 1, CHANNELS),
            "four": (CHANNELS, 1, 1, 1),
            "five": (1, 1, CHANNELS, 1, 1),
            "map": (1, CHANNELS, 9, 7),
            "wide": (2, CHANNELS, 1, 1),
        }
        arrays = {
            name: np.abs(rng.normal(size=shape)) * 0.1 + 1e-3 if name == "e" else rng.normal(size=shape)
            for name, shape in shapes.items()
        }
        kind = onnx.helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
        constants = {name: np.array(value, kind) for name, value in {**numbers, **arrays}.items()}
        axes = {"axes": [2, 3], "three": [2, 3, 4], "width": [3], "height": [2], "all": [1, 2, 3], "inner": [1, 2]}
        constants |= {name: np.array(each, np.int64) for name, each in axes.items()}
        read = {name for node in proto.graph.node for name in node.input}
        fed = {value.name for value in proto.graph.input} - set(self.defaults)
        for name in sorted((read & constants.keys()) - fed):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(constants[name], name))
        return proto

    def feeds(self) -> dict[str, np.ndarray]:
        sizes = {"N": 2, "H": 9, "W": 7, "D": 5, "B": 1, "C": CHANNELS}
        shape = tuple(int(sizes.get(size, size)) for size in self.x.split(", "))
        return {"x": _maps(shape, np.float64 if self.dtype == "double" else np.float32)}


SQUARE = "s = Mul (x, x); m = ReduceMean (s, axes); "
INVERSE = f"{SQUARE}v = Add (m, eps); r = Sqrt (v); i = Reciprocal (r); "
UNIT = f"{INVERSE}u = Mul (x, i); "
AFFINE = f"{UNIT}a = Mul (u, g); c = Add (a, b); "
LAST = "m = ReduceMean (s, inner); v = Add (m, eps); r = Sqrt (v); u = Div (h, r); a = Mul (u, last); "
FIXED = f"2, {CHANNELS}, 9, 7"

ONE_NODE = {
    "operands the other way round": Graph(
        f"{SQUARE}v = Add (eps, m); r = Sqrt (v); u = Div (x, r); a = Mul (g, u); c = Add (b, a); y = Max (t, c)"
    ),
    "powers": Graph("s = Pow (x, two); m = ReduceMean (s, axes); v = Add (m, e); i = Pow (v, minus); y = Mul (x, i)"),
    "absolute value first": Graph(
        "w = Abs (x); s = Mul (w, w); m = ReduceMean (s, axes); v = Add (m, e); r = Sqrt (v); y = Div (x, r)"
    ),
    "half of the mean": Graph(f"{SQUARE}k = Mul (m, half); v = Add (k, e); r = Sqrt (v); y = Div (x, r)"),
    "PRelu without a slope": Graph(f"{AFFINE}y = PRelu (c, zero)"),
    "LeakyRelu without a slope": Graph(f"{AFFINE}y = LeakyRelu <alpha = 0.0> (c)"),
    "times whether it is positive": Graph(f"{AFFINE}p = Greater (c, zero); q = Cast <to = 1> (p); y = Mul (q, c)"),
    "where it is less": Graph(f"{AFFINE}p = Less (c, t); y = Where (p, t, c)"),
    "where it is not less": Graph(f"{AFFINE}p = Less (c, t); n = Not (p); y = Where (n, c, t)"),
    "where the threshold is less": Graph(f"{AFFINE}p = LessOrEqual (t, c); y = Where (p, c, t)"),
    "ReLU of a difference": Graph(f"{AFFINE}d = Sub (c, t); k = Relu (d); y = Add (k, t)"),
    "scaled and shifted behind the threshold": Graph(f"{AFFINE}d = Relu (c); k = Mul (d, e); y = Sub (k, b)"),
    "two thresholds": Graph(f"{AFFINE}d = Relu (c); y = Max (d, t)"),
    "Clip without an upper bound": Graph(f"{AFFINE}y = Clip (c, half)"),
    "a sum that is divided": Graph(
        "k = ReduceSumSquare (x, axes); m = Div (k, large); v = Add (m, eps); r = Sqrt (v); y = Div (x, r)", x=FIXED
    ),
    "double": Graph(f"{AFFINE}y = Max (c, t)", dtype="double"),
    "of a view (N, C, L)": Graph(
        "s = Mul (x, x); m = ReduceMean (s, height); v = Add (m, eps); r = Sqrt (v); u = Div (x, r); "
        "y = Mul (u, column)",
        x=f"N, {CHANNELS}, W",
    ),
    "volumes": Graph(
        "s = Mul (x, x); m = ReduceMean (s, three); v = Add (m, eps); r = Sqrt (v); u = Div (x, r); y = Add (u, four)",
        x=f"N, {CHANNELS}, D, H, W",
    ),
    "channels last, between convolutions' layout": Graph(
        "h = Transpose <perm = [0, 2, 3, 1]> (x); s = Mul (h, h); " + LAST + "c = Relu (a); "
        "y = Transpose <perm = [0, 3, 1, 2]> (c)"
    ),
    "channels last": Graph(
        "h = Identity (x); s = Mul (h, h); " + LAST + "y = Relu (a)", {"Transpose": 2}, x=f"N, H, W, {CHANNELS}"
    ),
    "a view behind it stays": Graph(
        f"{AFFINE}d = Max (c, t); f = Flatten (d); y = Neg (f)", {"Flatten": 1, "Neg": 1}, y="N, HW"
    ),
    "a threshold behind a view stays": Graph(
        f"{AFFINE}f = Flatten (c); y = Relu (f)", {"Flatten": 1, "Relu": 1}, y="N, HW"
    ),
    "a view before and one behind it": Graph(
        "n = Constant <value_ints = [2, 8, 63]> (); k = Reshape (x, n); s = Mul (k, k); m = ReduceMean (s, height); "
        "v = Add (m, eps); r = Sqrt (v); u = Div (k, r); a = Mul (u, column); y = Flatten (a)",
        {"Constant": 1, "Reshape": 1, "Flatten": 1},
        x=FIXED,
        y="N, HW",
    ),
    "one mean for two": Graph(
        f"{UNIT}y = Mul (u, g); z = Mul (u, e)", {FRN: 2}, outputs=f", float[N, {CHANNELS}, H, W] z"
    ),
    "the same parameters for two": Graph(
        f"{AFFINE}s2 = Mul (c, c); m2 = ReduceMean (s2, axes); v2 = Add (m2, eps); r2 = Sqrt (v2); u2 = Div (c, r2); "
        "a2 = Mul (u2, g); y = Add (a2, b)",
        {FRN: 2},
    ),
    "an output before the threshold": Graph(
        f"{AFFINE}y = Max (c, t)", {"Max": 1}, outputs=f", float[N, {CHANNELS}, H, W] c"
    ),
    "a comparison that is read elsewhere": Graph(
        f"{AFFINE}p = Greater (c, t); y = Where (p, c, t)",
        {"Greater": 1, "Where": 1},
        outputs=f", bool[N, {CHANNELS}, H, W] p",
    ),
    "a residual": Graph(f"k = Neg (x); {AFFINE}d = Add (k, c); y = Max (d, t)", {FRN: 0, ADDED: 1, "Neg": 1}),
    "a residual and the ReLU of a difference": Graph(
        f"k = Neg (x); {AFFINE}d = Add (k, c); f = Sub (d, t); p = Relu (f); y = Add (t, p)",
        {FRN: 0, ADDED: 1, "Neg": 1},
    ),
    "a residual and Clip": Graph(
        f"k = Neg (x); {AFFINE}d = Add (k, c); y = Clip (d, half)", {FRN: 0, ADDED: 1, "Neg": 1}
    ),
    "a residual and Clip with an upper bound stay": Graph(
        f"k = Neg (x); {AFFINE}d = Add (k, c); y = Clip (d, zero, large)", {"Neg": 1, "Add": 1, "Clip": 1}
    ),
    "a residual and the ReLU of another difference stay": Graph(
        f"k = Neg (x); {AFFINE}d = Add (k, c); f = Sub (d, t); p = Relu (f); y = Add (g, p)",
        {"Neg": 1, "Add": 2, "Sub": 1, "Relu": 1},
    ),
    "a residual and the ReLU of a negative difference stay": Graph(
        f"k = Neg (x); {AFFINE}d = Add (k, c); f = Sub (t, d); p = Relu (f); y = Add (t, p)",
        {"Neg": 1, "Add": 2, "Sub": 1, "Relu": 1},
    ),
    "parameters that change over space stay": Graph(f"{UNIT}y = Mul (u, map)", {"Mul": 1}, x=FIXED),
    "parameters that widen the batch stay": Graph(
        f"{UNIT}y = Mul (u, wide)", {"Mul": 1}, x=f"B, {CHANNELS}, H, W", y=f"2, {CHANNELS}, H, W"
    ),
    "a slope stays": Graph(f"{AFFINE}y = PRelu (c, slope)", {"PRelu": 1}),
    "an upper bound stays": Graph(f"{AFFINE}y = Clip (c, zero, large)", {"Clip": 1}),
    "a parameter that is fed stays": Graph(
        f"{UNIT}y = Mul (u, g)", {"Mul": 1}, inputs=f", float[1, {CHANNELS}, 1, 1] g", defaults=("g",)
    ),
    "a threshold that is NaN stays": Graph(f"{AFFINE}y = Max (c, nan)", {"Max": 1}, runs=False),
    # ONNX Runtime's own fusions took the parameter for one of the channels (#25855, #31980).
    "a parameter along W, of which there are as many as channels": Graph(
        f"{UNIT}y = Mul (u, flat)", {"Mul": 1}, x=f"N, {CHANNELS}, H, {CHANNELS}"
    ),
}

LEFT = {
    "mean over one axis": (
        Graph("s = Mul (x, x); m = ReduceMean (s, width); v = Add (m, eps); r = Sqrt (v); y = Div (x, r)"),
        "some of the axes of space only",
    ),
    "mean over channels too": (
        Graph("s = Mul (x, x); m = ReduceMean (s, all); v = Add (m, eps); r = Sqrt (v); y = Div (x, r)"),
        "more than the axes of space",
    ),
    "mean over all axes": (
        Graph("s = Mul (x, x); m = ReduceMean (s); v = Add (m, eps); r = Sqrt (v); y = Div (x, r)"),
        "over all axes",
    ),
    "mean of x": (
        Graph("m = ReduceMean (x, axes); v = Add (m, eps); r = Sqrt (v); y = Div (x, r)"),
        "not the square",
    ),
    "variance": (
        Graph(
            "n = ReduceMean (x, axes); d = Sub (x, n); s = Mul (d, d); m = ReduceMean (s, axes); v = Add (m, eps); "
            "r = Sqrt (v); y = Div (x, r)"
        ),
        "neither x nor constant",
    ),
    "variance as a difference of means": (
        Graph(
            f"n = ReduceMean (x, axes); k = Mul (n, n); {SQUARE}d = Sub (m, k); w = Add (d, eps); r = Sqrt (w); "
            "y = Div (x, r)"
        ),
        "neither x nor constant",
    ),
    "epsilon within the square": (
        Graph("d = Add (x, eps); s = Mul (d, d); m = ReduceMean (s, axes); r = Sqrt (m); y = Div (x, r)"),
        "neither x nor constant",
    ),
    "epsilon outside of the root": (
        Graph(f"{SQUARE}r = Sqrt (m); v = Add (r, eps); y = Div (x, v)"),
        "an epsilon outside of the root",
    ),
    "epsilon as a least value": (
        Graph(f"{SQUARE}v = Max (m, eps); r = Sqrt (v); y = Div (x, r)"),
        "it bounds what is not normalized yet",
    ),
    "no epsilon": (Graph(f"{SQUARE}r = Sqrt (m); y = Div (x, r)"), "its epsilon is not positive"),
    "epsilon that is fed": (
        Graph(f"{UNIT}y = Relu (u)", inputs=", float eps", defaults=("eps",)),
        "neither x nor constant",
    ),
    "no root": (Graph(f"{SQUARE}v = Add (m, eps); y = Div (x, v)"), "y is an output of the graph"),
    "another x": (
        Graph(f"k = Neg (x); q = Exp (k); {INVERSE}y = Mul (q, i)"),
        "neither x nor constant",
    ),
    "the mean is an output": (
        Graph(f"{UNIT}y = Mul (u, g)", outputs=f", float[N, {CHANNELS}, 1, 1] m"),
        "m is an output of the graph",
    ),
    "the root is read elsewhere": (
        Graph(f"{UNIT}w = Exp (r); y = Mul (u, w)"),
        "r is read by Exp w",
    ),
    "a mean of means is read elsewhere": (
        Graph(
            "s = Mul (x, x); w = ReduceMean (s, width); m = ReduceMean (w, height); v = Add (m, eps); r = Sqrt (v); "
            "u = Div (x, r); k = Exp (w); y = Mul (u, k)"
        ),
        "w is read by Exp k",
    ),
    "another domain's Mul": (
        Graph(f"{INVERSE}y = other.Mul (x, i)", runs=False),
        "Mul is not understood",
    ),
    "float16 on the way": (
        Graph(
            "k = Cast <to = 10> (x); s = Mul (k, k); m = ReduceMean (s, axes); w = Cast <to = 1> (m); "
            "v = Add (w, eps); r = Sqrt (v); y = Div (x, r)"
        ),
        "is computed in FLOAT16",
    ),
    "square of integers": (
        Graph(
            "k = Cast <to = 6> (x); s = Mul (k, k); w = Cast <to = 1> (s); m = ReduceMean (w, axes); v = Add (m, eps); "
            "r = Sqrt (v); y = Div (x, r)"
        ),
        "no floating-point number",
    ),
    "channels that only a run knows": (Graph(f"{UNIT}y = Relu (u)", x="N, C, H, W"), "number of its channels"),
    "a parameter of one more axis": (
        Graph(f"{UNIT}y = Mul (u, five)", x=FIXED, y=f"1, 2, {CHANNELS}, 9, 7"),
        "no form of x has the shape",
    ),
    "tokens": (
        Graph(
            "s = Mul (x, x); m = ReduceMean (s, height); v = Add (m, eps); r = Sqrt (v); u = Div (x, r); y = Relu (u)",
            x=f"N, 5, {CHANNELS}",
        ),
        "of three axes",
    ),
    "a value that grows": (
        Graph(
            f"{INVERSE}k = Shape <start = 0, end = 1> (x); rest = Constant <value_ints = [{CHANNELS}, 9, 14]> (); "
            "shape = Concat <axis = 0> (k, rest); w = Expand (i, shape); z = Concat <axis = 3> (x, x); y = Mul (z, w)",
            x=f"N, {CHANNELS}, 9, 7",
            y=f"N, {CHANNELS}, 9, 14",
        ),
        "grows to a shape that is none of x",
    ),
    # Where ONNX Runtime's own fusions were wrong: #30513 and #31144, #31147, #14537.
    "a mean without its axes, that broadcasts along H and W": (
        Graph(
            "s = Mul (x, x); m = ReduceMean <keepdims = 0> (s, axes); v = Add (m, eps); r = Sqrt (v); y = Div (x, r)",
            x=", ".join([str(CHANNELS)] * 4),
        ),
        "one axis of x with another",
    ),
    "one axis": (
        Graph(
            "k = Constant <value_ints = [0]> (); s = Mul (x, x); m = ReduceMean (s, k); v = Add (m, eps); "
            "r = Sqrt (v); y = Div (x, r)",
            x=f"{CHANNELS}",
        ),
        "it reads no maps",
    ),
    "axes that are fed": (
        Graph(f"{UNIT}y = Relu (u)", inputs=", int64[2] axes", defaults=("axes",)),
        "axes are not constant",
    ),
}


@pytest.mark.parametrize("name", ONE_NODE)
def test_graph_is_fused(name: str) -> None:
    case = ONE_NODE[name]
    proto = case.model()
    result = _fused(proto)
    assert +result.after == +case.after
    if case.runs:
        feeds = case.feeds()
        _compare(proto.SerializeToString(), result.model, feeds)


@pytest.mark.parametrize("name", LEFT)
def test_graph_is_left(name: str) -> None:
    case, reason = LEFT[name]
    model = ir.from_proto(case.model())
    result = fuse(model)
    assert not result.modified
    assert result.model is model
    assert any(reason in change.detail for change in result.changes), result.changes


def test_a_layer_in_a_branch_is_fused_there() -> None:
    values = f"float[N, {CHANNELS}, H, W]"
    branch = onnx.parser.parse_graph(f"taken () => ({values} z) {{ {AFFINE.replace(';', '')} z = Relu (c) }}")
    other = onnx.parser.parse_graph(f"other () => ({values} z) {{ z = Neg (x) }}")
    proto = Graph(f"{AFFINE}y = Relu (c)", inputs=", bool yes").model()
    del proto.graph.node[:]
    proto.graph.node.append(onnx.helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other))
    result = _fused(proto)
    assert result.after == Counter({"If": 1, FRN: 1, "Neg": 1})
    for yes in (True, False):
        feeds = {"x": _maps(SHAPES[0]), "yes": np.array(yes)}
        _compare(proto.SerializeToString(), result.model, feeds)


def test_local_functions_are_inlined_and_notes_are_kept() -> None:
    """Our own function stays, so that a file that was fused is not looked at again within it."""
    text = f"""<domain: "other", opset_import: ["": 20]>
        layer (x, g, b, axes, eps) => (c) {{ {AFFINE.replace(";", "")} }}"""
    proto = Graph("c = other.layer (x, g, b, axes, eps); y = Relu (c)").model()
    proto.functions.append(onnx.parser.parse_function(text))
    proto.metadata_props.add(key="labels", value="bag, boot")
    proto.graph.doc_string = "a graph"
    result = _fused(proto)
    assert result.after == Counter({FRN: 1})
    assert [function.name for function in result.model.functions.values()] == [OP_TYPE]
    assert result.model.metadata_props == {"labels": "bag, boot"}
    assert result.model.graph.doc_string == "a graph"


def test_sizes_that_inference_makes_up_do_not_stay() -> None:
    nodes = AFFINE.replace("(x, ", "(k, ").replace(", x)", ", k)")
    proto = Graph(f"k = MaxPool <kernel_shape = [3, 3]> (x); {nodes}y = Max (c, t)").model()
    del proto.graph.output[0].type.tensor_type.shape.dim[2:]
    for _ in range(2):
        proto.graph.output[0].type.tensor_type.shape.dim.add()
    result = _fused(proto)
    assert result.after == Counter({"MaxPool": 1, FRN: 1})
    assert b"unk__" not in _bytes(result.model)


@pytest.mark.slow
def test_ten_thousand_nodes_take_seconds() -> None:
    """1,000 layers one after the other, without names or shapes of their values."""
    calls = [line.strip().split(" = ") for line in f"{AFFINE}d = Relu (c)".split(";")]
    nodes, value = [], "x"
    for i in range(1000):
        for output, call in calls:
            op_type, arguments = call.rstrip(")").split(" (")
            inputs = [value if name == "x" else f"{name}{i}" if name in "smvriuac" else name
                      for name in arguments.split(", ")]  # fmt: skip
            nodes.append(onnx.helper.make_node(op_type, inputs, [f"{output}{i}"]))
        value = f"d{i}"
    nodes[-1].output[0] = "y"
    proto = Graph(f"{AFFINE}y = Relu (c)").model()
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    model = ir.from_proto(proto)
    assert fuse(model).after == Counter({FRN: 1000})


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 1000), marks=pytest.mark.slow)])
def test_nothing_is_fused_wrongly_in_random_graphs(seeds: range) -> None:
    """benchmarks/fuse.py has 10,000."""
    found = fuse_benchmark.fuzz(seeds)
    assert found["fused"] > len(seeds) / 3
    assert found["fused_again"] == 0
    assert found["worst_error"] < FUSED.rtol


def test_a_file_is_fused_and_checked(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(exported("paper", "TorchScript 17") or b"")
    with pytest.raises(InputError, match="give a shape"):
        rewrite(tmp_path / "net.onnx", ["fuse"])
    shapes = {"": SHAPES[0]}
    rewritten = rewrite(tmp_path / "net.onnx", ["fold", "fuse", "expand=primitives"], input_shapes=shapes)
    assert rewritten
    rewritten.save()
    assert "ReduceMean" in OnnxFile.read(tmp_path / "net.expanded.onnx").node_counts
    for wrong in ("fuse=all", "expand", "expand=custom", "melt"):
        with pytest.raises(InputError, match="rewrite: "):
            rewrite(tmp_path / "net.onnx", [wrong])
