"""The forms of FRN in standard operators: what they compute at each rank, type and size, and what is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from graphs import frn_model, frn_parameters, one_node
from tolerances import OP_FLOAT16, OP_FLOAT32
from torch import Tensor, nn

from deploynorm import export
from deploynorm._export.older_opset import to_older_opset
from deploynorm.contract import INPUTS, MIN_OPSET, OUTPUT, RESIDUAL
from deploynorm.errors import InputError, ModelError
from deploynorm.layers import FRN1d, FRN2d, FRN3d
from deploynorm.lowering import lower
from deploynorm.reference import filter_response_norm
from deploynorm.run.onnxruntime import OnnxRuntimeRunner
from deploynorm.run.reference import ReferenceRunner


@pytest.fixture(autouse=True)
def _needs(require: Callable[[str], None]) -> None:
    require("ort")


def lowered(
    lowering: str, dtype: str, shape: tuple[int | str, ...], residual: bool, opset: int | None = None
) -> onnx.ModelProto:
    """A file of one node, as `deploynorm export` lowers it."""
    model = ir.from_proto(frn_model(dtype, shape=shape, residual=residual))
    lower(model, lowering)
    if opset is not None:
        model.opset_imports[""] = MIN_OPSET
        to_older_opset(model, opset)
    return ir.to_proto(model)


SHAPES = [(2, 4), (0, 4), (2, 4, 5), (2, 4, 0), (2, 4, 5, 7), (0, 4, 5, 7), (2, 4, 0, 7), (2, 4, 5, 0), (2, 4, 4, 3, 2)]
OLD_SHAPES = [shape for shape in SHAPES if 0 not in shape[1:]]


@pytest.mark.parametrize("sizes", ["fixed", "free"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", ["custom", "primitives", "opset 13", "opset 15"])
def test_stock_onnx_runtime_computes_each_form(form: str, dtype: str, residual: bool, sizes: str) -> None:
    lowering, opset = ("primitives", int(form[-2:])) if form.startswith("opset") else (form, None)
    rng = np.random.default_rng(0)
    for shape in SHAPES if opset is None else OLD_SHAPES:
        named = tuple(size if axis == 1 or sizes == "fixed" else f"D{axis}" for axis, size in enumerate(shape))
        model = lowered(lowering, dtype, named, residual, opset)
        onnx.checker.check_model(model, full_check=True)
        feeds = {name: rng.normal(size=shape).astype(dtype) for name in (INPUTS[0], *([RESIDUAL] if residual else []))}
        with OnnxRuntimeRunner(model.SerializeToString(), plugins=[]) as runner:
            got = runner.infer(feeds)[OUTPUT]
        x, *more = (value.astype(np.float64) for value in feeds.values())
        want = filter_response_norm(x, *frn_parameters().values(), *more)
        assert (got.dtype, got.shape) == (np.dtype(dtype), shape)
        tolerance = OP_FLOAT16 if dtype == "float16" else OP_FLOAT32
        np.testing.assert_allclose(got.astype(np.float64), want, **tolerance.kwargs(), err_msg=str(shape))


@pytest.mark.parametrize("sizes", ["fixed", "free"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_openvino_gives_each_channel_its_own_epsilon(
    shape: tuple[int, ...], sizes: str, require: Callable[[str], None]
) -> None:
    """After a mean over (N, C, L) it adds the epsilons of channels to samples, without a word."""
    require("openvino")
    from deploynorm.run.openvino import OpenVinoRunner

    parameters = frn_parameters() | {"eps": np.array([0.1, 0.5, 1, 2], np.float32)}
    named = tuple(size if axis == 1 or sizes == "fixed" else f"D{axis}" for axis, size in enumerate(shape))
    model = ir.from_proto(frn_model(parameters=parameters, shape=named))
    lower(model, "primitives")
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with OpenVinoRunner(ir.to_proto(model)) as runner:
        got = runner.infer({INPUTS[0]: x})[OUTPUT]
    np.testing.assert_allclose(got, filter_response_norm(x, *parameters.values()), **OP_FLOAT32.kwargs())


def operators(nodes: object) -> set[str]:
    return {node.op_type for node in nodes}  # type: ignore[attr-defined]


@pytest.mark.parametrize("residual", [False, True])
def test_on_maps_no_form_reshapes_or_reads_a_shape(residual: bool) -> None:
    """ncnn broadcasts (C, 1) along another axis, without a word, and TVM reads neither a computed shape nor a list."""
    shape = ("N", 4, "H", "W")
    primitives = lowered("primitives", "float32", shape, residual).graph
    [body] = lowered("custom", "float32", shape, residual).functions
    standard = {"Mul", "ReduceMean", "Add", "Sqrt", "Div", "Max"}
    assert operators(primitives.node) == standard
    assert operators(body.node) == standard | {"Constant", "Unsqueeze"}
    constants = {tensor.name: list(tensor.dims) for tensor in primitives.initializer}
    read = {name for node in primitives.node if node.op_type != "ReduceMean" for name in node.input} & set(constants)
    assert len(read) == 4
    assert all(constants[name] == [1, 4, 1, 1] for name in read)
    assert all(node.name for node in (*primitives.node, *body.node))
    assert len({node.name for node in body.node}) == len(body.node)
    kinds = {part.name for node in body.node if node.op_type == "Constant" for part in node.attribute}
    assert kinds == {"value"}


class Ranks(nn.Module):
    """FRN on the ranks that its names say."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *xs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


