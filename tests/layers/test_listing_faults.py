"""The faults of the listing that this project started from, each as a test that the listing fails.

The numbers are those of the list of faults. The others: 1 was the page's lost indentation; 15 (R set twice in the
first step), 25's first half (the order of the means) and 30 (zero padding) are no faults; 23 is in
test_mabn_distributed.py, because it takes two processes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from tolerances import EXACT, FLOAT64, OP_FLOAT16, OP_FLOAT32
from torch import nn

from deploynorm.errors import InputError
from deploynorm.layers import TLU, CenConv1d, CenConv2d, FRN1d, FRN2d, FRN3d, MABN1d, MABN2d, MABN3d
from deploynorm.layers.functional import center_weight

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "frn": lambda: FRN2d(4, learned_eps="channel"),
    "tlu": lambda: TLU(4),
    "mabn": lambda: MABN2d(4),
    "cenconv": lambda: CenConv2d(4, 4, 3),
}


def training_step(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = layer(x)
    y.square().sum().backward()
    return y


def test_fault_02_frn_is_constructed_with_its_number_of_channels() -> None:
    """The listing misspelt the constructor: FRN(8) was a TypeError, and FRN() had no parameters."""
    assert {name: p.shape for name, p in FRN2d(8).named_parameters()} == dict.fromkeys(("weight", "bias", "tau"), (8,))


def test_fault_03_frn_with_its_default_arguments_runs() -> None:
    """The listing had a misspelt constant on the default path: a NameError."""
    assert FRN2d(8)(torch.randn(2, 8, 5, 5)).shape == (2, 8, 5, 5)


@pytest.mark.parametrize("maker", MAKERS)
def test_fault_04_parameters_can_be_reset(maker: str) -> None:
    """The listing's reset method took no self: a TypeError."""
    layer = MAKERS[maker]()
    for p in layer.parameters():
        nn.init.constant_(p, 7)
    layer.reset_parameters()
    assert not any((p == 7).any() for p in layer.parameters())


def test_fault_05_a_fresh_frn_is_a_relu_of_the_normalized_input() -> None:
    """The listing began beta and tau at one: no output below 1, half of them exactly 1."""
    x = torch.randn(2, 8, 9, 9)
    unit = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + 1e-6)
    torch.testing.assert_close(FRN2d(8)(x), torch.relu(unit), **OP_FLOAT32.kwargs())


def test_fault_05_twenty_fresh_layers_keep_two_samples_apart() -> None:
    """The listing's constant outputs drowned the signal: the cosine between two samples came to 0.9996."""
    torch.manual_seed(0)
    net = nn.Sequential(*[m for _ in range(20) for m in (nn.Conv2d(16, 16, 3, padding=1), FRN2d(16))])
    with torch.no_grad():
        first, second = net(torch.randn(2, 16, 8, 8)).flatten(1)
    assert F.cosine_similarity(first, second, dim=0) < 0.95


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


def test_fault_07_a_fixed_eps_is_no_parameter_and_takes_no_gradient() -> None:
    """The listing made it an nn.Parameter (1, C, 1, 1): optimisers and weight decay took it."""
    layer = FRN2d(4)
    assert layer.eps == 1e-6
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()] == ["weight", "bias", "tau"]


def test_fault_08_a_learned_eps_of_zero_stands_on_its_floor() -> None:
    """The listing had no floor, and began at 1e-6: 0 * inf, a NaN, on an all-zero map once eps came to zero."""
    layer = FRN2d(4, learned_eps="channel")
    assert layer.eps_l is not None
    torch.testing.assert_close(layer.eps_l, torch.full((4,), 1e-4), **EXACT.kwargs())
    nn.init.zeros_(layer.eps_l)
    torch.testing.assert_close(layer.effective_eps(), torch.full((4,), 1e-6), **EXACT.kwargs())
    x = torch.zeros(1, 4, 3, 3, requires_grad=True)
    training_step(layer, x)
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_fault_08_the_sign_of_the_learned_eps_does_not_matter() -> None:
    """The listing was right here: eps is added as its absolute value."""
    layer, mirrored = FRN2d(4, learned_eps="layer"), FRN2d(4, learned_eps="layer")
    assert mirrored.eps_l is not None
    nn.init.constant_(mirrored.eps_l, -1e-4)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(mirrored(x), layer(x), **EXACT.kwargs())


def test_fault_09_a_learned_eps_is_one_number_a_layer_or_one_a_channel() -> None:
    """The listing knew one a channel only; the paper's is one a layer."""
    for learned, shape in (("layer", ()), ("channel", (4,))):
        layer = FRN2d(4, learned_eps=learned)
        assert layer.eps_l is not None
        assert layer.eps_l.shape == shape
        training_step(layer, torch.randn(2, 4, 3, 3) * 0.01)
        assert layer.eps_l.grad is not None
        assert layer.eps_l.grad.all()


