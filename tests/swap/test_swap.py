"""Swapping BatchNorm for FRN over a table of named networks: no activation is lost, and none is doubled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from swap_networks import (
    Case,
    Forward,
    FrozenBatchNorm2d,
    OwnForwardNorm,
    Residual,
    chain,
    conv,
    drawn,
    in_place,
    leaves,
    net,
    norm,
    sequence,
    swapped_as_expected,
    with_hook,
)
from tolerances import EXACT
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deploynorm import layers


class NamedNorm(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class OwnForwardReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def in_place_beside_it(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.c(x))
    m.r(y)
    return y + 1


def second_call(other: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The normalization and its ReLU, and then one of the two in another way."""
    return lambda m, x: m.r(m.b(m.c(x))) + other(m, m.c(x))


def pooled(m: Any, x: Tensor) -> Tensor:
    return m.r(m.b(m.c(F.adaptive_avg_pool2d(x, 1))))


def only_if(condition: bool, m: Any, x: Tensor) -> Tensor:
    y = m.b(m.c(x))
    return m.r(y) if condition else y


TAKEN = {"b": "FRN2d with TLU", "r": "Identity"}
KEPT = {"b": "FRN2d", "r": "="}
IN_CHAIN = {"1": "FRN2d with TLU", "2": "Identity"}
BESIDE = {"1": "FRN2d", "2": "="}
"""What becomes of the normalization and the ReLU of a `net`, and of a `chain`."""

