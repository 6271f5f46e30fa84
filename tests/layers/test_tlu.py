"""TLU as a layer: its numbers, its gradient at a tie, its state."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import CASES, NormCase, make_inputs, to_float64, to_torch
from tolerances import EXACT
from torch import nn

from deploynorm import reference
from deploynorm.layers import TLU, functional

NAMES = ("plain", "n_c", "1d_sliced", "3d_channels_last", "no_samples", "no_rows", "nan", "inf", "no_tlu", "huge")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=str)
def test_layer_equals_the_reference(case: NormCase) -> None:
    inputs = make_inputs(case)
    tau = to_torch(inputs["tau"])
    layer = TLU(len(tau), dtype=tau.dtype)
    with torch.no_grad():
        layer.tau.copy_(tau)
    x = to_torch(inputs["X"])
    y = layer(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    expected = reference.tlu(inputs["X"], inputs["tau"]).astype(np.float64)
    np.testing.assert_allclose(to_float64(y), expected, **EXACT.kwargs())


def test_threshold_starts_at_zero_so_that_the_layer_is_a_relu() -> None:
    x = torch.linspace(-2, 2, 12).reshape(2, 3, 2)
    torch.testing.assert_close(TLU(3)(x), torch.relu(x), **EXACT.kwargs())


@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be instantiated")  # by dynamo
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_goes_to_the_larger_and_at_a_tie_to_the_threshold_alone(dtype: torch.dtype, compiled: bool) -> None:
    layer = TLU(3, dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor([[-1.0, 0.0, tiny], [0.0, -tiny, torch.nan]], dtype=dtype, requires_grad=True)
    (torch.compile(layer, backend="aot_eager") if compiled else layer)(x).backward(torch.full_like(x, 2.0))
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0, 2], [0, 0, 2]]
    assert layer.tau.grad is not None
    assert layer.tau.grad.tolist() == [4, 4, 0]


def test_nothing_is_kept_but_the_output() -> None:
    kept: set[int] = set()
    layer = TLU(3)
    x = torch.randn(2, 3, 8, 8, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        y = layer(x)
    assert y.data_ptr() in kept
    assert x.data_ptr() not in kept


@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be instantiated")  # by dynamo
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch's own, in inductor
def test_compiled_in_a_network_it_keeps_no_mask() -> None:
    """Inductor's code for CPUs stores masks so slowly that ResNet-20 would take 1.5 times as long."""
    kept: list[torch.dtype] = []
    network = nn.Sequential(nn.Conv2d(3, 3, 3), TLU(3), nn.Conv2d(3, 3, 3))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager_decomp_partition")
    x = torch.randn(2, 3, 8, 8)
    compiled(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        compiled(x)
    assert set(kept) == {torch.float32}


def test_gradients_are_the_numerical_ones_and_can_be_differentiated_and_transformed() -> None:
    tau = torch.tensor([0.1, -0.2, 5.0], dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.tlu, (x, tau))
    assert torch.autograd.gradgradcheck(functional.tlu, (x, tau))
    torch.testing.assert_close(
        torch.func.grad(lambda t: functional.tlu(x.detach(), t).sum())(tau.detach()),
        torch.autograd.grad(functional.tlu(x.detach(), tau).sum(), tau)[0],
    )


def test_layer_survives_copying_pickling_and_its_state_dict() -> None:
    layer = TLU(3)
    torch.nn.init.uniform_(layer.tau)
    again = TLU(3)
    again.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == ["tau"]
    for twin in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.tau, layer.tau)
        assert twin.tau is not layer.tau


def test_layer_is_built_on_the_device_and_in_the_type_that_are_asked_for() -> None:
    assert TLU(4, device="meta").tau.is_meta
    assert TLU(4, dtype=torch.float16).tau.dtype == torch.float16
    assert repr(TLU(4)) == "TLU(4)"