def test_fault_10_a_2d_input_is_normalized_value_by_value() -> None:
    """The listing averaged over everything, the batch too, and returned (1, C, N, C)."""
    layer = FRN1d(4, learned_eps="layer")
    x = torch.randn(3, 4)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, layer(x[..., None])[..., 0], **EXACT.kwargs())
    x[1:] *= 100
    torch.testing.assert_close(layer(x)[0], y[0], **EXACT.kwargs())


@pytest.mark.parametrize("layer", [FRN1d(4), FRN2d(4), FRN3d(4), MABN1d(4), MABN2d(4), MABN3d(4)], ids=repr)
def test_fault_10_other_ranks_and_channel_counts_are_refused(layer: nn.Module) -> None:
    """The listing broadcast its (1, C, 1, 1) parameters over whatever came."""
    ranks = {"1": (2, 3), "2": (4,), "3": (5,)}[type(layer).__name__[-2]]
    for rank in range(1, 7):
        shape = (4,) if rank == 1 else (2, 4, *(3,) * (rank - 2))
        if rank not in ranks:
            with pytest.raises(InputError, match="wrong rank"):
                layer(torch.randn(shape))
            continue
        with pytest.raises(InputError, match="wrong number of channels"):
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


def test_fault_12_the_gradient_at_a_tie_goes_to_y_undivided() -> None:
    """The listing's torch.max gave y and tau half each; the paper's equation 4 gives it to y."""
    layer = FRN2d(2)
    training = layer(torch.zeros(1, 2, 2, 2))
    training.sum().backward()
    assert layer.bias.grad is not None
    assert layer.tau is not None
    assert layer.tau.grad is not None
    assert (layer.bias.grad.tolist(), layer.tau.grad.tolist()) == ([4, 4], [0, 0])


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 32, 33])
def test_fault_13_and_19_mabn_takes_any_batch_size(batch: int) -> None:
    """The listing simulated batches of two inside one of exactly 32: any other size was an error."""
    layer = MABN2d(4, warmup=1)
    for _ in range(4):
        assert training_step(layer, torch.randn(batch, 4, 3, 3)).isfinite().all()
    assert layer.num_batches_tracked == 4


