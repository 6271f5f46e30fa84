"""Folding over a table of named networks, those that must not fold among them."""

from __future__ import annotations

import copy
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from swap_networks import Forward, OwnForwardConv, with_hook
from tolerances import EXACT, FLOAT64, FOLD_FLOAT32, Tolerance
from torch import Tensor, nn

from deploynorm._fold import FoldReport, fold
from deploynorm.errors import InputError
from deploynorm.layers import (
    TLU,
    CenConv1d,
    CenConv2d,
    CenConv3d,
    CenConvTranspose2d,
    FRN1d,
    FRN2d,
    MABN1d,
    MABN2d,
    MABN3d,
)


class OwnForwardMABN(MABN2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class PaddedConv(nn.Conv2d):
    """As timm's layers for "same" padding: the padding depends on the size of the input."""

    def forward(self, input: Tensor) -> Tensor:
        padding = input.shape[-1] % 3
        return F.conv2d(F.pad(input, (padding, padding)), self.used(), self.bias)

    def used(self) -> Tensor:
        return self.weight


class PaddedStdConv(PaddedConv):
    def used(self) -> Tensor:
        return self.weight / self.weight.norm()


class Tied(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 3, padding=1), MABN2d(3), nn.Conv2d(3, 3, 3, padding=1), MABN2d(3))
        self[2].weight = self[0].weight


class Deeper(nn.Module):
    """A convolution in one module and its normalization in another, defined in the opposite order of use."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"late": MABN2d(4), "early": nn.BatchNorm2d(6)})
        self.body = nn.Module()
        self.body.last = CenConv2d(6, 4, 3)
        self.body.first = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms["early"](self.body.first(x)))
        return self.norms["late"](self.body.last(x))


@dataclass(frozen=True)
class Case:
    """A network, the shape of its input, and what must become of its layers."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 9, 7)
    folded: int = 0
    affine: int = 0
    stays: int = 0
    reason: str = ""

    def __str__(self) -> str:
        return self.name


def pair(conv: type[nn.Module], norm: type[nn.Module], *sizes: int, **options: object) -> Callable[[], nn.Module]:
    """A convolution, or linear layer, of these sizes and options, and a normalization of its output."""
    return lambda: nn.Sequential(conv(*sizes, **options), norm(sizes[1]))


def _conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3)


def _cenconv() -> nn.Module:
    return CenConv2d(3, 4, 3)


def _mabn() -> nn.Module:
    return MABN2d(4)


def _bn() -> nn.Module:
    return nn.BatchNorm2d(4)


def net(
    forward: Callable[..., Tensor] = lambda m, x: m.n(m.c(x)),
    c: Callable[[], nn.Module] = _conv,
    n: Callable[[], nn.Module] = _mabn,
    **more: Callable[[], nn.Module],
) -> Callable[[], nn.Module]:
    """`forward` over a convolution c, a normalization n behind it, and `more`."""
    return lambda: Forward(forward, c=c(), n=n(), **{name: build() for name, build in more.items()})


OF_4 = (2, 4, 9, 7)
"""A shape for convolutions of 4 channels."""

