"""The reference networks: shapes, sizes, structure, and what makes each of them the net of its paper."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tolerances import FLOAT64
from torch import nn

from deploynorm.errors import InputError
from deploynorm.layers import CenConv2d, FRN2d, MABN2d
from deploynorm.layers.functional import center_weight
from deploynorm.models import frn_resnet, mabn_resnet

SMALL = {
    "frn": frn_resnet.resnet20,
    "mabn": mabn_resnet.resnet20,
    **{norm: partial(mabn_resnet.resnet20, norm=norm) for norm in ("bn", "gn")},
}
LARGE = {
    "frn": frn_resnet.resnet50,
    "mabn": mabn_resnet.resnet50,
    **{norm: partial(mabn_resnet.resnet50, norm=norm) for norm in ("bn", "gn")},
}
NORMS = list(SMALL)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_networks_take_any_height_and_width(norm):
    model = SMALL[norm](num_classes=7, in_channels=1).eval()
    for shape in [(2, 1, 28, 28), (1, 1, 33, 19), (1, 1, 8, 5)]:
        assert model(torch.randn(shape)).shape == (shape[0], 7)
    assert LARGE[norm]().eval()(torch.randn(1, 3, 65, 47)).shape == (1, 1000)


def stage_shapes(model: nn.Module, size: int) -> list[tuple[int, ...]]:
    """(C, H, W) behind the stem and each stage."""
    x, shapes = torch.randn(1, 3, size, size), []
    for part in (model.stem, *model.stages):
        x = part(x)
        shapes.append(tuple(x.shape[1:]))
    return shapes


@pytest.mark.parametrize("norm", NORMS)
def test_each_stage_halves_the_map_and_widens_it(norm):
    assert stage_shapes(SMALL[norm]().eval(), 32) == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_resnet50_has_the_imagenet_shapes_and_strides_in_the_3x3():
    model = mabn_resnet.resnet50(norm="bn").eval()
    assert stage_shapes(model, 64) == [(64, 16, 16), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    first = model.stages[1][0]
    assert [conv.stride for conv in (first.conv1, first.conv2, first.conv3)] == [(1, 1), (2, 2), (1, 1)]


def test_the_parameter_counts_are_those_of_the_published_nets():
    # 269,722 with parameter-free shortcuts, as published; the two projections and their norms add 2,752.
    assert parameters(mabn_resnet.resnet20(norm="bn")) == 269_722 + 2_752
    assert parameters(mabn_resnet.resnet50(norm="bn")) == 25_557_032
    for nets in (SMALL, LARGE):
        assert parameters(nets["gn"]()) == parameters(nets["bn"]())
    thresholds = 16 + 3 * 2 * (16 + 32 + 64)  # FRN has one for each activated channel
    assert parameters(frn_resnet.resnet20()) == parameters(mabn_resnet.resnet20(norm="bn")) + thresholds


@pytest.mark.parametrize("nets", [SMALL, LARGE], ids=["resnet20", "resnet50"])
def test_the_mabn_net_is_the_bn_net_layer_for_layer(nets):
    plain = {CenConv2d: nn.Conv2d, MABN2d: nn.BatchNorm2d}

    def structure(model):
        return [
            (name, plain.get(type(m), type(m)), getattr(m, "stride", None), getattr(m, "padding", None))
            for name, m in model.named_modules()
        ]

    mabn, bn = nets["mabn"](), nets["bn"]()
    assert structure(mabn) == structure(bn)
    assert {n: p.shape for n, p in mabn.named_parameters()} == {n: p.shape for n, p in bn.named_parameters()}
    assert not any(type(m) in (nn.Conv2d, nn.BatchNorm2d) for m in mabn.modules())


def test_the_mabn_net_computes_what_the_bn_net_does_on_centred_weights():
    torch.manual_seed(0)
    mabn, bn = SMALL["mabn"]().double(), SMALL["bn"]().double()
    for _ in range(2):
        mabn(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    state = bn.state_dict()  # whose running_mean is 0
    for name in state.keys() & mabn.state_dict().keys():
        tensor = mabn.state_dict()[name]
        state[name] = center_weight(tensor) if tensor.dim() == 4 else tensor
    bn.load_state_dict(state)
    x = torch.randn(3, 3, 21, 13, dtype=torch.float64)
    torch.testing.assert_close(mabn.eval()(x), bn.eval()(x), **FLOAT64.kwargs())


@pytest.mark.parametrize("model", [frn_resnet.resnet20(), frn_resnet.resnet50()], ids=["resnet20", "resnet50"])
def test_each_convolution_of_the_frn_net_has_its_frn_and_no_bias(model):
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, FRN2d)]
    assert [c.out_channels for c in convolutions] == [n.num_features for n in norms]
    assert all(c.bias is None for c in convolutions)
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())


@pytest.mark.parametrize(
    ("block", "last"),
    [(frn_resnet.BasicBlock(8, 4, 2), "norm2"), (frn_resnet.Bottleneck(8, 4, 2), "norm3")],
    ids=["basic", "bottleneck"],
)
def test_a_block_thresholds_after_the_addition_and_not_before(block, last):
    unthresholded = {name for name, m in block.named_modules() if isinstance(m, FRN2d) and m.tau is None}
    assert unthresholded == {"shortcut.1"}
    # A threshold above anything that the sum can reach shows where it acts: on the whole output.
    nn.init.constant_(getattr(block, last).tau, 1e3)
    assert bool((block(torch.randn(2, 8, 6, 6)) == 1e3).all())


@pytest.mark.parametrize(("learned_eps", "shape"), [("layer", ()), ("channel", (16,))])
def test_learned_eps_reaches_every_frn(learned_eps, shape):
    model = frn_resnet.resnet20(learned_eps=learned_eps)
    learned = [m.eps_l for m in model.modules() if isinstance(m, FRN2d)]
    assert all(eps is not None for eps in learned)
    assert learned[0].shape == shape


@pytest.mark.parametrize("norm", NORMS)
def test_convolutions_start_with_a_variance_of_two_over_fan_out(norm):
    torch.manual_seed(0)
    for name, module in LARGE[norm](in_channels=3).named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.var().item() * fan_out == pytest.approx(2, rel=0.1), name


def test_gn_has_32_groups_where_it_can_and_never_one_channel_alone():
    assert {m.num_groups for m in LARGE["gn"]().modules() if isinstance(m, nn.GroupNorm)} == {32}
    sizes = {m.num_channels // m.num_groups for m in SMALL["gn"]().modules() if isinstance(m, nn.GroupNorm)}
    assert sizes == {2}


def test_an_unknown_norm_is_refused():
    with pytest.raises(InputError, match=r"unknown norm.*'mabn', 'bn' or 'gn'"):
        mabn_resnet.resnet20(norm="frn")
