"""Swapping BatchNorm for MABN over a table of named networks: which convolutions are centred, and which are refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from swap_networks import (
    BATCH_NORMS,
    Case,
    FrozenBatchNorm2d,
    OwnComputationConv,
    OwnForwardConv,
    OwnForwardNorm,
    Residual,
    chain,
    conv,
    drawn,
    leaves,
    net,
    norm,
    sequence,
    swapped_as_expected,
    with_hook,
)
from tolerances import FLOAT64
from torch import nn
from torch.nn.utils import parametrizations

import deploynorm
from deploynorm._swap import swap
from deploynorm.layers import CenConv2d, MABN2d


class NamedConv(nn.Conv2d):
    """Computes what its parent does, but somebody may call its other method."""

    def flops(self) -> int:
        return self.weight.numel()


PAIR = {"0": "CenConv2d", "1": "MABN2d"}
BARE = {"0": "=", "1": "MABN2d"}
CENTRED = {"c": "CenConv2d", "b": "MABN2d"}
PLAIN = {"c": "=", "b": "MABN2d"}

TO_MABN = [
    Case("conv_norm_relu", chain(nn.ReLU()), PAIR),
    Case("no_bias", sequence(conv(bias=False), nn.BatchNorm2d(4), nn.SiLU()), PAIR),
    Case("groups", sequence(conv(4, 8, groups=2), nn.BatchNorm2d(8)), PAIR, shape=(2, 4, 8, 6)),
    Case("depthwise", sequence(conv(4, 4, groups=4), nn.BatchNorm2d(4)), PAIR, shape=(2, 4, 8, 6)),
    Case("padding", sequence(nn.Conv2d(3, 4, 3, 2, "valid", padding_mode="reflect"), nn.BatchNorm2d(4)), PAIR),
    Case("subclass", sequence(NamedConv(3, 4, 3), nn.BatchNorm2d(4)), BARE, "a NamedConv may do more than a Conv2d"),
    Case("one_axis", sequence(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), {"0": "CenConv1d", "1": "MABN1d"}, "", (2, 3, 9)),
    Case(
        "three_axes",
        sequence(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)),
        {"0": "CenConv3d", "1": "MABN3d"},
        shape=(2, 3, 5, 6, 7),
    ),
    Case(
        "transposed",
        sequence(nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), nn.BatchNorm2d(4)),
        {"0": "CenConvTranspose2d", "1": "MABN2d"},
    ),
    Case("synchronised", sequence(conv(), nn.SyncBatchNorm(4)), PAIR),
    Case("not_affine", sequence(conv(), nn.BatchNorm2d(4, affine=False)), PAIR),
    Case("cumulative", sequence(conv(), nn.BatchNorm2d(4, momentum=None)), PAIR, "since the BatchNorm has none"),
    Case("one_conv_for_two_norms", net(lambda m, x: m.b(m.c(x)) + m.d(m.c(x)), d=norm), {**CENTRED, "d": "MABN2d"}),
    Case("one_norm_for_two_convs", net(lambda m, x: m.b(m.c(x)) + m.b(m.d(x)), d=conv), {**CENTRED, "d": "CenConv2d"}),
    Case("conv_called_twice", net(lambda m, x: m.b(m.c(x)) + m.b(m.c(x * 2))), CENTRED),
    Case(
        "through_concatenation",
        net(lambda m, x: m.d(torch.cat([m.c(x), m.e(x)], 1)), d=lambda: nn.BatchNorm2d(8), e=conv),
        {"c": "CenConv2d", "e": "CenConv2d", "d": "MABN2d", "b": "MABN2d"},
        "behind c, e",
    ),
    Case(
        "residual",
        Residual,
        {
            **dict.fromkeys(("conv1", "conv2", "shortcut.0"), "CenConv2d"),
            **dict.fromkeys(("bn1", "bn2", "shortcut.1"), "MABN2d"),
        },
    ),
    Case(
        "pre_activation", sequence(nn.BatchNorm2d(3), nn.ReLU(), conv()), {"0": "MABN2d", "2": "="}, "network's input"
    ),
    Case("behind_a_relu", net(lambda m, x: m.b(m.r(m.c(x))), r=nn.ReLU), PLAIN, "it goes to relu"),
    Case("conv_read_twice", net(lambda m, x: m.b(y := m.c(x)) + y), PLAIN, "it goes to the network's output too"),
    Case("conv_given_back", net(lambda m, x: (m.b(y := m.c(x)), y)), PLAIN, "it goes to the network's output too"),
    Case(
        "norm_called_past_it", net(lambda m, x: m.b.forward(m.c(x)), d=conv), {"c": "=", "b": "=", "d": "="}, "outside"
    ),
    Case(
        "weight_read_elsewhere",
        net(lambda m, x: m.b(m.c(x)) + F.conv2d(x, m.c.weight, padding=1)),
        PLAIN,
        "its weight is read elsewhere too, by conv2d",
    ),
    Case("functional_conv", net(lambda m, x: m.b(F.conv2d(x, m.c.weight))), PLAIN, "reads conv2d"),
    Case(
        "not_traceable", net(lambda m, x: m.b(m.c(x)) if x.sum() > -1e9 else m.c(x)), PLAIN, "no convolution is centred"
    ),
    Case("fan_in_of_one", sequence(nn.Conv2d(3, 3, 1, groups=3), nn.BatchNorm2d(3)), BARE, "a fan-in of 1"),
    Case(
        "transposed_fan_in_of_one",
        sequence(nn.ConvTranspose2d(3, 3, 1, groups=3), nn.BatchNorm2d(3)),
        BARE,
        "fan-in of 1",
    ),
    Case("forward_of_its_own", sequence(OwnForwardConv(3, 4, 3), nn.BatchNorm2d(4)), BARE, "may do more than a Conv2d"),
    Case(
        "computation_of_its_own",
        sequence(OwnComputationConv(3, 4, 3), nn.BatchNorm2d(4)),
        BARE,
        "may do more than a Conv2d",
    ),
    Case("hooked", lambda: with_hook(chain()(), "0"), BARE, "it has hooks"),
    Case("hooked_before", lambda: with_hook(chain()(), "0", "register_forward_pre_hook"), BARE, "it has hooks"),
    Case("hooked_behind", lambda: with_hook(chain()(), "0", "register_full_backward_hook"), BARE, "it has hooks"),
    Case(
        "parametrized",
        lambda: nn.Sequential(parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)),
        BARE,
        "parametrized",
    ),
    Case(
        "spectral_norm", lambda: nn.Sequential(nn.utils.spectral_norm(conv()), nn.BatchNorm2d(4)), BARE, "it has hooks"
    ),
    Case(
        "transposed_of_one_axis",
        sequence(nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4)),
        {"0": "=", "1": "MABN1d"},
        "no centred ConvTranspose1d",
        (2, 3, 9),
    ),
    Case(
        "linear", sequence(nn.Linear(5, 4), nn.BatchNorm1d(4)), {"0": "=", "1": "MABN1d"}, "no centred Linear", (4, 5)
    ),
    Case("norm_of_its_own_kind", chain(norm=OwnForwardNorm), {"0": "=", "1": "="}, "it goes to batch_norm"),
    Case("frozen", chain(FrozenBatchNorm2d(4)), {**PAIR, "2": "="}, "it is frozen"),
]


def centred_by_hand(network: nn.Module, case: Case) -> nn.Module:
    """The network itself, its weights centred where the case says so, its norms with mean 0 and second moment 1."""
    network = copy.deepcopy(network).eval()
    for path, became in case.became.items():
        layer = network.get_submodule(path)
        if became.startswith("CenConv"):
            inputs = 0 if "Transpose" in became else 1
            layer.weight.data -= layer.weight.data.mean((inputs, *range(2, layer.weight.dim())), keepdim=True)
        elif became.startswith("MABN") and isinstance(layer, BATCH_NORMS):
            layer.reset_running_stats()
    return network


@pytest.mark.parametrize("case", TO_MABN, ids=str)
def test_mabn_takes_the_place_of_each_norm_and_cenconv_of_what_feeds_it(case: Case) -> None:
    """With its statistics untouched, the network computes what BatchNorm does with mean 0 and variance 1."""
    network, x = drawn(case, torch.float64)
    swapped = swapped_as_expected(network, x, case, "mabn")
    got, want = leaves(swapped.eval()(x)), leaves(centred_by_hand(network, case)(x))
    torch.testing.assert_close(got, want, **FLOAT64.kwargs())
    with torch.no_grad():
        swapped.train()(x)
    folded = deploynorm.fold(swapped.eval(), (x,)).model
    torch.testing.assert_close(leaves(folded(x)), leaves(swapped(x)), **FLOAT64.kwargs())


def test_mabn_keeps_epsilon_and_momentum_and_takes_what_is_asked_for() -> None:
    network, x = nn.Sequential(conv(), nn.BatchNorm2d(4, eps=1e-3, momentum=0.01)), torch.randn(2, 3, 8, 8)
    kept = swap(network, (x,), norm="mabn").model[1]
    assert isinstance(kept, MABN2d)
    assert (kept.eps, kept.momentum, kept.moving_batch_size) == (1e-3, 0.01, 32)
    asked = swap(network, (x,), norm="mabn", momentum=0.02, moving_batch_size=16, warmup=5).model[1]
    assert (asked.eps, asked.momentum, asked.moving_batch_size, asked.warmup) == (1e-3, 0.02, 16, 5)


def test_layers_that_are_ours_already_stay() -> None:
    network = nn.Sequential(CenConv2d(3, 4, 3), nn.BatchNorm2d(4), CenConv2d(4, 4, 3), MABN2d(4))
    swapped, report = swap(network, (torch.randn(2, 3, 8, 8),), norm="mabn")
    assert [type(layer) for layer in swapped] == [CenConv2d, MABN2d, CenConv2d, MABN2d]
    assert [change.name for change in report.changes if change.became] == ["1"]
    assert swapped[3].momentum == network[3].momentum