FOLDS = [
    Case("conv_mabn", pair(nn.Conv2d, MABN2d, 3, 8, 3), folded=1),
    Case("cenconv_mabn", pair(CenConv2d, MABN2d, 4, 8, 3), OF_4, folded=2),
    Case("no_bias", pair(CenConv2d, MABN2d, 4, 8, 3, bias=False), OF_4, folded=2),
    Case("groups", pair(CenConv2d, MABN2d, 4, 8, 3, groups=2), OF_4, folded=2),
    Case("depthwise", pair(CenConv2d, MABN2d, 4, 8, 3, groups=4), OF_4, folded=2),
    Case("stride_dilation", pair(CenConv2d, MABN2d, 4, 8, 3, stride=2, dilation=2, padding=2), OF_4, folded=2),
    Case("padding_same", pair(CenConv2d, MABN2d, 4, 8, 3, padding="same"), OF_4, folded=2),
    Case("padding_reflect", pair(CenConv2d, MABN2d, 4, 8, 3, padding=1, padding_mode="reflect"), OF_4, folded=2),
    Case("padding_circular", pair(CenConv2d, MABN2d, 4, 8, 3, padding=1, padding_mode="circular"), OF_4, folded=2),
    Case("not_affine", lambda: nn.Sequential(CenConv2d(3, 8, 3), MABN2d(8, affine=False)), folded=2),
    Case("conv_bn", pair(nn.Conv2d, nn.BatchNorm2d, 3, 8, 3), folded=1),
    Case("conv1d", pair(CenConv1d, MABN1d, 3, 8, 3), (2, 3, 9), folded=2),
    Case("conv3d", pair(CenConv3d, MABN3d, 3, 8, 3), (2, 3, 5, 6, 7), folded=2),
    Case("transposed", pair(CenConvTranspose2d, MABN2d, 4, 6, 3, stride=2), (2, 4, 5, 4), folded=2),
    Case(
        "transposed_groups",
        pair(CenConvTranspose2d, MABN2d, 4, 6, 3, groups=2, output_padding=1, stride=2),
        (2, 4, 5, 4),
        folded=2,
    ),
    Case("transposed1d", pair(nn.ConvTranspose1d, MABN1d, 4, 6, 3, groups=2), (2, 4, 5), folded=1),
    Case("transposed3d", pair(nn.ConvTranspose3d, MABN3d, 4, 6, 3, groups=2), (2, 4, 3, 4, 5), folded=1),
    Case("linear", pair(nn.Linear, MABN1d, 5, 8), (4, 5), folded=1),
    Case("linear_bn", pair(nn.Linear, nn.BatchNorm1d, 5, 8, bias=False), (4, 5), folded=1),
    Case("other_order_of_definition", Deeper, folded=3),
    Case("one_norm_after_two_convs", net(lambda m, x: m.n(m.c(x)) + m.n(m.b(x)), c=_cenconv, b=_cenconv), folded=3),
    Case("norm_after_norm", lambda: nn.Sequential(_conv(), _bn(), _mabn()), folded=2),
    Case("subclassed_conv_that_is_plain", net(c=lambda: OwnForwardConv(3, 4, 3)), folded=2),
    Case("parametrized_weight", net(c=lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))), folded=2),
    Case("cenconv_alone", _cenconv, folded=1),
    Case("learned_eps", lambda: nn.Sequential(nn.Conv2d(3, 8, 3), FRN2d(8, learned_eps="layer")), folded=1),
    Case("learned_eps_per_channel", lambda: FRN1d(3, learned_eps="channel", tlu=False), (2, 3, 9), folded=1),
]

