"""Which parameters decay, in our networks and in others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from deploynorm.errors import InputError
from deploynorm.layers import TLU, CenConv2d, FRN2d, MABN2d, freeze_mabn, parameter_groups
from deploynorm.models import frn_resnet, mabn_resnet


@pytest.mark.parametrize(
    "make",
    [
        lambda: frn_resnet.resnet20(learned_eps="layer"),
        lambda: frn_resnet.resnet20(learned_eps="channel"),
        lambda: mabn_resnet.resnet20(norm="mabn"),
        lambda: mabn_resnet.resnet20(norm="bn"),
        lambda: mabn_resnet.resnet20(norm="gn"),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 5, 5)), nn.RMSNorm((4, 5, 5))),
    ],
    ids=["frn, eps per layer", "frn, eps per channel", "mabn", "bn", "gn", "norms of several axes"],
)
def test_weights_of_convolutions_and_the_classifier_decay_and_nothing_else_does(make: Callable[[], nn.Module]) -> None:
    model = make()
    decaying, others = parameter_groups(model, 0.01)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    want = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    parameters = list(model.parameters())
    assert [id(p) for p in decaying["params"]] == [id(p) for p in parameters if id(p) in want]
    assert [id(p) for p in others["params"]] == [id(p) for p in parameters if id(p) not in want]


def test_a_bias_of_several_axes_does_not_decay_and_a_shared_weight_stands_once() -> None:
    model = nn.Module()
    model.first = model.second = nn.Linear(3, 2)
    model.bias = nn.Parameter(torch.ones(1, 3, 1, 1))
    decaying, others = parameter_groups(model, 0.01)
    assert [id(p) for p in decaying["params"]] == [id(model.first.weight)]
    assert {id(p) for p in others["params"]} == {id(model.first.bias), id(model.bias)}


def test_an_optimizer_takes_them_and_frozen_parameters_stay_out() -> None:
    model = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4), TLU(4), FRN2d(4))
    freeze_mabn(model)
    groups = parameter_groups(model, 0.5)
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(groups, lr=1.0).step()
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [p is model[0].weight for p in model.parameters()]


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_negative_weight_decay_is_refused(value: float) -> None:
    with pytest.raises(
        InputError, match=r"^parameter_groups: weight_decay is out of range\. Got .*; expected a finite"
    ):
        parameter_groups(nn.Linear(2, 2), value)