TO_FRN = [
    Case("own_relu", chain(nn.ReLU()), IN_CHAIN),
    Case("own_relu_in_place", chain(nn.ReLU(inplace=True)), IN_CHAIN),
    Case("no_relu", chain(), {"1": "FRN2d"}, "read by the network's output"),
    Case("relu6", chain(nn.ReLU6()), {"1": "FRN2d"}, "read by hardtanh"),
    Case("silu", chain(nn.SiLU()), {"1": "FRN2d"}, "read by silu"),
    Case("leaky_relu", chain(nn.LeakyReLU()), {"1": "FRN2d"}, "read by leaky_relu"),
    Case("relu_after_silu", chain(nn.SiLU(), nn.ReLU()), {"1": "FRN2d", "3": "="}, "it reads silu"),
    Case("dropout_between", chain(nn.Dropout(), nn.ReLU()), {"1": "FRN2d", "3": "="}, "it reads dropout"),
    Case("pool_between", chain(nn.MaxPool2d(2), nn.ReLU()), {"1": "FRN2d", "3": "="}, "it reads max_pool2d"),
    Case("functional", net(lambda m, x: F.relu(m.b(m.c(x)))), {"b": "FRN2d"}, "a functional call"),
    Case("functional_in_place", net(lambda m, x: F.relu_(m.b(m.c(x)))), {"b": "FRN2d"}, "a functional call"),
    Case("method", net(lambda m, x: m.b(m.c(x)).relu()), {"b": "FRN2d"}, "a functional call"),
    Case("clamp", net(lambda m, x: m.b(m.c(x)).clamp(min=0)), {"b": "FRN2d"}, "read by clamp"),
    Case("read_twice", net(lambda m, x: m.r(y := m.b(m.c(x))) + y, r=nn.ReLU), KEPT, "is read by add too"),
    Case("read_by_others_in_place", net(in_place_beside_it, r=in_place), KEPT, "changes in place"),
    Case(
        "given_back_too", net(lambda m, x: (m.r(y := m.b(m.c(x))), y), r=nn.ReLU), KEPT, "by the network's output too"
    ),
    Case(
        "one_relu_for_two_norms",
        net(lambda m, x: m.r(m.d(m.r(m.b(m.c(x))))), r=nn.ReLU, d=norm),
        {**TAKEN, "d": "FRN2d with TLU"},
    ),
    Case("relu_elsewhere_too", net(second_call(lambda m, y: m.r(y)), r=nn.ReLU), KEPT, "once it reads conv2d"),
    Case("norm_elsewhere_too", net(second_call(lambda m, y: m.b(y)), r=nn.ReLU), KEPT, "called elsewhere without it"),
    Case("norm_with_a_functional_too", net(second_call(lambda m, y: F.relu(m.b(y))), r=nn.ReLU), KEPT, "elsewhere"),
    Case("both_twice", net(second_call(lambda m, y: m.r(m.b(y))), r=nn.ReLU), TAKEN),
    Case(
        "two_relus_for_one_norm",
        net(second_call(lambda m, y: m.q(m.b(y))), r=nn.ReLU, q=nn.ReLU),
        {**TAKEN, "q": "Identity"},
    ),
    Case(
        "one_of_two_relus_stays",
        net(lambda m, x: m.r(m.b(y := m.c(x))) + m.q(m.b(y)) + m.q(y), r=nn.ReLU, q=nn.ReLU),
        {**KEPT, "q": "="},
        "called elsewhere without it",
    ),
    Case("after_an_addition", net(lambda m, x: m.r(m.b(y := m.c(x)) + y), r=nn.ReLU), KEPT, "it reads add"),
    Case("after_an_addition_in_place", net(lambda m, x: m.r(m.b(m.c(x)).add_(1)), r=in_place), KEPT, "it reads add"),
    Case(
        "residual_with_one_relu",
        Residual,
        {"bn1": "FRN2d", "bn2": "FRN2d", "shortcut.1": "FRN2d", "relu": "="},
        "it is called 2 times, and once it reads add",
    ),
    Case(
        "residual_with_two_relus",
        lambda: Residual(own_relus=True),
        {"bn1": "FRN2d with TLU", "relu": "Identity", "bn2": "FRN2d", "shortcut.1": "FRN2d", "last": "="},
        "read by add",
    ),
    Case("training_alone", net(lambda m, x: only_if(m.training, m, x), r=nn.ReLU), KEPT, "called elsewhere without it"),
    Case(
        "not_traceable",
        net(lambda m, x: m.r(m.b(m.c(x))) if x.sum() > -1e9 else x, r=nn.ReLU),
        KEPT,
        "it cannot be traced in evaluation mode",
    ),
    Case(
        "by_batch_size",
        net(lambda m, x: only_if(len(x) < 4, m, x), r=nn.ReLU),
        KEPT,
        "branch on the batch size (axis 0 of x: 2 alone)",
    ),
    Case(
        "by_batch_size_as_a_symbol",
        net(lambda m, x: only_if(x.shape[0] < 4, m, x), r=nn.ReLU),
        KEPT,
        "axis 0 of x: 1 to 3",
    ),
    Case("batch_of_one", chain(nn.ReLU()), IN_CHAIN, shape=(1, 3, 8, 6)),
    Case("forward_of_relu_called", net(lambda m, x: m.r.forward(m.b(m.c(x))), r=nn.ReLU), KEPT, "a functional call"),
    Case("forward_called_too", net(second_call(lambda m, y: m.r.forward(y)), r=nn.ReLU), KEPT, "called directly"),
    Case(
        "forward_of_norm_called", net(lambda m, x: m.r(m.b.forward(m.c(x))), r=nn.ReLU), {"b": "=", "r": "="}, "outside"
    ),
    Case(
        "gamma_read_elsewhere",
        net(lambda m, x: m.r(m.b(m.c(x))) * m.b.weight.mean(), r=nn.ReLU),
        {"b": "=", "r": "="},
        "outside its own forward, by mean",
    ),
    Case("hook_on_relu", lambda: with_hook(chain(nn.ReLU())(), "2"), BESIDE, "it has hooks"),
    Case("hook_on_norm", lambda: with_hook(chain(nn.ReLU())(), "1"), {"1": "=", "2": "="}, "it has hooks"),
    Case("relu_of_its_own_kind", chain(OwnForwardReLU()), BESIDE, "may do more than a ReLU"),
    Case("norm_of_its_own_kind", chain(nn.ReLU(), norm=OwnForwardNorm), {"1": "=", "2": "="}, "forward of its own"),
    Case("norm_of_another_name", chain(nn.ReLU(), norm=NamedNorm), IN_CHAIN),
    Case(
        "parametrized_norm",
        lambda: Forward(
            lambda m, x: m.b(m.c(x)), c=conv(), b=parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None)
        ),
        {"b": "="},
        "parametrized",
    ),
    Case("group_norm_stays", chain(nn.GroupNorm(2, 4), nn.ReLU()), {"1": "FRN2d", "2": "=", "3": "="}, "no batch norm"),
    Case("frozen_stays", chain(FrozenBatchNorm2d(4), nn.ReLU()), {"1": "FRN2d", "2": "=", "3": "="}, "it is frozen"),
    Case("synchronised", chain(nn.ReLU(), norm=nn.SyncBatchNorm), IN_CHAIN),
    Case(
        "not_affine",
        sequence(conv(), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
        IN_CHAIN,
        "gamma and beta are new",
    ),
    Case(
        "no_running_statistics",
        sequence(conv(), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
        IN_CHAIN,
    ),
    Case(
        "pre_activation",
        sequence(nn.BatchNorm2d(3), nn.ReLU(), conv()),
        {"0": "FRN2d with TLU", "1": "Identity"},
    ),
    Case("map_of_one_value", net(pooled, r=nn.ReLU), TAKEN, "maps of one value, so epsilon is learned", learned=True),
    Case("map_of_one_value_with_its_epsilon_given", net(pooled, r=nn.ReLU), TAKEN, options={"learned_eps": None}),
    Case(
        "vectors",
        sequence(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()),
        {"1": "FRN1d with TLU", "2": "Identity"},
        "so epsilon is learned",
        (4, 5),
        learned=True,
    ),
    Case(
        "one_axis",
        sequence(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()),
        {"1": "FRN1d with TLU", "2": "Identity"},
        shape=(2, 3, 8),
    ),
    *(
        Case(
            name,
            sequence(nn.Conv3d(3, 4, 3), norm(4), nn.ReLU()),
            {"1": "FRN3d with TLU", "2": "Identity"},
            shape=(2, 3, 5, 6, 7),
        )
        for name, norm in (("three_axes", nn.BatchNorm3d), ("synchronised_of_three_axes", nn.SyncBatchNorm))
    ),
    Case("the_norm_alone", lambda: nn.BatchNorm2d(3), {"": "FRN2d"}),
    Case("never_called", net(lambda m, x: m.b(m.c(x)), d=norm, r=nn.ReLU), {**KEPT, "d": "FRN2d"}, "is not reached"),
    Case(
        "graph_module",
        lambda: torch.fx.symbolic_trace(net(lambda m, x: m.r(m.d(F.relu(m.b(m.c(x))))), d=norm, r=nn.ReLU)()),
        {"b": "FRN2d", "d": "FRN2d with TLU", "r": "Identity"},
        "a functional call",
    ),
    Case("none_asked_for", chain(nn.ReLU()), BESIDE, "no thresholds", options={"thresholds": "none"}),
    Case(
        "all_asked_for",
        lambda: Residual(own_relus=True),
        {"bn1": "FRN2d with TLU", "relu": "Identity", "bn2": "FRN2d", "shortcut.1": "FRN2d", "last": "TLU"},
        options={"thresholds": "all"},
    ),
    Case(
        "all_but_in_two_places",
        Residual,
        {"bn1": "FRN2d", "bn2": "FRN2d", "shortcut.1": "FRN2d", "relu": "="},
        "it is called 2 times",
        options={"thresholds": "all"},
    ),
    Case(
        "all_but_read_by_others",
        net(lambda m, x: (m.r(y := m.b(m.c(x)) + 1), y), r=in_place),
        KEPT,
        "changes in place",
        options={"thresholds": "all"},
    ),
    Case(
        "all_but_behind_a_convolution",
        net(lambda m, x: m.r(m.d(m.b(m.c(x)))), d=lambda: conv(4), r=nn.ReLU),
        KEPT,
        "it reads conv2d",
        options={"thresholds": "all"},
    ),
]


def without_thresholds(network: nn.Module, case: Case) -> nn.Module:
    """The network with an FRN of no threshold for each normalization that the case swaps, and nothing else changed."""
    memo: dict[int, Any] = {}
    for path, became in case.became.items():
        if became.startswith("FRN"):
            norm = network.get_submodule(path)
            frn = getattr(layers, became.split()[0])(
                norm.num_features, learned_eps="layer" if case.learned else None, tlu=False
            )
            if norm.affine:
                frn.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=not case.learned)
            memo[id(norm)] = frn
    return copy.deepcopy(network, memo)


@pytest.mark.parametrize("case", TO_FRN, ids=str)
def test_frn_takes_in_the_relus_that_are_its_own(case: Case) -> None:
    """At its start, with every tau at 0, the network computes what it would with all its activations in place."""
    network, x = drawn(case)
    swapped, naive = swapped_as_expected(network, x, case, "frn"), without_thresholds(network, case)
    for training in (False, True):
        found = []
        for candidate in (swapped, naive):
            torch.manual_seed(1)
            found.append(leaves(candidate.train(training)(x.clone())))
        assert found[0]
        torch.testing.assert_close(*found, **EXACT.kwargs())