STAYS = [
    Case("mabn_alone", lambda: MABN2d(3), affine=1, reason="the network's input"),
    Case("mabn_after_add", net(lambda m, x: m.n((y := m.c(x)) + y)), affine=1, reason="the output of add"),
    Case("bn_after_relu", net(lambda m, x: m.n(m.c(x).relu()), n=_bn), stays=1, reason="the output of relu"),
    Case(
        "shared_conv",
        net(lambda m, x: m.n(m.c(x)) + m.b(m.c(x)), c=_cenconv, b=_mabn),
        folded=1,
        affine=2,
        reason="called 2 times",
    ),
    Case(
        "shared_conv_and_norm",
        net(lambda m, x: m.n(m.c(m.n(m.c(x)))), c=lambda: nn.Conv2d(3, 3, 1), n=lambda: nn.BatchNorm2d(3)),
        stays=1,
        reason="called 2 times",
    ),
    Case("conv_bare_once", net(lambda m, x: m.n(m.c(x)) + m.c(x + 1)), affine=1, reason="called 2 times"),
    Case("output_used_twice", net(lambda m, x: m.n(y := m.c(x)) + y), affine=1, reason="used 2 times"),
    Case("functional_conv", net(lambda m, x: m.n(F.conv2d(x, m.c.weight))), affine=1, reason="a functional call"),
    Case(
        "functional_norm",
        net(lambda m, x: F.batch_norm(m.c(x), m.n.running_mean, m.n.running_var), n=_bn),
        stays=1,
        reason="outside its own forward",
    ),
    Case("subclassed_conv", net(c=lambda: PaddedConv(3, 4, 3)), affine=1, reason="forward of its own"),
    Case("subclassed_norm", net(n=lambda: OwnForwardMABN(4))),
    Case("padded_by_size", net(c=lambda: PaddedStdConv(3, 4, 3)), affine=1, reason="computed, not stored"),
    Case("tied_weights", Tied, affine=2, reason="called 2 times"),
    Case("hooked_conv", lambda: with_hook(net()(), "c"), affine=1, reason="has hooks"),
    Case("hooked_norm", lambda: with_hook(net()(), "n"), stays=1, reason="has hooks"),
    Case("hooked_bn", lambda: with_hook(net(n=_bn)(), "n"), stays=1, reason="has hooks"),
    Case(
        "no_running_statistics",
        net(n=lambda: nn.BatchNorm2d(4, track_running_stats=False)),
        stays=1,
        reason="no running statistics",
    ),
    Case(
        "linear_on_the_wrong_axis",
        lambda: nn.Sequential(nn.Linear(5, 8), MABN1d(6)),
        (2, 6, 5),
        affine=1,
        reason="channels on another axis",
    ),
    Case(
        "control_flow_on_values",
        net(lambda m, x: m.n(m.c(x)) if x.sum() > 0 else m.c(x), c=_cenconv),
        folded=1,
        affine=1,
        reason="cannot be traced",
    ),
    Case(
        "control_flow_on_the_batch",
        net(lambda m, x: m.n(m.c(x)) if x.shape[0] < 5 else m.c(x)),
        affine=1,
        reason="branches on sizes",
    ),
    Case(
        "cond",
        net(
            lambda m, x: torch.cond(x.sum() > 0, lambda y: m.n(m.c(y)), lambda y: m.c(y), (x,)),
            c=lambda: nn.Conv2d(3, 4, 1),
        ),
        affine=1,
        reason="outside its own forward|not reached",
    ),
    Case("unused_norm", net(lambda m, x: m.c(x)), affine=1, reason="not reached"),
    Case("gamma_read_elsewhere", net(lambda m, x: m.n(m.c(x)) * m.n.weight.mean()), affine=1, reason="by mean"),
    Case("bias_read_elsewhere", net(lambda m, x: m.n(m.c(x)) * m.c.bias.mean()), affine=1, reason="too, by mean"),
    Case("frn_alone", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), FRN2d(4), TLU(4))),
    Case("nothing_to_fold", lambda: nn.Conv2d(3, 4, 3)),
]


