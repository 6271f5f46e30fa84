"""What a training step of MABN saves, and that it never waits for the device; benchmarks/ has how long it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mabn_steps import C, trained_affine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deploynorm.layers import CenConv2d, MABN2d

SHAPE = (2, C, 16, 16)
STEPS = {"in_the_warm_up": 0, "after_it": 6}


def layer_after(steps: int, **settings: Any) -> MABN2d:
    layer = trained_affine(MABN2d(C, warmup=3, renorm_start=4, **settings))
    for _ in range(steps):
        layer(torch.randn(SHAPE, dtype=layer.weight.dtype)).sum().backward()
    return layer


def saved_by(function: Any, x: Tensor) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function(x)
    y.sum().backward()
    return list({t.data_ptr(): t for t in saved}.values())


@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be instantiated")  # by dynamo
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_only_the_input_and_some_scalars_per_channel_are_saved_for_backward(
    layout: torch.memory_format, dtype: torch.dtype, compiled: bool
) -> None:
    layer = layer_after(0, dtype=dtype)
    torch.compiler.reset()
    function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    for _ in range(STEPS["after_it"] + 1):  # in the warm-up and after it
        x = torch.randn(SHAPE, dtype=dtype).to(memory_format=layout).requires_grad_()
        large = [t for t in saved_by(function, x) if t.numel() >= x.numel() / 4]
        assert [t.data_ptr() for t in large] == [x.data_ptr()]


HOST_READS = {
    f"aten.{name}"
    for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "_unique2")
} | {"aten._to_copy_device"}
"""Operators whose result the host waits for, on a GPU."""


class Operators(TorchDispatchMode):
    """Notes each operator that runs, and the number of values in each tensor that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).rsplit(".", 1)[0]
        if name == "aten._to_copy" and "device" in (kwargs or {}):
            name = "aten._to_copy_device"
        if name in ("aten.index", "aten.index_put_") and any(
            index is not None and (index.dtype == torch.bool or index.dim() == 0) for index in args[1]
        ):
            name = "aten.nonzero"
        self.names.append(name)
        result = function(*args, **(kwargs or {}))
        given = {t.data_ptr() for t in args if isinstance(t, Tensor)}
        made = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]
        self.made += [t.numel() for t in made if t.data_ptr() not in given]
        return result


def test_operators_that_read_from_the_device_are_seen() -> None:
    x = torch.arange(4.0)
    with Operators() as operators:
        float(x[0]), bool(x.all()), x[x > 1], x[torch.tensor(2)], torch.equal(x, x), x.nonzero()
    assert operators.names.count("aten._local_scalar_dense") >= 2
    assert {"aten.nonzero", "aten.equal"} <= set(operators.names)


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("again", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
def test_no_operator_of_a_step_makes_the_host_wait(steps: int, again: bool | None) -> None:
    layer = layer_after(steps)
    net = nn.Sequential(CenConv2d(C, C, 1), layer, nn.ReLU())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    layer._loss_scale = scaler._scale
    with Operators() as operators:
        for x in (torch.randn(SHAPE), torch.full(SHAPE, torch.inf)):
            x.requires_grad_()
            y = net(x) if again is None else checkpoint(net, x, use_reentrant=again)
            y.sum().backward()
    assert not set(operators.names) & HOST_READS
    assert operators.names.count("aten.native_batch_norm_backward") == 2


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_a_step_makes_two_tensors_of_the_size_of_its_input(steps: int) -> None:
    """y and the gradient of x: each other pass over x, and each copy of it, would show here."""
    layer = layer_after(steps)
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)

    with Operators() as operators:
        torch.autograd.grad(layer(x), x, dy)
    assert len([size for size in operators.made if size >= x.numel()]) == 2