def test_fault_14_the_backward_pass_uses_nothing_deprecated() -> None:
    """The listing read ctx.saved_variables, deprecated for years."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_step(MABN2d(4), torch.randn(2, 4, 3, 3))


def test_fault_16_a_layer_may_be_used_twice_before_the_backward_pass() -> None:
    """The listing saved its history for backward and changed it there: "modified by an inplace operation"."""
    layer = MABN2d(4)
    (layer(torch.randn(2, 4, 3, 3)) + layer(torch.randn(2, 4, 3, 3))).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fault_17_the_step_counter_counts_past_what_half_precision_can(dtype: torch.dtype) -> None:
    """The listing counted in a float buffer: stuck at 2048 in float16 and at 256 in bfloat16."""
    layer = MABN2d(4).to(dtype)
    layer.num_batches_tracked.fill_(2048)
    layer(torch.randn(2, 4, 3, 3).to(dtype))
    assert (layer.num_batches_tracked.item(), layer.num_batches_tracked.dtype) == (2049, torch.int64)


def test_fault_18_one_overflowing_batch_does_not_poison_the_statistics() -> None:
    """The listing squared in half precision and averaged the infinity in: evaluation was the bias ever after."""
    layer = MABN2d(4).half()
    x = torch.randn(2, 4, 3, 3).half()
    layer(x)
    before = layer.running_var.clone()
    assert layer(300 * x).isfinite().all()
    assert layer.running_var.isfinite().all()
    assert (layer.running_var > 100 * before).all()
    layer(torch.inf * x)
    assert layer.running_var.isfinite().all()
    with pytest.warns(UserWarning, match="not finite"):
        assert layer.eval()(x).abs().max() > 0


def test_fault_19_mabn_is_not_bound_to_images() -> None:
    """The listing unpacked H and W: four axes only."""
    for layer, shape in ((MABN1d(4), (2, 4)), (MABN1d(4), (2, 4, 5)), (MABN3d(4), (2, 4, 3, 3, 3))):
        assert training_step(layer, torch.randn(shape)).shape == shape


def test_fault_20_a_checkpoint_holds_statistics_and_no_constants() -> None:
    """The listing stored a constant (16, 32) matrix in every layer of every checkpoint."""
    state = MABN2d(4, moving_batch_size=6).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "weight": (4,),
        "bias": (4,),
        "running_var": (4,),
        "num_batches_tracked": (),
        "recent_x2": (6, 5),
        "recent_gz": (6, 5),
    }


def test_fault_21_a_layer_prints_its_arguments() -> None:
    """The listing printed FRN() and MABN2d()."""
    for name, maker in MAKERS.items():
        assert "(4" in repr(maker()), name


def test_fault_21_evaluation_exports_as_one_batch_normalization() -> None:
    """The listing's evaluation was a division, a product and a sum that no runtime fuses with the convolution."""
    program = torch.export.export(MABN2d(4).eval(), (torch.randn(2, 4, 3, 3),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in called if "zeros" not in name and "getitem" not in name] == ["aten.batch_norm.default"]


def test_fault_22_momentum_is_torchs_and_not_one_minus_it() -> None:
    """The listing's momentum of 0.98 was the weight of the old value."""
    layer, bn = MABN2d(4, momentum=0.25), nn.BatchNorm2d(4, momentum=0.25)
    layer(torch.ones(2, 4, 3, 3))
    bn.running_mean.fill_(1)
    second = torch.full((2, 4, 3, 3), 5.0)
    layer(second)
    bn(second)
    moved_by_bn = (bn.running_mean - 1) / (5 - 1)
    torch.testing.assert_close((layer.running_var - 1) / (25 - 1), moved_by_bn, **OP_FLOAT32.kwargs())


def test_fault_24_the_affine_part_can_be_left_out() -> None:
    """The listing always had weight and bias."""
    layer = MABN2d(4, affine=False)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    training_step(layer, x)
    assert (list(layer.parameters()), x.grad is not None) == ([], True)


def test_fault_24_a_frozen_layer_trains_the_layers_before_it_and_stays_as_it_is() -> None:
    """The listing could not be frozen for fine-tuning but by hand."""
    conv, norm = nn.Conv2d(3, 4, 3), MABN2d(4)
    norm(torch.randn(2, 4, 3, 3))
    norm.eval().requires_grad_(False)
    before = copy.deepcopy(norm.state_dict())
    norm(conv(torch.randn(2, 3, 5, 5))).sum().backward()
    assert conv.weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_fault_25_a_float16_weight_is_centred_in_float32() -> None:
    """The listing took the mean, and the differences, in the weight's type: off by more than float16's rounding."""
    w = (torch.randn(64, 512, 3, 3, generator=torch.Generator().manual_seed(0)) + 1).half()
    exact = w.double() - w.double().mean((1, 2, 3), keepdim=True)
    assert (center_weight(w) == exact.half()).double().mean() > 0.99


@pytest.mark.parametrize(
    "make",
    [lambda: CenConv2d(8, 8, 1, groups=8), lambda: CenConv2d(1, 8, 1), lambda: CenConv1d(4, 8, 1, groups=4)],
    ids=["depthwise_1x1", "one_channel_1x1", "1d"],
)
def test_fault_26_a_fan_in_of_one_is_refused(make: Callable[[], nn.Module]) -> None:
    """The listing centred it to zero: a dead output without a gradient."""
    with pytest.raises(InputError, match="fan-in of 1"):
        make()


def test_fault_27_weights_begin_as_torchs_do() -> None:
    """The listing drew weight and bias from N(0, 1): activations of size 68 after one 3x3x512 convolution."""
    torch.manual_seed(0)
    layer = CenConv2d(512, 64, 3)
    torch.manual_seed(0)
    plain = nn.Conv2d(512, 64, 3)
    torch.testing.assert_close(layer.weight, plain.weight, **EXACT.kwargs())
    torch.testing.assert_close(layer.bias, plain.bias, **EXACT.kwargs())
    assert layer(torch.randn(1, 512, 8, 8)).std() < 1


def test_fault_28_it_is_an_nn_conv2d_with_all_its_arguments() -> None:
    """The listing was a module of its own: int kernels only, no padding mode, unseen by isinstance."""
    layer = CenConv2d(3, 4, (1, 3), stride=(2, 1), padding=(0, 1), padding_mode="reflect", dtype=torch.float64)
    assert isinstance(layer, nn.Conv2d)
    plain = nn.Conv2d(3, 4, (1, 3), stride=(2, 1), padding=(0, 1), padding_mode="reflect", dtype=torch.float64)
    plain.load_state_dict({**layer.state_dict(), "weight": center_weight(layer.weight)})
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), **FLOAT64.kwargs())


def test_fault_29_a_plain_convolution_needs_the_centred_weight_under_the_same_keys() -> None:
    """The listing's stored weight, loaded into a plain Conv2d, was wrong without a word; centred, it fits both."""
    layer, plain = CenConv2d(3, 8, 3, dtype=torch.float64), nn.Conv2d(3, 8, 3, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = layer(x)
    plain.load_state_dict(layer.state_dict())
    assert (plain(x) - expected).norm() / expected.norm() > 0.1
    centred = {**layer.state_dict(), "weight": center_weight(layer.weight.detach())}
    for module in (plain, layer):
        module.load_state_dict(centred)
        torch.testing.assert_close(module(x), expected, **FLOAT64.kwargs())


def test_fault_30_is_none_and_holds_away_from_the_border() -> None:
    """Not a fault: with zero padding, centring takes out a constant only where no padding is in the window."""
    layer = CenConv2d(3, 8, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(layer(x + 100)[inside], layer(x)[inside], **FLOAT64.kwargs())
