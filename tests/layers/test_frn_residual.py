"""FRN with a residual: one pass that computes what FRN, an addition and a TLU do, with their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import to_float64
from frn_operators import FORWARD, RULES, differentiable, operands
from tolerances import FLOAT64, OP_FLOAT16, OP_FLOAT32, ROUNDED_BFLOAT16, ROUNDED_FLOAT16
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.library import opcheck

from deploynorm import export, reference
from deploynorm._export.precision import to_precision
from deploynorm.contract import ADD_OP_TYPE, DOMAIN
from deploynorm.errors import InputError
from deploynorm.layers import TLU, FRN1d, FRN2d, FRN3d, ops
from deploynorm.layers.functional import filter_response_norm, tlu
from deploynorm.run.onnxruntime import OnnxRuntimeRunner
from deploynorm.run.reference import ReferenceRunner

SHAPE = (2, 3, 5, 6)


def inputs(
    dtype: torch.dtype = torch.float64, of_x: str = "contiguous", of_residual: str = "contiguous"
) -> list[Tensor]:
    """x, gamma, beta, tau, eps and residual, with ties of the sum and its threshold in channel 0."""
    x, gamma, beta, tau, eps = operands(*SHAPE, dtype=dtype, layout=of_x)
    residual = operands(*SHAPE, dtype=dtype, layout=of_residual)[0].flip(0)
    gamma[0] = beta[0] = tau[0] = 0
    residual[:, 0] = residual[:, 0].relu()  # as the layer before gives it, and gamma 0 is how a block begins to train
    return [x, gamma, beta, tau, eps, residual]


def apart(x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor | None, eps: Tensor, residual: Tensor) -> Tensor:
    total = filter_response_norm(x, gamma, beta, None, eps) + residual
    return total if tau is None else tlu(total, tau)


def gradients(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    tensors = differentiable([t.detach().clone() for t in tensors])
    y = function(*tensors)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).to(y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


@pytest.mark.parametrize("of_residual", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("of_x", ["contiguous", "channels_last", "sliced"])
def test_result_and_gradients_are_those_of_three_layers(of_x: str, of_residual: str, way: str) -> None:
    tensors = inputs(of_x=of_x, of_residual=of_residual)
    got, want = gradients(filter_response_norm, tensors), gradients(apart, tensors)
    torch.testing.assert_close(got, want, **FLOAT64.kwargs())
    passed = got[-1][:, 0]
    assert 0 < int((passed == 0).sum()) < passed.numel(), "no ties were met"


ROUNDED = {torch.float32: OP_FLOAT32, torch.float16: ROUNDED_FLOAT16, torch.bfloat16: ROUNDED_BFLOAT16}


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_result_is_rounded_once(dtype: torch.dtype, way: str) -> None:
    x, *parameters, residual = inputs(dtype)
    y = filter_response_norm(x, *parameters, residual)
    assert y.dtype == dtype
    exact = reference.filter_response_norm(*(to_float64(t) for t in (x, *parameters, residual)))
    np.testing.assert_allclose(to_float64(y), exact, **ROUNDED[dtype].kwargs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_threshold_of_a_half_tensor_is_met_as_it_is_rounded(dtype: torch.dtype, way: str) -> None:
    x, gamma, beta, tau, eps, residual = inputs(dtype)
    tau = tau + 0.1001  # which neither type holds
    residual = residual - 10  # all is below
    got = gradients(filter_response_norm, [x, gamma, beta, tau, eps, residual])
    assert torch.equal(got[0], tau.to(dtype).reshape(1, 3, 1, 1).expand(SHAPE))
    assert not got[1].any()
    assert not got[-1].any()
    assert got[4].all()


def test_operators_keep_the_rules_of_torch(way: str) -> None:
    for layout in ("contiguous", "channels_last"):
        opcheck(FORWARD, differentiable(inputs(torch.float32, layout)), test_utils=RULES)


def test_gradients_are_the_numerical_ones_and_can_be_differentiated(way: str) -> None:
    x, gamma, beta, tau, eps = operands(2, 3, 4, 3, dtype=torch.float64)
    tensors = differentiable([x, gamma, beta, tau, eps, x.detach().flip(0) * 0.7])
    assert torch.autograd.gradcheck(ops.frn, tensors)
    assert torch.autograd.gradgradcheck(ops.frn, tensors)


@pytest.mark.parametrize("residual", [False, True])
def test_penalty_on_a_gradient_takes_a_layer_with_a_fixed_eps(residual: bool, way: str) -> None:
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    layer = FRN2d(4).double()

    def penalty(x: Tensor) -> Tensor:
        y = layer(x, residual=x) if residual else layer(x)
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].square().sum()

    assert torch.autograd.gradcheck(penalty, x)


def test_backward_saves_x_and_the_output(way: str) -> None:
    layer, kept = FRN2d(8), {}
    x, residual = (torch.randn(4, 8, 16, 16, requires_grad=True) * 1 for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        y = layer(x, residual=residual)
    assert {at for at, size in kept.items() if size > 32} == {x.data_ptr(), y.data_ptr()}


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("learned_eps", [None, "channel"])
def test_layer_takes_a_residual(bounded: bool, learned_eps: Any, way: str) -> None:
    for kind, shape in ((FRN1d, (2, 4, 6)), (FRN2d, (2, 4, 3, 5)), (FRN3d, (2, 4, 3, 2, 5))):
        layer = kind(4, tlu=bounded, learned_eps=learned_eps).double()
        x, residual = torch.randn(2, *shape, dtype=torch.float64)
        want = layer(x, residual=residual)
        bare = kind(4, tlu=False, learned_eps=learned_eps).double()
        bare.load_state_dict(layer.state_dict(), strict=False)
        total = bare(x) + residual
        torch.testing.assert_close(want, total.relu() if bounded else total, **FLOAT64.kwargs())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch's own, in jvp
def test_transformations_of_torch_func_see_through(way: str) -> None:
    x, *parameters, residual = inputs()

    def loss(x: Tensor, residual: Tensor) -> Tensor:
        return filter_response_norm(x, *parameters, residual).square().sum()

    leaf = residual.clone().requires_grad_()
    want = torch.autograd.grad(loss(x, leaf), leaf)[0]
    torch.testing.assert_close(grad(loss, argnums=1)(x, residual), want)
    each = vmap(lambda one, other: loss(one[None], other[None]))(x, residual)
    torch.testing.assert_close(each.sum(), loss(x, residual))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(residual, torch.ones_like(residual))
        torch.testing.assert_close(forward_ad.unpack_dual(loss(x, dual)).tangent, want.sum())


@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be instantiated")  # by dynamo
def test_compiled_without_a_graph_break(way: str) -> None:
    torch._dynamo.reset()
    layer = FRN2d(3).double()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [SHAPE, (3, 3, 4, 7)]:
        x, residual = differentiable(list(torch.randn(2, *shape, dtype=torch.float64)))
        tensors = [x, residual, *layer.parameters()]
        want, got = (torch.autograd.grad(f(x, residual=residual).square().sum(), tensors) for f in (layer, compiled))
        torch.testing.assert_close(got, want)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), FRN2d(4, learned_eps="layer")
        self.last = FRN2d(4, tlu=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x), residual=x)
        return self.last(y, residual=x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": False},
        {"lowering": "rmsnorm"},
        {"lowering": "primitives"},
        {"dtype": "float64"},
        {"dtype": "float64", "residual": False},
        {"dtype": "float16"},
        {"dtype": "float16", "residual": False},
    ],
    ids=str,
)
def test_exported_it_is_one_node(options: dict[str, Any], require: Any) -> None:
    require("ort")
    torch.manual_seed(0)
    net = Block().eval()
    exported = export(net, torch.randn(2, 4, 6, 5), **options)
    assert [value.shape.dims for value in exported.model.graph.inputs] == [("N", 4, "H", "W")]
    counts = exported.node_counts()
    split = options.keys() & {"residual", "lowering"}
    assert counts[f"{DOMAIN}::{ADD_OP_TYPE}"] == (0 if split else 2)
    x = torch.randn(3, 4, 7, 9)
    if "dtype" in options:
        net, x = to_precision(net, getattr(torch, options["dtype"])), x.to(getattr(torch, options["dtype"]))
    # ONNX Runtime's CPU has no convolution in float64.
    kind = ReferenceRunner if x.dtype == torch.float64 else OnnxRuntimeRunner
    with (
        kind(exported.to_proto().SerializeToString() if kind is OnnxRuntimeRunner else exported.to_proto()) as runner,
        torch.no_grad(),
    ):
        got, want = runner.infer({"x": x.numpy()}), net(x)
    bound = OP_FLOAT16 if x.dtype == torch.float16 else OP_FLOAT32
    np.testing.assert_allclose(got["output"], want.numpy(), **bound.kwargs())


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.ones(1, 4, 3, 3), r"\(1, 4, 3, 3\) torch.float32"),
        (torch.ones(2, 4, 3, 3, dtype=torch.float64), "torch.float64"),
        (1.0, "float"),
    ],
)
def test_residual_unlike_the_input_is_refused(wrong: Any, got: str, way: str) -> None:
    x = torch.ones(2, 4, 3, 3)
    with pytest.raises(
        InputError, match=rf"FRN2d: the residual is not like the input. Got .*{got}.* expected \(2, 4, 3, 3\)"
    ):
        FRN2d(4)(x, residual=wrong)
    if isinstance(wrong, Tensor):
        with pytest.raises(InputError, match="the operands do not fit"):
            FORWARD(x, *torch.ones(4, 4), wrong)


def test_only_what_is_wanted_gets_a_gradient(way: str) -> None:
    for wanted in range(6):
        tensors = inputs()
        assert not ops.frn(*tensors).requires_grad
        tensors[wanted].requires_grad_()
        ops.frn(*tensors).sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(6)]


def test_module_of_three_layers_has_the_same_threshold(way: str) -> None:
    """What a network with TLU behind an addition becomes when it is written with a residual."""
    x, residual = torch.randn(2, 2, 4, 3, 3)
    norm, bare, act = FRN2d(4), FRN2d(4, tlu=False), TLU(4)
    with torch.no_grad():
        norm.tau.uniform_(-1, 1)
        act.tau.copy_(norm.tau)
    torch.testing.assert_close(norm(x, residual=residual), act(bare(x) + residual))
