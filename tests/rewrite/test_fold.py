"""`fold`: what goes into a convolution's weight, what stays behind it, and that the numbers stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import loose_forms
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from tolerances import FOLD_FLOAT32
from torch import Tensor, nn

from deploynorm.rewrite.fold import fold
from deploynorm.rewrite.result import RewriteResult
from deploynorm.run.onnxruntime import OnnxRuntimeRunner


@pytest.fixture(autouse=True)
def _needs(require: Callable[[str], None]) -> None:
    require("ort")


class CenConv(nn.Conv2d):
    """As in the official code of MABN."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        return nn.functional.conv2d(x, weight - mean, self.bias, self.stride, self.padding, self.dilation, self.groups)


class MABN(nn.Module):
    """As in the official code of MABN, in evaluation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.randn(1, channels, 1, 1))
        self.register_buffer("running_var", torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        r = (self.running_var + 1e-5).sqrt()
        return self.weight * (x / r) + self.bias


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(CenConv(3, 6, 3, padding=1, bias=False), MABN(6), nn.ReLU()),
        *(CenConv(6, 8, 3, groups=2), MABN(8)),
        *(nn.ConvTranspose2d(8, 6, 3, groups=2), MABN(6)),
    ).eval()


def _folded(proto: bytes | onnx.ModelProto) -> RewriteResult:
    """Runs the pass; the model given stays as it is, and a second run finds nothing."""
    model = ir.from_proto(onnx.load_model_from_string(proto) if isinstance(proto, bytes) else proto)
    original = ir.to_proto(model).SerializeToString(deterministic=True)
    result = fold(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == original, "the model given was changed"
    onnx.checker.check_model(ir.to_proto(result.model))
    assert not fold(result.model).modified
    return result


def _compare(proto: bytes | onnx.ModelProto, model: ir.Model, x: np.ndarray) -> None:
    outputs = []
    given = proto if isinstance(proto, bytes) else proto.SerializeToString()
    for candidate in (given, ir.to_proto(model).SerializeToString()):
        with OnnxRuntimeRunner(candidate, plugins=[]) as runner:  # onnx's own evaluator fails in grouped ConvTranspose
            outputs.append(runner.infer({"x": x}))
    for name, want in outputs[0].items():
        assert want.std() > 0
        np.testing.assert_allclose(outputs[1][name], want, **FOLD_FLOAT32.kwargs())


@pytest.mark.parametrize(
    ("exporter", "optimize"),
    [
        *((f"TorchScript {opset}", optimize) for opset in (11, 17) for optimize in (True, False)),
        ("dynamo 20", False),
        pytest.param("dynamo 20", True, marks=pytest.mark.slow),
    ],
)
def test_exports_of_the_official_mabn_become_convolutions(exporter: str, optimize: bool) -> None:
    """With and without what the exporter folds on its own, which is the square root and a part of the centring."""
    proto = loose_forms.export(_network(), torch.randn(2, 3, 9, 7), exporter, optimize=optimize)
    result = _folded(proto)
    assert result.after == Counter({"Conv": 2, "ConvTranspose": 1, "Relu": 1})
    _compare(proto, result.model, np.random.default_rng(0).normal(size=(1, 3, 8, 6)).astype(np.float32))


def _graph(nodes: str, outputs: str = "", inputs: str = "", weight: type = np.float32) -> onnx.ModelProto:
    """Nodes over x (N, 4, H, W), with w (6, 4, 3, 3), its transpose v, bias (6,), a, b (6, 1, 1) and more."""
    kind = "float" if weight is np.float32 else "float16"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        net ({kind}[N, 4, H, W] x{inputs}) => ({kind}[N, 6, H, W] y{outputs})
        {{ {nodes.replace(";", "").replace("(x", "<pads = [1, 1, 1, 1]> (x")} }}"""
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (6, 4, 3, 3), "v": (4, 6, 3, 3), "bias": (6,), "a": (6, 1, 1), "b": (1, 6, 1, 1), "half": ()}
    shapes |= {"row": (7,), "gamma": (6,), "beta": (6,), "mean": (6,), "variance": (6,)}
    constants = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    constants |= {"variance": np.abs(constants["variance"]) + 0.1, "nothing": np.zeros(()), "large": np.array(6e4)}
    read = {name for node in proto.graph.node for name in node.input} - {value.name for value in proto.graph.input}
    for name in sorted(read & constants.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(constants[name].astype(weight), name))
    return proto


