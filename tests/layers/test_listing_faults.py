"""The faults of the listing that this project started from: each has a test that the listing fails.

The numbers are those of the list of faults. Here are the tests of those that no other file is about. Elsewhere are:

    2, 3, 5, 7      the constructor of FRN, its defaults and initial values: test_frn.py
    8, 9, 10        the learned eps, of either sign, by layer or channel, and inputs (N, C): test_frn.py
    12, 25          the gradient at a tie, and weights of float16 that are centred: test_functional.py
    13, 19, 22, 24  batches of any size and rank, the momentum, the affine part, evaluation: test_mabn.py
    14              deprecated names: any test, for warnings are errors here
    16, 17, 18      a layer used twice, its step counter, batches that overflow: test_mabn_misuse.py
    21              what a layer prints: with the other tests of each layer
    23              statistics of each process: test_mabn_distributed.py
    26              a fan-in of 1: test_checks.py
    28, 29          all arguments of nn.Conv2d, the centred weight in a plain one: test_cenconv.py

1 was the page's lost indentation; 15 (R set twice in the first step), the first half of 25 (the order of the means) and
30 (zero padding) are no faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tolerances import EXACT, OP_FLOAT16
from torch import nn

from deploynorm.errors import InputError
from deploynorm.layers import TLU, CenConv2d, FRN1d, FRN2d, FRN3d, MABN1d, MABN2d, MABN3d

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "frn": lambda: FRN2d(4, learned_eps="channel"),
    "tlu": lambda: TLU(4),
    "mabn": lambda: MABN2d(4),
    "cenconv": lambda: CenConv2d(4, 4, 3),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_fault_04_parameters_can_be_reset(maker: str) -> None:
    """The listing's reset method took no self: a TypeError."""
    layer = MAKERS[maker]()
    for p in layer.parameters():
        nn.init.constant_(p, 7)
    layer.reset_parameters()
    assert not any((p == 7).any() for p in layer.parameters())


@pytest.fixture
def visible_uninitialised_memory() -> Iterator[None]:
    """Makes torch fill new memory with NaN and the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.usefixtures("visible_uninitialised_memory")
def test_fault_06_no_memory_of_a_new_layer_is_left_unwritten(maker: str) -> None:
    """The listing took its parameters from unwritten memory and then failed to reset them."""
    for name, tensor in [*MAKERS[maker]().named_parameters(), *MAKERS[maker]().named_buffers()]:
        assert not tensor.isnan().any(), name
        assert (tensor < torch.iinfo(torch.int64).max).all() or name == "recent_steps", name


def test_fault_08_a_learned_eps_of_zero_stands_on_its_floor() -> None:
    """The listing had no floor, and began at 1e-6: 0 * inf, a NaN, on an all-zero map once eps came to zero."""
    layer = FRN2d(4, learned_eps="channel")
    assert layer.eps_l is not None
    torch.testing.assert_close(layer.eps_l, torch.full((4,), 1e-4), **EXACT.kwargs())
    nn.init.zeros_(layer.eps_l)
    torch.testing.assert_close(layer.effective_eps(), torch.full((4,), 1e-6), **EXACT.kwargs())
    x = torch.zeros(1, 4, 3, 3, requires_grad=True)
    gradients = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("layer", [FRN1d(4), FRN2d(4), FRN3d(4), MABN1d(4), MABN2d(4), MABN3d(4)], ids=repr)
def test_fault_10_other_ranks_and_channel_counts_are_refused(layer: nn.Module) -> None:
    """The listing broadcast its (1, C, 1, 1) parameters over whatever came."""
    kind = type(layer).__name__
    ranks = {"1": (2, 3), "2": (4,), "3": (5,)}[kind[-2]]
    for rank in range(1, 7):
        shape = (4,) if rank == 1 else (2, 4, *(3,) * (rank - 2))
        if rank not in ranks:
            with pytest.raises(InputError, match=f"^{kind}: wrong rank"):
                layer(torch.randn(shape))
            continue
        with pytest.raises(InputError, match=f"^{kind}: wrong number of channels"):
            layer(torch.randn(2, 1, *shape[2:]))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_fault_11_one_large_float16_value_does_not_kill_its_map(channels_last: bool) -> None:
    """The listing squared in float16: one value of 300 made the mean infinite and its whole map the bias."""
    x = torch.ones(1, 4, 64, 64).half()
    x[0, 0, 5, 7] = 300
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = FRN2d(4).half()(x)
    expected = FRN2d(4).double()(x.double())
    torch.testing.assert_close(y.double(), expected, **OP_FLOAT16.kwargs())
    assert (y[0, 0] > 0.1).all()


def test_fault_20_a_checkpoint_holds_statistics_and_no_constants() -> None:
    """The listing stored a constant (16, 32) matrix in every layer of every checkpoint."""
    state = MABN2d(4, moving_batch_size=6).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        **dict.fromkeys(("weight", "bias", "running_var"), (4,)),
        **dict.fromkeys(("recent_x2", "recent_gz"), (6, 5)),
        "num_batches_tracked": (),
    }


def test_fault_21_evaluation_exports_as_one_batch_normalization() -> None:
    """The listing's evaluation was a division, a product and a sum that no runtime fuses with the convolution."""
    program = torch.export.export(MABN2d(4).eval(), (torch.randn(2, 4, 3, 3),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in called if "zeros" not in name and "getitem" not in name] == ["aten.batch_norm.default"]


def test_fault_27_weights_begin_as_torchs_do() -> None:
    """The listing drew weight and bias from N(0, 1): activations of size 68 after one 3x3x512 convolution."""
    torch.manual_seed(0)
    layer = CenConv2d(512, 64, 3)
    torch.manual_seed(0)
    plain = nn.Conv2d(512, 64, 3)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), **EXACT.kwargs())
    assert layer(torch.randn(1, 512, 8, 8)).std() < 1
