"""FRN1d, FRN2d and FRN3d against the reference, and their gradients, state, casts and export."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, NormCase, make_inputs, to_float64, to_torch, tolerance, want
from tolerances import EXACT, OP_BFLOAT16, OP_FLOAT16, OP_FLOAT32

from deploynorm.contract import INPUTS
from deploynorm.layers import FRN1d, FRN2d, FRN3d
from deploynorm.layers.frn import _FRN

LAYER_OF_RANK: dict[int, type[_FRN]] = {2: FRN1d, 3: FRN1d, 4: FRN2d, 5: FRN3d}
ALL = [FRN1d, FRN2d, FRN3d]
SHAPES = {FRN1d: (2, 3, 7), FRN2d: (2, 3, 4, 5), FRN3d: (2, 3, 2, 3, 4)}
VARIANTS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "learned_per_layer": {"learned_eps": "layer"},
    "learned_per_channel": {"learned_eps": "channel"},
    "eps_per_channel": {"eps": torch.tensor([1e-6, 1e-3, 1.0])},
    "no_tlu": {"tlu": False},
}


def trained(kind: type[_FRN], *, seed: int = 0, **kwargs: Any) -> _FRN:
    """A layer of three channels whose parameters are no longer the initial ones."""
    torch.manual_seed(seed)
    layer = kind(3, **kwargs)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return layer


def layer_for(case: NormCase) -> tuple[_FRN, torch.Tensor]:
    """The layer that stands for the case's operator, and its input."""
    x, gamma, beta, tau, eps = (to_torch(array) for array in make_inputs(case).values())
    settings: dict[str, Any] = {"eps": case.eps}
    if case.eps == "per_channel":
        settings = {"eps": eps}
    elif isinstance(case.eps, str):
        settings = {"learned_eps": case.eps.removeprefix("learned_")}
    layer = LAYER_OF_RANK[x.dim()](len(gamma), tlu=case.tlu, dtype=gamma.dtype, **settings)
    with torch.no_grad():
        layer.weight.copy_(gamma)
        layer.bias.copy_(beta)
        if layer.tau is not None:
            layer.tau.copy_(tau)
        if layer.eps_l is not None:
            # The sign of eps_l must not matter.
            layer.eps_l.copy_(1e-6 - (eps[0] if case.eps == "learned_layer" else eps))
    return layer, x


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_equals_the_reference(case: NormCase) -> None:
    layer, x = layer_for(case)
    warns = x.dim() == 2 and layer.eps_l is None
    with pytest.warns(UserWarning, match="sign function") if warns else contextlib.nullcontext():
        y = layer(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_allclose(to_float64(y), want(case), **tolerance(case).kwargs())


@pytest.mark.parametrize("kind", ALL)
def test_initial_values_are_the_papers(kind: type[_FRN]) -> None:
    layer = kind(3, learned_eps="channel")
    values = {name: value.tolist() for name, value in layer.state_dict().items()}
    assert values.pop("eps_l") == pytest.approx([1e-4] * 3)
    assert values == {"weight": [1, 1, 1], "bias": [0, 0, 0], "tau": [0, 0, 0]}
    assert layer.eps == 1e-6
    assert kind(3, learned_eps="layer").eps_l.shape == ()
    assert list(kind(3, tlu=False).state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_and_evaluation_compute_the_same(kind: type[_FRN], variant: str) -> None:
    layer = trained(kind, **VARIANTS[variant])
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(SHAPES[kind])
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), **EXACT.kwargs())
    torch.testing.assert_close(layer.state_dict(), before, **EXACT.kwargs())


@pytest.mark.parametrize("kind", ALL)
def test_a_sample_is_not_changed_by_the_others_in_its_batch(kind: type[_FRN]) -> None:
    layer = trained(kind, learned_eps="channel")
    x = torch.randn(5, *SHAPES[kind][1:])
    together, alone = x.clone().requires_grad_(), x[2:3].clone().requires_grad_()
    y, y_alone = layer(together), layer(alone)
    torch.testing.assert_close(y[2:3], y_alone, **EXACT.kwargs())
    grad = torch.randn_like(y)
    y.backward(grad)
    y_alone.backward(grad[2:3])
    torch.testing.assert_close(together.grad[2:3], alone.grad, **EXACT.kwargs())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_input_and_parameters_are_the_numerical_ones(kind: type[_FRN], variant: str) -> None:
    layer = trained(kind, seed=1, **VARIANTS[variant]).double()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    x = torch.randn(SHAPES[kind], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *parameters))


