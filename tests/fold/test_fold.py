"""Folding over a table of named networks, those that must not fold among them."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from fold_networks import FOLDS, STAYS, Case, Deeper, trained
from tolerances import EXACT, FLOAT64, FOLD_FLOAT32, Tolerance
from torch import Tensor, nn

from deploynorm._fold import FoldReport, fold
from deploynorm.errors import InputError
from deploynorm.layers import CenConv1d, CenConv2d, CenConv3d, CenConvTranspose2d, FRN2d, MABN1d, MABN2d, MABN3d

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


def test_fold_keeps_the_plain_convolution_where_it_stood() -> None:
    folded, _ = fold(Deeper().eval(), (torch.randn(2, 3, 9, 7),))
    assert type(folded.body.last) is nn.Conv2d
    assert type(folded.norms["late"]) is nn.Identity
    assert folded.body.last.extra_repr() == nn.Conv2d(6, 4, 3).extra_repr()


def test_report_names_layers_by_path_and_counts_them() -> None:
    _, report = fold(Deeper().eval(), torch.randn(2, 3, 9, 7))  # a bare tensor is the one input
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
    assert str(fold(nn.ReLU(), torch.randn(2, 3)).report) == "Layers: none that can be folded"


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
