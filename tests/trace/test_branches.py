"""A network that branches on the sizes of its inputs: the axes are fixed, unless the branch changes no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from deploynorm import export, fold
from deploynorm.errors import ModelError
from deploynorm.layers import MABN2d
from deploynorm.trace import Examples, branches, copied, find_sizes, trace


class Branching(nn.Module):
    """Scales by 2 or by 3."""

    def __init__(self, condition: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.conv, self.norm, self.condition = nn.Conv2d(3, 4, 3, padding=1), MABN2d(4), condition

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y * 2 if self.condition(x) else y * 3


CONDITIONS: dict[str, tuple[Callable[[Tensor], bool], str]] = {
    "smaller": (lambda x: x.shape[2] < 16, "H >= 16"),
    "larger": (lambda x: x.shape[3] > 40, "to 40"),
    "even": (lambda x: x.shape[2] % 2 == 0, "(H % 2) == 0"),
    "high": (lambda x: x.shape[2] > x.shape[3], "H <= W"),
    "area": (lambda x: x.shape[2] * x.shape[3] < 500, ">= 500"),
    "far larger": (lambda x: x.shape[2] * x.shape[3] > 20_000, "<= 20000"),
    "one size": (lambda x: x.shape[2] in (224, 384), "H != 224"),
    "a remainder": (lambda x: x.shape[2] * x.shape[3] % 11 == 0, "% 11) != 0"),
    "elements": (lambda x: x.numel() > 100_000, "<= 100000"),
    "batch": (lambda x: len(x) % 2 == 0, "N == 2"),
    "large batch": (lambda x: len(x) >= 32, "N == 2"),
    "one": (lambda x: x.shape[2] == 1, "H != 1"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_axes_of_a_branch_are_fixed_and_said_or_refused(name: str) -> None:
    condition, text = CONDITIONS[name]
    network, x = Branching(condition).eval(), torch.randn(2, 3, 24, 32)
    exported = export(network, x)
    fixed = {0} if "batch" in name else {0, 2, 3} if name == "elements" else {2, 3}
    assert {axis for axis, size in enumerate(exported.inputs[0].shape) if isinstance(size, int)} == {1, *fixed}
    notes = [note for note in exported.notes if "holds for some sizes only" in note]
    assert text in notes[0]
    with pytest.raises(ModelError, match=r"(to|must) be dynamic"):
        export(network, x, dynamic="all")
    assert [change.outcome for change in fold(network, x)[1].changes] == ["affine"]
    assert [change.outcome for change in fold(network, x, dynamic="none")[1].changes] == ["folded"]


class Harmless(nn.Module):
    """Compares sizes, and computes the same whichever way it goes."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < 16 or x.shape[2] % 4 == 0:
            return F.adaptive_avg_pool2d(x, 1)
        return x.mean((2, 3), keepdim=True)


def test_a_branch_that_changes_no_number_fixes_nothing() -> None:
    exported = export(Harmless(), torch.randn(2, 3, 24, 32))
    assert exported.inputs[0].shape == ("N", 3, "H", "W")
    assert not exported.notes


class Halved(nn.Module):
    """Takes multiples of 4 alone, and a second input that goes with the first."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if x.shape[2] > 100:
            x = x * 2
        low = F.interpolate(F.max_pool2d(F.max_pool2d(x, 2), 2), scale_factor=4)
        return torch.cat([x * mask, low], 1)


def test_axes_that_vary_together_and_by_steps_are_tried_so() -> None:
    network, tensors = Halved(), (torch.randn(2, 3, 128, 128), torch.randn(2, 1, 128, 128))
    examples = Examples.of("test", network, tensors)
    sizes = find_sizes(network, examples)
    assert branches(trace(network, examples, sizes=sizes), network, examples, sizes) == {"H of x > 100": "spatial"}


class Mean(nn.Module):
    """At another height and width than that of its trace, a trace with these fixed would divide by a wrong number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


@pytest.mark.parametrize(
    ("dynamic", "free"), [("batch", {0}), ("spatial", {2, 3}), ("all", {0, 2, 3}), (None, {0, 2, 3})]
)
def test_axes_that_are_not_dynamic_stay_as_they_are(dynamic: Any, free: set[int]) -> None:
    (x,) = export(Mean(), torch.randn(2, 3, 24, 32), dynamic=dynamic).inputs
    assert {axis for axis, size in enumerate(x.shape) if isinstance(size, str)} == free


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_what_draws_no_random_numbers_by_default_is_no_training_mode() -> None:
    assert export(Attention(), torch.randn(2, 4, 8, 8)).node_counts()["Softmax"] == 1


class Extractor(fx.GraphModule):
    """As torchvision's feature extractors, its copies begin in training mode."""

    def __init__(self, root: nn.Module, graph: fx.Graph, name: str = "Extractor") -> None:
        super().__init__(root, graph, name)
        self.train()


def test_a_copy_is_in_the_mode_of_its_original() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    extractor = Extractor(network, fx.Tracer().trace(network))
    extractor.eval()
    extractor.get_submodule("2").train()
    modes = [module.training for module in extractor.modules()]
    assert True in modes
    assert [module.training for module in copied(extractor).modules()] == modes
    assert export(extractor.eval(), torch.randn(2, 3, 8, 8)).node_counts()["Conv"] == 1