def test_one_value_a_map_and_a_fixed_eps_warn_and_a_learned_eps_does_not() -> None:
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match=r"^FRN1d: on a \(N, C\) input .* learned_eps='layer'"):
        FRN1d(3)(x)
    FRN1d(3, learned_eps="layer")(x)
    FRN1d(3)(x[..., None].expand(4, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [300.0, 6e4])
@pytest.mark.usefixtures("way")
def test_half_precision_data_and_layer_stay_finite_and_in_their_type(dtype: torch.dtype, size: float) -> None:
    layer = trained(FRN2d, learned_eps="layer").to(dtype)
    x = (torch.randn(2, 3, 6, 6).clamp(-1, 1) * size).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    expected = trained(FRN2d, learned_eps="layer").double()
    expected.load_state_dict(layer.state_dict())
    kwargs = {torch.float16: OP_FLOAT16, torch.bfloat16: OP_BFLOAT16}[dtype].kwargs()
    np.testing.assert_allclose(to_float64(y), to_float64(expected(x.double())), **kwargs)
    y.sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_neither_the_type_nor_the_numbers(autocast: torch.dtype, dtype: torch.dtype) -> None:
    layer = trained(FRN2d)
    x = (torch.randn(2, 3, 6, 6) * 300).to(dtype)
    with torch.autocast("cpu", dtype=autocast):
        y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer(x), **EXACT.kwargs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_eps_that_half_precision_cannot_hold_is_kept(dtype: torch.dtype) -> None:
    zeros = torch.zeros(1, 2, 3, 3, dtype=dtype)
    per_channel = FRN2d(2, eps=torch.tensor([1e-12, 1e-8])).to(dtype)
    assert per_channel.eps.dtype == torch.float32
    learned = FRN2d(2, eps=1e-12, learned_eps="channel").to(dtype)
    torch.nn.init.zeros_(learned.eps_l)
    for layer in (per_channel, learned):
        assert layer.weight.dtype == dtype
        x = zeros.clone().requires_grad_()
        y = layer(x)
        assert torch.equal(y, zeros)
        y.sum().backward()
        assert x.grad is not None
        assert not x.grad.isnan().any()


def test_eps_as_a_tensor_is_state_and_no_parameter() -> None:
    given = torch.tensor([1e-6, 1e-3, 1.0])
    layer = FRN2d(3, eps=given)
    assert list(layer.state_dict()) == ["weight", "bias", "tau", "eps"]
    assert "eps" not in dict(layer.named_parameters())
    given.fill_(7)
    assert layer.eps.tolist() == pytest.approx([1e-6, 1e-3, 1.0])
    assert FRN2d(3, eps=given.double()).eps.dtype == torch.float32
    assert FRN2d(3, eps=given.int()).eps.dtype == torch.float32
    assert FRN2d(3, eps=given, dtype=torch.float64).eps.dtype == torch.float64
    assert layer.double().eps.dtype == torch.float64


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_survives_copying_pickling_and_its_state_dict(variant: str) -> None:
    layer = trained(FRN2d, **VARIANTS[variant])
    loaded = FRN2d(3, **VARIANTS[variant])
    loaded.load_state_dict(layer.state_dict())
    x = torch.randn(SHAPES[FRN2d])
    for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), layer(x), **EXACT.kwargs())
        assert repr(twin) == repr(layer)
        twin.weight.data.fill_(9)
    assert not (layer.weight == 9).any()


def test_layer_shows_how_it_was_made() -> None:
    assert repr(FRN2d(3)) == "FRN2d(3, eps=1e-06, learned_eps=None, tlu=True)"
    other = FRN1d(3, torch.ones(3), learned_eps="layer", tlu=False)
    assert repr(other) == "FRN1d(3, eps=per channel, learned_eps='layer', tlu=False)"


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_is_built_on_the_meta_device_and_filled_later(variant: str) -> None:
    layer = FRN2d(3, device="meta", **VARIANTS[variant])
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer(torch.empty(2, 3, 4, 4, device="meta")).shape == (2, 3, 4, 4)
    with torch.device("meta"):
        FRN2d(3, eps=torch.ones(3))
    source = trained(FRN2d, **VARIANTS[variant])
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(SHAPES[FRN2d])
    torch.testing.assert_close(layer(x), source(x), **EXACT.kwargs())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_an_exported_layer_holds_one_node_of_ours_and_the_same_numbers(variant: str, strict: bool) -> None:
    layer = trained(FRN2d, **VARIANTS[variant])
    dynamic = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    program = torch.export.export(layer, (torch.randn(2, 3, 4, 5),), strict=strict, dynamic_shapes=dynamic)
    ours = [node for node in program.graph.nodes if "deploynorm" in str(node.target)]
    assert [node.target for node in ours] == [torch.ops.deploynorm.filter_response_norm.default]
    assert len(ours[0].args) == len(INPUTS)
    for shape in ((2, 3, 4, 5), (5, 3, 7, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), layer(x), **OP_FLOAT32.kwargs())


def test_a_half_precision_layer_exports_its_parameters_in_float32() -> None:
    layer = trained(FRN2d, learned_eps="layer").half()
    program = torch.export.export(layer, (torch.randn(2, 3, 4, 5).half(),))
    node = next(node for node in program.graph.nodes if "deploynorm" in str(node.target))
    assert [argument.meta["val"].dtype for argument in node.args] == [torch.float16] + [torch.float32] * 4


def test_compiling_a_layer_for_single_values_has_no_graph_break_at_the_warning() -> None:
    layer = FRN1d(3)
    x = torch.randn(4, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer.eval()(x[..., None])[..., 0], **OP_FLOAT32.kwargs())