def test_a_function_serves_all_nodes_and_in_primitives_each_has_the_form_of_its_rank() -> None:
    layers = {3: FRN1d(3), 4: FRN2d(3), 5: FRN3d(3)}
    inputs = {rank: torch.randn(2, 3, *[4] * (rank - 2)) for rank in layers}
    for ranks in ((4, 4), (3, 4, 5), (3,)):
        net, example = Ranks(*(layers[rank] for rank in ranks)).eval(), tuple(inputs[rank] for rank in ranks)
        model = export(net, example, dynamic="none").to_proto()
        [body] = model.functions
        assert ("Reshape" in operators(body.node)) == (set(ranks) != {4}), ranks
        standard = export(net, example, dynamic="none", lowering="primitives").to_proto()
        assert Counter(node.op_type for node in standard.graph.node)["Reshape"] == 2 * sum(
            rank != 4 for rank in ranks
        ), ranks
        for proto in (model, standard):
            with ReferenceRunner(proto) as runner, torch.no_grad():
                feeds = {spec.name: x.numpy() for spec, x in zip(runner.inputs, example, strict=True)}
                for got, want in zip(runner.infer(feeds).values(), net(*example), strict=True):
                    np.testing.assert_allclose(got, want.numpy(), **OP_FLOAT32.kwargs())


# ---- Opsets before 18


class Pyramid(nn.Module):
    """Operators whose attributes, inputs or types changed between opset 13 and 18."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(3, 8, 3, 2), FRN2d(8), nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        left, right = y.split(4, 1)
        y = torch.cat([nn.functional.interpolate(left, scale_factor=2), self.up(y)], 1).clamp(0, 6)
        y = nn.functional.pad(y, (1, 0, 0, 1)) * y.amax((2, 3), keepdim=True).softmax(1)
        y = y.reshape(y.shape[0], -1, y.shape[3])  # sizes of the shape
        return y.sum(1) + right.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("opset", [13, pytest.param(14, marks=pytest.mark.slow), 15, 17])
def test_primitives_go_back_to_an_opset(opset: int) -> None:
    torch.manual_seed(0)
    net = Pyramid().eval()
    exported = export(net, torch.randn(2, 3, 17, 19), lowering="primitives", opset=opset, dynamic="all")
    proto = exported.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert exported.opset == opset
    assert proto.ir_version == onnx.helper.find_min_ir_version_for(list(proto.opset_import)) < 10
    assert exported.inputs[0].shape == ("N", 3, "H", "W")
    for shape in ((2, 3, 17, 19), (1, 3, 9, 12)):
        x = torch.randn(shape)
        with OnnxRuntimeRunner(proto.SerializeToString(), plugins=[]) as runner, torch.no_grad():
            [got] = runner.infer({"x": x.numpy()}).values()
            np.testing.assert_allclose(got, net(x).numpy(), rtol=1e-5, atol=1e-5)


def named(model: onnx.ModelProto, opset: int = MIN_OPSET, **attributes: object) -> ir.Model:
    model.opset_import[0].version = opset
    model.graph.node[0].name = "it"
    model.graph.node[0].attribute.extend(onnx.helper.make_attribute(*item) for item in attributes.items())
    return ir.from_proto(model)


F, B = ("float32", (2, 3, 4, 4)), ("bfloat16", (1,))
REFUSED = {
    "a later operator": (
        ("LayerNormalization", {"x": F, "s": ("float32", (4,))}, F),
        {},
        "not in the opset.*--opset 17",
    ),
    "a later type": (("Where", {"c": ("bool", (1,)), "x": B, "z": B}, B), {}, "has no bfloat16"),
    "a later attribute": (
        ("ScatterND", {"x": F, "i": ("int64", (1, 4)), "u": ("float32", (1,))}, F),
        {"reduction": "add"},
        "its attribute reduction",
    ),
    "a later input": (
        ("Pad", {"x": F, "p": ("int64", (2,)), "v": ("float32", ()), "a": ("int64", (1,))}, ("float32", None)),
        {},
        "its input 4",
    ),
    "axes that are computed": (
        ("ReduceMean", {"x": F, "a": ("int64", (1,))}, ("float32", None)),
        {},
        "axes are not constant",
    ),
    "another meaning": (
        ("RoiAlign", {"x": F, "r": ("float32", (1, 4)), "b": ("int64", (1,))}, ("float32", None)),
        {},
        "computes something else",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_opset_does_not_have_is_refused(case: str) -> None:
    (op_type, inputs, output), attributes, message = REFUSED[case]
    model = named(one_node(op_type, inputs, output), **attributes)
    with pytest.raises(ModelError, match=rf"node it \({op_type}\).*{message}"):
        to_older_opset(model, 13)


def test_other_lowerings_begin_at_18() -> None:
    for lowering in ("custom", "rmsnorm"):
        with pytest.raises(InputError, match=r"Got 17; expected 18 to 23\. Fix: --lowering primitives begins at 13"):
            export(FRN2d(3), torch.randn(2, 3, 4, 4), opset=17, lowering=lowering)
    with pytest.raises(InputError, match="Got 12; expected 13 to 23"):
        export(FRN2d(3), torch.randn(2, 3, 4, 4), opset=12, lowering="primitives")
