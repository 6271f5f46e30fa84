"""FRN as operators of torch.library, on the native kernels and in plain PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, NUMPY_DTYPES, NormCase, make_dy, make_inputs, to_torch
from frn_gradient import Gradients, check_gradients, gradients, sizes
from frn_operators import BACKWARD, FORWARD, RULES, differentiable, operands
from tolerances import EXACT, FLOAT64, GRADIENT_OF_PLAIN_TORCH, GRADIENT_ROUNDED, GRADIENT_SUMMED
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.library import opcheck

from deploynorm import libraries
from deploynorm.errors import InputError
from deploynorm.layers import FRN2d, _native, ops
from deploynorm.layers._composed import composed
from deploynorm.layers.functional import filter_response_norm


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 3, 7), (2, 3, 2, 3, 4)], ids=str)
def test_operators_keep_the_rules_of_torch(shape: tuple[int, ...], dtype: torch.dtype, layout: str, way: str) -> None:
    inputs = operands(*shape, dtype=dtype, layout=layout)
    # Tracing takes most of the time: one of rank, layout and type is other than usual, and the type only where it makes
    # that of the parameters another.
    unusual = [len(shape) != 4, layout != "contiguous", dtype != torch.float32]
    traced = sum(unusual) <= 1 and dtype in (torch.float32, torch.float16)
    rules = RULES if traced else [rule for rule in RULES if rule != "test_aot_dispatch_dynamic"]
    opcheck(FORWARD, differentiable(inputs), test_utils=rules)
    with torch.no_grad():
        y, rstd = FORWARD(*inputs)
    x, *parameters = (t.detach() for t in inputs)
    opcheck(BACKWARD, (torch.randn_like(y), x, rstd, *parameters[:3]), test_utils=rules)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_every_case(case: NormCase, way: str) -> None:
    x, gamma, beta, tau, eps = make_inputs(case).values()
    dy = make_dy(case)
    call = (dy, x, gamma, beta, tau, eps)
    y, rstd = FORWARD(*(to_torch(a) for a in call[1:]))
    assert y.dtype == to_torch(x).dtype
    results = BACKWARD(to_torch(dy), to_torch(x), rstd, *(to_torch(a) for a in call[2:5]))
    summed = (GRADIENT_OF_PLAIN_TORCH if way == "plain" else GRADIENT_SUMMED)[gamma.dtype.name]
    got = Gradients(*(as_numpy(r) for r in results))
    check_gradients(got, gradients(*call), sizes(*call), summed, GRADIENT_ROUNDED[case.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_gradients_without_a_position_are_zero_whatever_rstd_holds(
    dtype: torch.dtype, require: Callable[[str], None]
) -> None:
    require("native")
    x, *parameters = operands(2, 4, 0, 5, dtype=dtype)
    _, *gradients = BACKWARD(x, x, torch.full((2, 4), torch.nan, dtype=parameters[0].dtype), *parameters[:3])
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(NUMPY_DTYPES["bfloat16"])
    return tensor.numpy()


@pytest.mark.parametrize("of_dy", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("of_x", ["contiguous", "channels_last"])
def test_outputs_have_the_layout_of_x_whatever_that_of_the_gradient_is(of_x: str, of_dy: str, way: str) -> None:
    x, *parameters = differentiable(operands(2, 3, 4, 5, dtype=torch.float64, layout=of_x))
    dy = operands(2, 3, 4, 5, dtype=torch.float64, layout=of_dy)[0]
    if of_dy == "expanded":
        dy = torch.tensor(2.0, dtype=torch.float64).expand(2, 3, 4, 5)
    y = ops.frn(x, *parameters)
    y.backward(dy)
    assert y.stride() == x.stride()
    assert x.grad is not None
    assert x.grad.stride() == x.stride()
    want = torch.autograd.grad(composed(x, *parameters), x, dy)[0]
    torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize("tlu", [True, False])
@pytest.mark.parametrize("learned_eps", [None, "layer"])
def test_backward_saves_only_x_and_one_scalar_per_sample_and_channel(tlu: bool, learned_eps: Any, way: str) -> None:
    layer = FRN2d(8, tlu=tlu, learned_eps=learned_eps)
    kept: list[Tensor] = []
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    sizes = {t.untyped_storage().data_ptr(): t.numel() for t in kept}
    assert sorted(size for size in sizes.values() if size > 8) == [4 * 8, x.numel()]


def test_threads_change_no_bit(require: Callable[[str], None]) -> None:
    require("native")
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, *parameters = differentiable(operands(4, 40, 33, 31))
            y = ops.frn(x, *parameters)
            y.backward(y.detach() + 1)
            results.append([y, *(t.grad for t in (x, *parameters))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, **EXACT.kwargs())


def test_torchs_own_threads_are_used(require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    require("native")
    assert _native.LIBRARY is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert _native.LIBRARY.parallel, "PyTorch's OpenMP was not found"
    assert _native.LIBRARY.threads() != (None, None)
    # Without OpenMP one thread does everything.
    monkeypatch.setattr(_native.LIBRARY, "parallel", None)
    assert _native.LIBRARY.threads() == (None, None)
    x, *parameters = operands(4, 40, 33, 31)
    torch.testing.assert_close(FORWARD(x, *parameters)[0], composed(x, *parameters))


def test_a_gradient_can_be_differentiated(way: str) -> None:
    inputs = differentiable(operands(2, 3, 4, 3, dtype=torch.float64))
    assert torch.autograd.gradgradcheck(ops.frn, inputs)


def test_a_second_backward_pass_without_its_graph_is_refused_as_torch_does(way: str) -> None:
    x, *parameters = differentiable(operands(2, 3, 4, 5))
    y = ops.frn(x, *parameters).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_changing_x_in_place_before_the_backward_pass_is_found(way: str) -> None:
    x, *parameters = differentiable(operands(2, 3, 4, 5))
    inner = x * 1
    y = ops.frn(inner, *parameters).sum()
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch's own, in jvp
def test_transformations_of_torch_func_see_through_the_operator(way: str) -> None:
    x, gamma, beta, tau, eps = operands(2, 3, 4, 5, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return filter_response_norm(x, gamma, beta, tau, eps).square().sum()

    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(grad(loss)(x), want)
    torch.testing.assert_close(jvp(loss, (x,), (torch.ones_like(x),))[1], want.sum())
    torch.testing.assert_close(vmap(lambda one: loss(one[None]))(x).sum(), loss(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual)).tangent, want.sum())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch's own, in inductor
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_with_free_sizes_and_without_a_graph_break(backend: str, way: str) -> None:
    torch._dynamo.reset()
    layer = FRN2d(4, learned_eps="channel")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for shape in [(2, 4, 6, 6), (3, 4, 5, 7), (1, 4, 2, 2)]:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
            parameters = list(layer.parameters())
            want = torch.autograd.grad(layer(x).square().sum(), [x, *parameters])
            got = torch.autograd.grad(compiled(x).square().sum(), [x, *parameters])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_compiled_graphs_hold_the_kernel_where_there_is_one(way: str) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compile(FRN2d(4), fullgraph=True, backend=backend)(torch.randn(2, 4, 3, 3))
    assert ("frn_forward" in graphs[0].code) == (way == "native")


def test_deterministic_algorithms_are_what_there_is(way: str) -> None:
    x, *parameters = differentiable(operands(8, 16, 9, 9))
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(ops.frn(x, *parameters).sum(), [x, *parameters]) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*runs, **EXACT.kwargs())


@pytest.mark.parametrize("wanted", range(5))
def test_only_what_is_wanted_gets_a_gradient(wanted: int, way: str) -> None:
    inputs = operands(2, 3, 4, 5)
    assert not ops.frn(*inputs).requires_grad
    inputs[wanted].requires_grad_()
    ops.frn(*inputs).sum().backward()
    assert [t.grad is not None for t in inputs] == [i == wanted for i in range(5)]


def test_a_library_that_cannot_be_loaded_is_warned_of_once_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    damaged = tmp_path / libraries.TORCH_LIBRARY
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(libraries, "find_library", lambda name: damaged)
    with pytest.warns(UserWarning, match=re.escape(f"{damaged} cannot be used")):
        assert _native._open() is None
    monkeypatch.setattr(libraries, "find_library", lambda name: None)
    assert _native._open() is None


@pytest.mark.parametrize("change", [Tensor.float, lambda t: t[:2]], ids=["type", "shape"])
@pytest.mark.parametrize("wrong", range(1, 5))
def test_parameters_of_another_type_or_shape_are_refused(
    way: str, wrong: int, change: Callable[[Tensor], Tensor]
) -> None:
    """The kernels would read beyond their end."""
    inputs = operands(2, 3, 4, 4, dtype=torch.float64)
    inputs[wrong] = change(inputs[wrong])
    with pytest.raises(InputError, match=r"the operands do not fit.*\([23],\) torch.float(32|64) on cpu"):
        FORWARD(*inputs)


@pytest.mark.parametrize(
    ("wrong", "value"),
    [
        (0, torch.ones(1, 3, 4, 4)),
        (0, torch.ones(2, 3, 4, 4, dtype=torch.float16)),
        (2, torch.ones(1, 3)),
        (2, torch.ones(2, 3, dtype=torch.float64)),
        (3, torch.ones(3, dtype=torch.float64)),
        (4, torch.ones(2)),
    ],
)
def test_gradients_from_what_does_not_fit_are_refused(way: str, wrong: int, value: Tensor) -> None:
    inputs = [*torch.randn(2, 2, 3, 4, 4), torch.ones(2, 3), *torch.ones(3, 3)]
    inputs[wrong] = value
    with pytest.raises(InputError, match="the operands do not fit"):
        BACKWARD(*inputs)


def test_exported_operator_takes_constants_of_another_type(way: str) -> None:
    *tensors, _ = operands(2, 3, 4, 4, dtype=torch.float64)
    eps = torch.full((3,), 1e-3)
    want = composed(*tensors, eps.double())
    torch.testing.assert_close(ops.filter_response_norm(*tensors, eps), want, **FLOAT64.kwargs())