def trained(case: Case) -> nn.Module:
    """The case's network with parameters and statistics as after training: none of them at a neutral value."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    network = case.build()
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (MABN1d, MABN2d, MABN3d, nn.BatchNorm1d, nn.BatchNorm2d, FRN1d, FRN2d)):
                nn.init.uniform_(parameter, 0.5, 1.5) if name == "weight" else nn.init.normal_(parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_var":
                nn.init.uniform_(buffer, 0.2, 3.0)
            if name == "running_mean":
                nn.init.normal_(buffer)
    return network


EVERY_CASE = pytest.mark.parametrize("case", FOLDS + STAYS, ids=str)
WHERE_ALL_FOLDS = pytest.mark.parametrize("case", FOLDS, ids=str)


class Folded(NamedTuple):
    """A case's network, folded once for all tests of the case.

    Attributes:
        network: The one given, in training mode.
        copy: A copy from before the fold.
        x: The example input.
        model: The folded network.
        report: What the fold reported.
    """

    network: nn.Module
    copy: nn.Module
    x: Tensor
    model: nn.Module
    report: FoldReport


@cache
def fold_of(case: Case, dtype: torch.dtype = torch.float64) -> Folded:
    network = trained(case).to(dtype).train()
    before, x = copy.deepcopy(network), torch.randn(case.shape, dtype=dtype)
    return Folded(network, before, x, *fold(network, (x,)))


def _outputs_agree(done: Folded, tolerance: Tolerance) -> None:
    with torch.no_grad():
        truth = copy.deepcopy(done.copy).double().eval()(done.x.double())
        scale = float(truth.abs().max())
        torch.testing.assert_close(done.model(done.x).double() / scale, truth / scale, **tolerance.kwargs())


@EVERY_CASE
def test_folded_network_computes_the_same_in_float64(case: Case) -> None:
    _outputs_agree(fold_of(case), FLOAT64)


@WHERE_ALL_FOLDS
def test_folded_network_computes_the_same_in_float32(case: Case) -> None:
    _outputs_agree(fold_of(case, torch.float32), FOLD_FLOAT32)


@EVERY_CASE
def test_report_says_what_became_of_each_layer(case: Case) -> None:
    report = fold_of(case).report
    outcomes = Counter(change.outcome for change in report.changes)
    assert outcomes == Counter({"folded": case.folded, "affine": case.affine, "not foldable": case.stays}) + Counter()
    reasons = [change.detail for change in report.changes if change.outcome != "folded"]
    assert all(any(part in detail for part in case.reason.split("|")) for detail in reasons), reasons
    became = dict(fold_of(case).model.named_modules())
    for change in report.changes:
        assert type(became[change.name]).__name__ == (change.became or change.kind), change


@WHERE_ALL_FOLDS
def test_nothing_of_mabn_or_cenconv_is_left_where_all_folds(case: Case) -> None:
    ours = (MABN1d, MABN2d, MABN3d, CenConv1d, CenConv2d, CenConv3d, CenConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d)
    assert not [type(module).__name__ for module in fold_of(case).model.modules() if isinstance(module, ours)]
    assert fold_of(case).report.modified


@EVERY_CASE
def test_second_fold_changes_nothing(case: Case) -> None:
    once = fold_of(case).model
    twice, report = fold(once, (fold_of(case).x,))
    assert not report.modified, report.changes
    assert repr(twice) == repr(once)
    torch.testing.assert_close(twice.state_dict(), once.state_dict(), **EXACT.kwargs())


@EVERY_CASE
def test_network_given_is_left_untouched(case: Case) -> None:
    network, before, *_ = fold_of(case)
    assert network.training
    assert repr(network) == repr(before)
    assert [p.requires_grad for p in network.parameters()] == [p.requires_grad for p in before.parameters()]
    torch.testing.assert_close(network.state_dict(), before.state_dict(), **EXACT.kwargs())


def test_network_in_training_mode_folds_as_in_evaluation() -> None:
    network, x = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4), nn.Dropout(0.5)).train(), torch.randn(2, 3, 9, 7)
    folded, report = fold(network, (x,))
    assert len(report.with_outcome("folded")) == 2
    assert not any(module.training for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), network.eval()(x), **FOLD_FLOAT32.kwargs())


def test_fold_keeps_the_plain_convolution_where_it_stood_and_names_layers_by_path() -> None:
    folded, report = fold(Deeper().eval(), torch.randn(2, 3, 9, 7))  # a bare tensor is the one input
    assert type(folded.body.last) is nn.Conv2d
    assert type(folded.norms["late"]) is nn.Identity
    assert folded.body.last.extra_repr() == nn.Conv2d(6, 4, 3).extra_repr()
    assert {change.name: change.detail for change in report.changes} == {
        "norms.late": "into body.last",
        "norms.early": "into body.first",
        "body.last": "weight centred, now Conv2d",
    }
    assert report.found == Counter(MABN2d=1, BatchNorm2d=1, CenConv2d=1)


def test_report_reads_and_serialises() -> None:
    network = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4), nn.ReLU(), MABN2d(4), FRN2d(4), nn.BatchNorm2d(4))
    _, report = fold(network, (torch.randn(2, 3, 9, 7),))

    def lines(text: str) -> list[str]:
        return [" ".join(line.split()) for line in text.splitlines() if line]

    counts = [
        "Layers",
        "layer found folded kept as affine not foldable unchanged",
        "BatchNorm2d 1 - - 1 -",
        "CenConv2d 1 1 - - -",
        "FRN2d 1 - - - 1",
        "MABN2d 2 1 1 - -",
    ]
    stays = [
        "3 MABN2d affine it normalizes the output of relu, not that of a convolution or linear layer",
        "5 BatchNorm2d not foldable it normalizes the output of filter_response_norm, "
        "not that of a convolution or linear layer",
    ]
    columns = "layer class outcome detail"
    assert lines(str(report)) == [*counts, "Layers that did not fold, and why", columns, *stays]
    folded = ["0 CenConv2d folded weight centred, now Conv2d", "1 MABN2d folded into 0"]
    assert lines(report.tables(verbose=True)) == [*counts, "Each layer", columns, *folded, *stays]
    assert json.loads(json.dumps(report.to_dict()))["changes"][1] == {
        "name": "1", "kind": "MABN2d", "outcome": "folded", "became": "Identity", "detail": "into 0",
    }  # fmt: skip
    assert str(fold(nn.ReLU(), torch.randn(2, 3)).report).startswith("Layers: none that can be folded")


@pytest.mark.parametrize(("inputs", "problem"), [((), "no example inputs"), (([1, 2],), "input 0 is not a tensor")])
def test_inputs_that_are_no_tensors_are_refused(inputs: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        fold(Deeper(), inputs)


def test_network_that_branches_on_a_size_folds_once_that_size_is_fixed() -> None:
    case = next(case for case in STAYS if case.name == "control_flow_on_the_batch")
    network, x = trained(case).eval(), torch.randn(case.shape)
    folded, report = fold(network, (x,), dynamic="spatial")
    assert [change.outcome for change in report.changes] == ["folded"]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), network(x), **FOLD_FLOAT32.kwargs())


def test_shared_layer_stays_one_object() -> None:
    conv = CenConv2d(3, 3, 3, padding=1)
    folded, _ = fold(nn.Sequential(conv, nn.ReLU(), conv), (torch.randn(2, 3, 5, 5),))
    assert folded[0] is folded[2]
    assert type(folded[0]) is nn.Conv2d


def test_fold_into_half_precision_weights_refuses_to_overflow() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), MABN2d(4))
    nn.init.constant_(network[0].weight, 60000.0)
    nn.init.constant_(network[1].running_var, 1e-3)
    _, report = fold(network.half(), (torch.randn(2, 3, 5, 5).half(),))
    assert [change.outcome for change in report.changes] == ["affine"]
    assert "overflows torch.float16" in report.changes[0].detail


@pytest.mark.parametrize("name", ["cenconv_mabn", "norm_after_norm"])
def test_half_precision_network_folds_in_float64_and_is_rounded_once(name: str) -> None:
    """Computed in float16 the scale alone would carry 1e-3 of error; rounded once, half an ulp of the weight."""
    case = next(case for case in FOLDS if case.name == name)
    network = trained(case).eval().half()
    folded, _ = fold(network, torch.randn(case.shape).half())
    conv, *norms = network
    weight = conv.weight.double()
    if isinstance(conv, CenConv2d):
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
    scales = [norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt() for norm in norms]
    assert torch.equal(folded[0].weight, (weight * math.prod(scales)[:, None, None, None]).half())
