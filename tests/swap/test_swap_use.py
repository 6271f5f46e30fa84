"""What is done with a swapped network, what swap refuses, and what its report says."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from swap_networks import Forward, FrozenBatchNorm2d, Residual, chain, conv, with_hook
from tolerances import EXACT
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import deploynorm
from deploynorm._fold import FoldResult
from deploynorm._swap import swap
from deploynorm.contract import ADD_OP_TYPE, OP_TYPE
from deploynorm.errors import InputError, ModelError
from deploynorm.layers import FRN2d, MABN2d
from deploynorm.run.eager import EagerRunner
from deploynorm.run.reference import ReferenceRunner

X = torch.randn(4, 3, 8, 6, generator=torch.Generator().manual_seed(0))
BOTH = pytest.mark.parametrize("norm", ["frn", "mabn"])

Norm = Literal["frn", "mabn"]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    stem = conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
    block = Residual(own_relus=True)
    block.conv1, block.shortcut[0] = conv(4, 4), conv(4, 4, 1)
    return nn.Sequential(*stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


@cache
def _swapped(norm: Norm) -> nn.Module:
    return swap(classifier().train(), (X,), norm=norm).model


def swapped_classifier(norm: Norm) -> nn.Module:
    return copy.deepcopy(_swapped(norm))


@cache
def trained_and_folded(norm: Norm) -> tuple[nn.Module, FoldResult]:
    """The swapped classifier with thresholds and statistics as training leaves them, and what fold makes of it."""
    network = swapped_classifier(norm)
    torch.manual_seed(1)
    for layer in network.modules():
        if getattr(layer, "tau", None) is not None:
            nn.init.normal_(layer.tau, std=0.3)
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.randn_like(X))
    return network.eval(), deploynorm.fold(network, (X,))


@BOTH
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_training_lowers_the_loss_and_moves_every_parameter(norm: Norm, layout: torch.memory_format) -> None:
    network = swapped_classifier(norm).to(memory_format=layout)
    assert network.training
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(X.to(memory_format=layout)), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not [name for name, parameter in network.named_parameters() if torch.equal(parameter, before[name])]
    assert ("0.tau" in before, "1.tau" in before) == (False, norm == "frn")


@BOTH
def test_it_exports_to_the_same_numbers(norm: Norm) -> None:
    network, (folded, report) = trained_and_folded(norm)
    assert {change.outcome for change in report.changes} == ({"folded"} if norm == "mabn" else set())
    exported = deploynorm.export(folded, (X,), dynamic="all")
    operators = [node.op_type for node in exported.to_proto().graph.node]
    counts = [operators.count(op_type) for op_type in (OP_TYPE, ADD_OP_TYPE, "Relu")]
    assert counts == ([3, 1, 0] if norm == "frn" else [0, 0, 3])  # FRN takes the addition and the ReLU behind it
    assert operators.count("Conv") == 4
    assert not {"BatchNormalization", "Mul", "Sub"} & set(operators)
    samples = deploynorm.sample_inputs(exported.inputs, seed=0, base={exported.inputs[0].name: tuple(X.shape)})
    with ReferenceRunner(exported.to_proto()) as candidate:
        truth = EagerRunner(network, exported.inputs, dtype=torch.float64)
        deploynorm.check(candidate, truth, samples).raise_if_broken()


@BOTH
def test_it_pickles_and_swaps_again_to_nothing(norm: Norm) -> None:
    network, _ = trained_and_folded(norm)
    torch.testing.assert_close(pickle.loads(pickle.dumps(network))(X), network(X), **EXACT.kwargs())
    with pytest.raises(ModelError, match="has no batch normalization"):
        swap(network, (X,), norm=norm)


@BOTH
def test_keep_carries_every_weight_over(norm: Norm) -> None:
    network = classifier()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network[1].weight.requires_grad_(False)
    network[3].bn1.eval()
    given = dict(network.named_parameters())
    swapped = swap(network, (X,), norm=norm).model
    found = dict(swapped.named_parameters())
    assert {name for name in found if not name.endswith("tau")} == set(given)
    for name, parameter in given.items():
        assert found[name] is not parameter
        assert found[name].requires_grad == parameter.requires_grad
        torch.testing.assert_close(found[name], parameter, **EXACT.kwargs())
    assert [swapped.training, swapped[1].training, swapped[3].bn1.training] == [True, True, False]


@BOTH
def test_reset_draws_every_weight_anew(norm: Norm) -> None:
    network = chain(nn.ReLU(), conv(4))()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 7)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(swap(network, (X,), norm=norm, weights="reset").model.state_dict())
    assert not [name for name, value in found[0].items() if (value == 7).any()]
    assert (found[0]["1.weight"] == 1).all()
    torch.testing.assert_close(found[0], found[1], **EXACT.kwargs())
    assert not any(torch.equal(found[0][name], found[2][name]) for name in ("0.weight", "0.bias", "3.weight"))
    assert all((parameter == 7).all() for parameter in network.parameters())


def test_reset_names_what_no_layer_knows_how_to_draw() -> None:
    network = nn.Sequential(conv(), nn.BatchNorm2d(4), parametrizations.weight_norm(conv(4)))
    network.scale = nn.Parameter(torch.ones(4))
    notes = swap(network, (X,), norm="frn", weights="reset").report.notes
    assert notes == ("not reset, because no reset_parameters of a layer draws them: scale, 2.bias, "
                     "2.parametrizations.weight.original0, 2.parametrizations.weight.original1",)  # fmt: skip


def test_shared_layers_and_parameters_stay_shared() -> None:
    network = Forward(lambda m, x: m.d(m.e(m.r(m.b(m.c(x))))), **dict(zip("cbr", chain(nn.ReLU())(), strict=True)))
    network.d, network.e = conv(4), conv(4)
    network.d.weight = network.e.weight
    network.again, network.listed = network.b, [network.b, network.r]
    swapped = swap(network, (X,), norm="frn").model
    assert swapped.again is swapped.b is swapped.listed[0]
    assert type(swapped.listed[1]) is nn.Identity
    assert swapped.d.weight is swapped.e.weight is not network.d.weight


@pytest.mark.parametrize(
    ("norm", "dtype"), [("frn", torch.float64), ("frn", torch.float16), ("mabn", torch.bfloat16)], ids=str
)
def test_dtype_is_that_of_the_network(norm: Norm, dtype: torch.dtype) -> None:
    not_affine = nn.BatchNorm2d(4, affine=False)
    network = nn.Sequential(conv(), not_affine, nn.ReLU(), conv(4), nn.BatchNorm2d(4), nn.SiLU()).to(dtype)
    swapped = swap(network, (X.to(dtype),), norm=norm).model
    assert {parameter.dtype for parameter in swapped.parameters()} == {dtype}
    assert swapped(X.to(dtype)).dtype == dtype


def timm_network(timm: ModuleType, **options: Any) -> nn.Module:
    return nn.Sequential(conv(), timm.layers.BatchNormAct2d(4, **options), conv(4))


@pytest.mark.parametrize(
    ("options", "frn", "mabn"),
    [
        ({}, "FRN2d with TLU", ["norm", "act"]),
        ({"inplace": False}, "FRN2d with TLU", ["norm", "act"]),
        ({"act_layer": nn.SiLU}, "FRN2d", ["norm", "act"]),
        ({"apply_act": False}, "FRN2d", []),
    ],
    ids=["relu", "out_of_place", "silu", "no_activation"],
)
def test_batch_norm_act_of_timm(timm: ModuleType, options: dict[str, Any], frn: str, mabn: list[str]) -> None:
    network = timm_network(timm, **options)
    nn.init.normal_(network[1].weight)
    nn.init.normal_(network[1].bias)
    swapped, report = swap(network, (X,), norm="frn")
    assert {change.name: change.became for change in report.changes if "Norm" in change.kind} == {"1": frn}
    plain = FRN2d(4, tlu=False)
    plain.load_state_dict({name: getattr(network[1], name) for name in ("weight", "bias")})
    naive = nn.Sequential(network[0], plain, copy.deepcopy(network[1].act), network[2])
    torch.testing.assert_close(swapped(X), naive(X), **EXACT.kwargs())
    if "with TLU" in frn:
        assert isinstance(swapped[1], FRN2d)

    layer = swap(network, (X,), norm="mabn").model[1]
    assert [name for name, _ in layer.named_children()] == mabn
    assert isinstance(layer.norm if mabn else layer, MABN2d)


def test_dropout_inside_timm_s_layer_stays_between(timm: ModuleType) -> None:
    network = timm_network(timm, drop_layer=nn.Dropout2d)
    network[1].drop.p = 0.25
    swapped, report = swap(network, (X,), norm="frn")
    assert [type(layer) for layer in swapped[1]] == [FRN2d, nn.Dropout2d, nn.ReLU]
    assert "it reads feature_dropout" in str(report.changes)


def test_subclass_of_timm_s_layer_is_refused(timm: ModuleType) -> None:
    class Doubled(timm.layers.BatchNormAct2d):  # type: ignore[misc, name-defined]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    network = nn.Sequential(conv(), Doubled(4), nn.BatchNorm2d(4))
    swapped, report = swap(network, (X,), norm="frn")
    assert type(swapped[1]) is Doubled
    assert report.with_outcome("unchanged")[0].detail == "a Doubled with a forward of its own"


def scripted() -> nn.Module:
    with pytest.warns(DeprecationWarning, match="jit"):
        return torch.jit.script(chain()())


def not_copyable() -> nn.Module:
    network = chain()()
    network.held = (item for item in ())
    return network


ARGUMENTS = [
    ({"norm": "bn"}, "unknown norm. Got 'bn'; expected 'frn' or 'mabn'"),
    ({"norm": "FRN"}, "unknown norm"),
    ({"norm": "frn", "thresholds": "some"}, "unknown thresholds. Got 'some'; expected 'own' or 'all' or 'none'"),
    ({"norm": "frn", "weights": "copy"}, "unknown weights. Got 'copy'; expected 'keep' or 'reset'"),
    ({"norm": "mabn", "thresholds": "all"}, "only FRN has thresholds"),
    ({"norm": "frn", "momentum": 0.1}, "FRN2d does not take these options"),
    ({"norm": "mabn", "learned_eps": "layer"}, "MABN2d does not take these options"),
    ({"norm": "frn", "tlu": False}, "tlu of a layer follows from the network"),
    ({"norm": "mabn", "num_features": 4}, "num_features of a layer follows from the network"),
    ({"norm": "frn", "eps": -1.0}, "eps"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=[message[:30] for _, message in ARGUMENTS])
def test_wrong_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        swap(chain()(), (X,), **arguments)


def test_norm_must_be_named() -> None:
    with pytest.raises(TypeError, match="norm"):
        swap(chain()(), (X,))  # type: ignore[call-arg]


NETWORKS: list[tuple[Callable[[], nn.Module], tuple[Any, ...], type[Exception], str]] = [
    (lambda: nn.Sequential(conv(), nn.ReLU()), (X,), ModelError, "Got no normalization at all"),
    (lambda: nn.Sequential(conv(), nn.GroupNorm(2, 4)), (X,), ModelError, "Got 1 GroupNorm"),
    (lambda: nn.Sequential(conv(), FrozenBatchNorm2d(4)), (X,), ModelError, "Got 1 FrozenBatchNorm2d"),
    (lambda: nn.Sequential(conv(), nn.LazyBatchNorm2d()), (X,), ModelError, "run it once"),
    (scripted, (X,), ModelError, "compiled or scripted"),
    (lambda: torch.compile(chain()(), backend="eager"), (X,), ModelError, "swap first, compile afterwards"),
    (lambda: nn.DataParallel(chain()()), (X,), ModelError, "the network is wrapped. Got DataParallel. Fix: swap the"),
    (lambda: AveragedModel(chain()()), (), ModelError, "the network is wrapped. Got AveragedModel"),
    (lambda: nn.Sequential(nn.DataParallel(chain()())), (X,), ModelError, "the network is wrapped. Got DataParallel."),
    (not_copyable, (X,), ModelError, "cannot be copied"),
    (chain(), ([1, 2],), InputError, "example input 0 is not a tensor"),
    (chain(), (X[:, :2],), ModelError, "does not run on the example inputs"),
    (chain(), (), InputError, "there are no example inputs"),
    (chain(), (X, X), ModelError, "inputs of shape (4, 3, 8, 6), (4, 3, 8, 6)"),
    (lambda: Forward(lambda m, x: 1 / 0, b=nn.BatchNorm2d(4)), (X,), ModelError, "ZeroDivisionError"),
]


@pytest.mark.parametrize(
    ("build", "inputs", "kind", "message"), NETWORKS, ids=[message[:25] for *_, message in NETWORKS]
)
def test_network_that_cannot_be_swapped_is_refused(
    build: Callable[[], nn.Module], inputs: tuple[Any, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        swap(build(), inputs, norm="frn")


@pytest.mark.parametrize(
    ("argument", "value", "reason"), [("eps", 0.0, "eps must be positive, got 0.0"), ("momentum", 2.0, "out of range")]
)
def test_a_normalization_whose_arguments_mabn_does_not_take_stays(argument: str, value: float, reason: str) -> None:
    network = nn.Sequential(conv(), nn.BatchNorm2d(4, **{argument: value}), conv(4), nn.BatchNorm2d(4))
    swapped, report = swap(network, (X,), norm="mabn")
    assert [type(layer).__name__ for layer in swapped] == ["Conv2d", "BatchNorm2d", "CenConv2d", "MABN2d"]
    change = next(change for change in report.changes if change.name == "1")
    assert (change.outcome, reason in change.detail) == ("unchanged", True), change
    swapped, _ = swap(network, (X,), norm="mabn", **{argument: 0.5})
    assert isinstance(swapped[1], MABN2d)
    assert getattr(swapped[1], argument) == 0.5


def fails_in_training(m: Any, x: Tensor) -> Tensor:
    if m.training:
        raise ValueError("no targets")
    return m.r(m.b(m.c(x)))


@BOTH
def test_network_that_does_not_run_in_training_mode_is_swapped_without_proof(norm: Norm) -> None:
    network = Forward(fails_in_training, **dict(zip("cbr", chain(nn.ReLU())(), strict=True)))
    swapped, report = swap(network, (X,), norm=norm)
    assert [type(layer).__name__ for layer in swapped.children()] == ["Conv2d", f"{norm.upper()}2d", "ReLU"]
    assert "it does not run in training mode (ValueError: no targets)" in report.notes[0]


def test_report_reads_and_serialises() -> None:
    network = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4), nn.BatchNorm2d(4), Residual())
    network[5].conv1, network[5].shortcut[0] = conv(4), conv(4, 4, 1)
    with_hook(network, "4")
    report = swap(network, (X,), norm="frn").report
    assert json.loads(json.dumps(report.to_dict()))["changes"][0] == {
        "name": "1", "kind": "BatchNorm2d", "outcome": "absorbed", "became": "FRN2d with TLU", "detail": "takes in 2",
    }  # fmt: skip
    assert report.found == {"BatchNorm2d": 5, "ReLU": 2}
    lines = [" ".join(line.split()) for line in str(report).splitlines() if line]
    assert lines == [
        "Layers",
        "class became outcome count",
        "BatchNorm2d FRN2d with TLU absorbed 1",
        "BatchNorm2d FRN2d partly 1",
        "BatchNorm2d FRN2d swapped 2",
        "BatchNorm2d - unchanged 1",
        "ReLU Identity absorbed 1",
        "ReLU - unchanged 1",
        "Layers that stayed, in whole or in part, and why",
        "layer class became outcome why",
        "4 BatchNorm2d - unchanged it has hooks",
        "5.bn1 BatchNorm2d FRN2d partly the ReLU behind it stays: it is called 2 times, and once it reads add",
        "5.relu ReLU - unchanged it is called 2 times, and once it reads add",
        "note: FRN layers that learn no threshold, because the ReLU behind them stays: 1; "
        "give each normalization an nn.ReLU of its own to have it absorbed",
    ]


def test_like_layers_share_a_row_of_the_report() -> None:
    network = nn.Sequential(
        *(layer for _ in range(3) for layer in (conv(3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.ReLU()))
    )
    text = str(swap(network, (X,), norm="frn").report)
    assert "3 and 2 more" in text
    assert text.count("it reads dropout") == 1


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(InputError, match=r"swap: not a network\. Got str; expected an nn\.Module"):
        swap("model.pt", (X,), norm="frn")  # type: ignore[arg-type]
