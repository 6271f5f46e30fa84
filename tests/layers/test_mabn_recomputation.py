"""MABN where its forward pass runs a second time, or was compiled."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from mabn_steps import C, batches, new_layer, run_step
from tolerances import EXACT, FLOAT64, Tolerance
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from deploynorm.layers import CenConv2d

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
COMPILED = pytest.mark.filterwarnings(
    "ignore:<class .torch.autograd.function.Function.> should not be instantiated",  # by dynamo
    "ignore:.torch.jit.script_method. is deprecated",  # by inductor
)
Map = Callable[[Tensor], Tensor]


def new_net() -> nn.Sequential:
    """Convolutions and MABN, the second MABN used twice, and dropout, whose random numbers come back as well."""
    torch.manual_seed(0)
    norm = new_layer()
    convs = [CenConv2d(C, C, 3, padding=1, dtype=torch.float64) for _ in range(3)]
    start = convs[0], new_layer(), nn.ReLU(), nn.Dropout(0.2)
    return nn.Sequential(*start, convs[1], norm, nn.Tanh(), convs[2], norm)


def small_net() -> nn.Sequential:
    """A convolution, and MABN used twice."""
    torch.manual_seed(0)
    norm = new_layer()
    return nn.Sequential(norm, CenConv2d(C, C, 1, dtype=torch.float64), nn.Tanh(), norm)


def assert_trains_as(
    net: nn.Module,
    call: Map,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    autocast: torch.dtype | None = None,
    tolerance: Tolerance = FLOAT64,
) -> None:
    """Outputs, gradients and statistics of `call`, which runs net in a way of its own, are those of a plain run."""
    plain = copy.deepcopy(net)
    for step, (x, dy) in enumerate(data or batches(16, (4, 4), range(2, 4), scaled=autocast is None)):
        results = []
        for module, function in ((net, call), (plain, plain)):
            torch.manual_seed(step)
            module.zero_grad()
            leaf = x.clone().to(next(net.parameters()).dtype).requires_grad_()
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                y = function(leaf)
            y.backward(dy.to(y.dtype))
            results.append((y.detach(), leaf.grad, *(p.grad for p in module.parameters())))
        torch.testing.assert_close(*results, **tolerance.kwargs())
        torch.testing.assert_close(net.state_dict(), plain.state_dict(), **tolerance.kwargs())


@REENTRANT
def test_activation_checkpointing_counts_a_batch_once(reentrant: bool) -> None:
    net = new_net()
    assert_trains_as(net, lambda x: checkpoint(net, x, use_reentrant=reentrant))
    assert net[1].num_batches_tracked == 16
    assert net[5].num_batches_tracked == 32


@REENTRANT
@pytest.mark.parametrize("segments", [2, 4])
def test_checkpoint_sequential_counts_a_batch_once(segments: int, reentrant: bool) -> None:
    net = new_net()
    assert_trains_as(net, lambda x: checkpoint_sequential(list(net), segments, x, use_reentrant=reentrant))
    assert net[5].num_batches_tracked == 32


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the inner one, in its first run
@REENTRANT
def test_checkpointing_inside_checkpointing_counts_a_batch_once(reentrant: bool) -> None:
    net = new_net()

    def inner(x: Tensor) -> Tensor:
        return checkpoint(net[4:], checkpoint(net[:4], x, use_reentrant=reentrant), use_reentrant=reentrant)

    assert_trains_as(net, lambda x: checkpoint(inner, x, use_reentrant=reentrant))


class Repeated(nn.Sequential):
    def forward(self, x: Tensor, call: Callable[..., Tensor] = lambda layer, x: layer(x)) -> Tensor:
        for _ in range(5):
            x = call(self[0], x).tanh()
        return x


@REENTRANT
def test_a_layer_that_makes_its_own_input_is_recomputed_in_the_order_of_backward(reentrant: bool) -> None:
    net = Repeated(new_layer())
    assert_trains_as(net, lambda x: net(x, partial(checkpoint, use_reentrant=reentrant)))


@REENTRANT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_checkpointing_under_autocast_is_that_without_checkpointing(dtype: torch.dtype, reentrant: bool) -> None:
    net = new_net().float()
    assert_trains_as(net, lambda x: checkpoint(net, x, use_reentrant=reentrant), autocast=dtype, tolerance=EXACT)


@REENTRANT
def test_the_same_batch_again_and_again_finds_its_own_step(reentrant: bool) -> None:
    layer = new_layer()
    data = [*batches(1, (4, 4), range(3, 4))] * 40
    assert_trains_as(layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant), data, tolerance=EXACT)


def test_checkpointing_finds_the_right_step_again_beside_zeros_and_nan() -> None:
    layer, checkpointed = (new_layer() for _ in range(2))
    data = list(batches(14, (3, 3), range(2, 3)))
    for zeros in (1, 9):
        data[zeros] = (torch.zeros_like(data[zeros][0]), data[zeros][1])
    data[10] = (data[10][0] * math.nan, data[10][1])
    for step, (x, dy) in enumerate(data):
        expected = run_step(layer, x, dy)
        leaf = x.clone().requires_grad_()
        y = checkpoint(checkpointed, leaf, use_reentrant=False)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        if step != 10:
            torch.testing.assert_close(dx, expected[1], **EXACT.kwargs())


@COMPILED
@pytest.mark.slow
def test_a_compiled_network_trains_as_an_eager_one_on_any_sizes_without_being_compiled_again() -> None:
    net = small_net()
    torch.compiler.reset()
    counter, compilations = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)

    def call(x: Tensor) -> Tensor:
        y = compiled(x)
        compilations.add(counter.frame_count)
        return y

    maps = itertools.cycle([(4, 5), (5, 4), (7, 9), (4, 4), (6, 6)])
    data = zip(batches(16, (7, 9), range(2, 9)), maps, strict=False)
    assert_trains_as(net, call, [tuple(t[..., :h, :w].contiguous() for t in pair) for pair, (h, w) in data])
    assert len(compilations) == 1, "all of them in the first step"


def compile_of_checkpoint(net: nn.Module, backend: str) -> Map:
    def call(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=False)

    return torch.compile(call, fullgraph=True, backend=backend)


def checkpoint_of_compile(net: nn.Module, backend: str) -> Map:
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    return lambda x: checkpoint(compiled, x, use_reentrant=False)


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("call", [compile_of_checkpoint, checkpoint_of_compile])
def test_a_compiled_network_with_checkpointing_counts_a_batch_once(call: Callable[[nn.Module, str], Map]) -> None:
    net = small_net()
    torch.compiler.reset()
    assert_trains_as(net, call(net, "aot_eager"))
    assert net[0].num_batches_tracked == 32


@pytest.mark.slow
@COMPILED
def test_inductor_compiles_checkpointing_as_well(require: Callable[[str], None]) -> None:
    require("compiler")
    net = small_net()
    torch.compiler.reset()
    assert_trains_as(net, compile_of_checkpoint(net, "inductor"), batches(16, (4, 4), range(2, 3)))


def test_the_operator_keeps_the_contract_of_torch_library() -> None:
    row, used, ring = torch.rand(C + 1), torch.rand(2 * C + 2), torch.rand(4, 3 * C + 3)
    torch.library.opcheck(torch.ops.deploynorm.mabn_settled.default, (row, used, ring, torch.tensor(6)))