NORM = "BatchNormalization (c, gamma, beta, mean, variance)"

FOLDED = {
    "every operator": "c = Conv (x, w, bias); d = Mul (c, a); e = Sub (d, b); f = Div (e, a); g = Add (half, f); "
    "y = Sub (b, g)",
    "without a bias none is added": "c = Conv (x, w); d = Mul (b, c); y = Div (d, half)",
    "batch normalization": f"c = Conv (x, w); y = {NORM}",
    "batch normalization of a transposed one": f"c = ConvTranspose (x, v, bias); y = {NORM}",
    "a weight that is computed": "d = Mul (w, half); y = Conv (x, d)",
    "a bias that is computed": "k = Add (bias, half); y = Conv (x, w, k)",
}

BIASLESS = ("without a bias none is added", "a weight that is computed")


@pytest.mark.parametrize("name", FOLDED)
def test_graph_is_folded(name: str) -> None:
    proto = _graph(FOLDED[name])
    result = _folded(proto)
    assert result.after == Counter({"ConvTranspose" if "transposed" in name else "Conv": 1})
    assert len(next(iter(result.model.graph)).inputs) == (2 if name in BIASLESS else 3)
    _compare(proto, result.model, np.random.default_rng(1).normal(size=(2, 4, 5, 7)).astype(np.float32))


LEFT = {
    "another node reads it": (_graph("c = Conv (x, w); y = Mul (c, a); z = Exp (c)", ", float[N, 6, H, W] z"), ""),
    "it is an output": (_graph("c = Conv (x, w); y = Mul (c, a)", ", float[N, 6, H, W] c"), ""),
    "a sum of two": (_graph("c = Conv (x, w); d = Conv (x, w); y = Add (c, d)"), ""),
    "a factor that is fed": (_graph("c = Conv (x, w); y = Mul (c, k)", inputs=", float[1, 6, 1, 1] k"), ""),
    "a weight that is fed": (_graph("c = Conv (x, w); y = Mul (c, a)", inputs=", float[6, 4, 3, 3] w"), ""),
    "along W": (_graph("c = Conv (x, w); y = Mul (c, row)"), "not one number for each channel"),
    "a divisor of zero": (_graph("c = Conv (x, w); y = Div (c, nothing)"), "or by 0"),
    "its inverse": (_graph("c = Conv (x, w); y = Div (a, c)"), "it divides by the convolution"),
    "batch normalization that is fed": (
        _graph(f"c = Conv (x, w); y = {NORM}", inputs=", float[6] gamma"),
        "parameters are not constant",
    ),
    "more than float16 holds": (
        _graph("c = Conv (x, w); d = Mul (c, large); y = Mul (d, large)", weight=np.float16),
        "no finite number in float16",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_graph_is_left(name: str) -> None:
    proto, reason = LEFT[name]
    model = ir.from_proto(proto)
    result = fold(model)
    assert not result.modified
    assert result.model is model
    assert [change.detail for change in result.changes if reason in change.detail] or not reason


def test_the_rest_of_a_chain_stays_with_its_reason() -> None:
    proto = _graph("c = Conv (x, w); d = Mul (c, a); y = Mul (d, row)")
    result = _folded(proto)
    assert result.after == Counter({"Conv": 1, "Mul": 1})
    assert [change.outcome for change in result.changes] == ["rewritten", "unchanged"]
    _compare(proto, result.model, np.random.default_rng(1).normal(size=(2, 4, 5, 7)).astype(np.float32))


def test_half_weights_are_folded_in_float64() -> None:
    proto = _graph("c = Conv (x, w, bias); d = Mul (c, a); y = Add (d, b)", weight=np.float16)
    result = _folded(proto)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(float) for tensor in proto.graph.initializer}
    bias = result.model.graph.initializers["y_bias"].const_value
    assert bias is not None
    want = constants["bias"] * constants["a"].reshape(-1) + constants["b"].reshape(-1)
    np.testing.assert_array_equal(bias.numpy(), want.astype(np.float16))
