"""The committed table of network families is what swap makes of them; every row checks the numbers of its networks."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

QUICK = ("timm resnet18", "timm convnext_atto", "torchvision resnet18")
"""Families that build and trace quickly, among them one with a shared ReLU and one without BatchNorm."""


@pytest.fixture(scope="module")
def families(timm: ModuleType) -> ModuleType:
    """benchmarks/families.py; timm brings torchvision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("families")


@pytest.fixture(scope="module")
def table() -> list[str]:
    return (BENCHMARKS / "results" / "families.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("family", QUICK)
def test_row_of_the_committed_table_comes_out_again(families: ModuleType, table: list[str], family: str) -> None:
    assert str(families.row(family)) in table


def test_committed_table_has_every_family(families: ModuleType, table: list[str]) -> None:
    assert table[0] == f"| {' | '.join(families.COLUMNS)} |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == list(families.FAMILIES)


@pytest.mark.slow
def test_check_of_a_row_sees_one_lost_activation(families: ModuleType) -> None:
    network, x, (swapped, _), _ = families.swaps("timm resnet18")
    truth = families.with_every_activation(network, swapped)
    assert families.largest_difference(swapped, truth, x) < 1e-6
    truth.set_submodule("layer4.1.act1", nn.Identity())
    assert families.largest_difference(swapped, truth, x) > 1e-3


@pytest.mark.slow
def test_check_of_a_row_sees_one_weight_that_is_not_centred(families: ModuleType) -> None:
    network, x, _, (swapped, _) = families.swaps("timm resnet18")
    truth = families.with_centred_weights(network, swapped)
    assert families.largest_difference(swapped, truth, x) < 1e-5
    with torch.no_grad():
        truth.get_submodule("layer4.1.conv2").weight.copy_(network.get_submodule("layer4.1.conv2").weight)
    assert families.largest_difference(swapped, truth, x) > 1e-3
