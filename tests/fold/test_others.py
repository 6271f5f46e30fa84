"""Layers of other projects fold by what they compute: affines of constants, convolutions that compute a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published_layers import FusedFRN, RootCenConv, RootMABN
from swap_networks import FrozenBatchNorm2d
from tolerances import FLOAT64
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from deploynorm._adopt.convolutions import centred, computed
from deploynorm._fold import FoldResult, fold
from deploynorm.layers import CenConv2d


class FrozenWithReLU(FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class PopulationNorm(nn.Module):
    """Population Normalization: mean and variance are parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean, self.log_var = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))
        self.weight, self.bias = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        x = (x - self.mean.view(shape)) / torch.sqrt(self.log_var.exp().view(shape) + 1e-5)
        return x * self.weight.view(shape) + self.bias.view(shape)


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a BatchNorm that calls its own children behind."""

    def __init__(self, channels: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(y))


class StandardisedConv(nn.Conv2d):
    """As timm's StdConv2d and ScaledStdConv2d: the weight by F.batch_norm of its filters, in evaluation too."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        filters = self.weight.reshape(1, self.out_channels, -1)
        scale = self.gain.view(-1) * 0.3
        weight = F.batch_norm(filters, None, None, weight=scale, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(
            x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def silu(channels: int) -> nn.Module:
    return NormAct(channels, nn.SiLU(), nn.Dropout2d())


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, **options)


def pair(before: nn.Module, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(before, norm(6))


OTHERS: Mapping[str, Callable[[], nn.Module]] = {
    "FrozenBatchNorm2d": lambda: pair(conv(bias=False), FrozenBatchNorm2d),
    "a frozen one with its ReLU": lambda: pair(conv(), FrozenWithReLU),
    "Population Normalization": lambda: pair(conv(), PopulationNorm),
    "LayerScale": lambda: pair(conv(groups=2), LayerScale),
    "BatchNorm with its activation": lambda: pair(
        conv(), lambda channels: NormAct(channels, nn.SiLU(), nn.Dropout2d())
    ),
    "MABN and CenConv of others": lambda: pair(RootCenConv(4, 6, 3, stride=2), RootMABN),
    "a standardised convolution": lambda: pair(StandardisedConv(4, 6, 3, padding=1, groups=2)),
    "weight_norm": lambda: pair(parametrizations.weight_norm(conv(padding=1, padding_mode="reflect"))),
    "spectral_norm": lambda: pair(parametrizations.spectral_norm(conv(dilation=2))),
    "weight_norm as a hook": lambda: pair(torch.nn.utils.weight_norm(conv())),
    "spectral_norm as a hook": lambda: pair(torch.nn.utils.spectral_norm(conv())),
    "a parametrized bias": lambda: pair(parametrize.register_parametrization(conv(), "bias", Halved())),
    "transposed": lambda: pair(parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2))),
}
"""A layer of others in it, and all that can be folded is."""


class Each(nn.Module):
    def __init__(self, nets: Mapping[str, Callable[[], nn.Module]]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(build() for build in nets.values())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [net(x) for net in self.nets]


@pytest.fixture(scope="module")
def folded() -> tuple[list[Tensor], list[Tensor], FoldResult]:
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        net = Each(OTHERS).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        for name, each in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith(("running_var", ".1.weight")):
                each.uniform_(0.5, 2)
            elif name.endswith(("running_mean", ".1.bias")):
                each.normal_()
        want = net.eval()(x)
    result = fold(net, x)
    with torch.no_grad():
        return want, result.model(x), result


@pytest.mark.parametrize("name", OTHERS)
def test_it_folds_into_one_plain_layer_that_computes_the_same(name: str, folded: Any) -> None:
    want, got, (model, _) = folded
    place = list(OTHERS).index(name)
    scale = want[place].abs().max()
    torch.testing.assert_close(got[place] / scale, want[place] / scale, **FLOAT64.kwargs())
    first, second = model.nets[place]
    assert type(first) in (nn.Conv2d, nn.ConvTranspose2d)
    assert type(second[0] if isinstance(second, nn.Sequential) else second) is nn.Identity


def test_the_report_names_them_by_their_classes_and_a_second_fold_changes_nothing(folded: Any) -> None:
    _, _, (model, report) = folded
    assert {change.outcome for change in report.changes} == {"folded"}
    details = {change.kind: change.detail for change in report.changes}
    assert details["StandardisedConv"] == "its weight is computed once"
    assert details["PopulationNorm"] == "into nets.2.0"
    assert report.found["NormAct"] == 1
    assert not fold(model, torch.randn(2, 4, 9, 8, dtype=torch.float64)).report.modified


def test_one_that_cannot_fold_stays_what_it_was() -> None:
    net = nn.Sequential(
        nn.ReLU(), FrozenBatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU(), NormAct(3, nn.SiLU()), FusedFRN(3)
    )
    model, report = fold(net, torch.randn(2, 3, 8, 8))
    assert [type(layer).__name__ for layer in model][1:] == [
        "FrozenBatchNorm2d", "Conv2d", "ReLU", "NormAct", "FRN2d"
    ]  # fmt: skip
    assert [(change.kind, change.outcome) for change in report.changes] == [
        ("FrozenBatchNorm2d", "not foldable"),
        ("NormAct", "not foldable"),
        ("FusedFRN", "adopted"),
    ]
    assert "the output of relu" in report.changes[0].detail


class DynamicConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean())


class Branching(nn.Conv2d):
    """A plain convolution but for inputs that no random one is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.abs().max() < 1e6 else super().forward(-x)


class ChannelNorm(PopulationNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.square().mean(1, keepdim=True))


class Hooked(FrozenBatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_forward_hook(lambda module, args, output: output + 1)


def test_what_depends_on_the_input_or_has_hooks_stays() -> None:
    stays = {
        "dynamic": lambda: pair(DynamicConv(4, 6, 3), nn.ReLU),
        "hooked": lambda: pair(conv(), Hooked),
        "of all channels": lambda: pair(conv(), ChannelNorm),
    }
    net, x = Each(stays).eval(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        want = net(x)
        model, report = fold(net, x)
        torch.testing.assert_close(model(x), want)
    assert [(change.kind, change.detail) for change in report.changes] == [("Hooked", "it has hooks")]


@pytest.mark.slow
def test_layers_of_timm(timm: ModuleType) -> None:
    layers = timm.layers
    net = nn.Sequential(
        layers.StdConv2d(3, 8, 3),
        layers.BatchNormAct2d(8),
        layers.ScaledStdConv2d(8, 4, 3),
        layers.FrozenBatchNormAct2d(4),
    ).eval()
    x = torch.randn(2, 3, 9, 9)
    model, _ = fold(net, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-5)
    kinds = [type(layer).__name__ for layer in model.modules() if not list(layer.children())]
    assert kinds == ["Conv2d", "Identity", "ReLU", "Conv2d", "Identity", "ReLU"]


def test_a_convolution_that_branches_on_values_stays() -> None:
    _, report = fold(Branching(4, 6, 3), torch.randn(2, 4, 8, 8))
    assert not report.modified


class Centred(nn.Conv2d):
    """A convolution with a centred weight, and with what a function makes of it."""

    def __init__(self, forward: Callable[[Centred, Tensor], Tensor], count: Tensor | int = 0) -> None:
        super().__init__(4, 6, 3)
        self.of = forward
        if isinstance(count, Tensor):
            self.register_buffer("count", count)
        else:
            self.count = count

    def convolution(self, x: Tensor, times: Tensor | int = 1, padding: int = 0) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight * times, self.bias, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, x)


def doubled_above(layer: Centred, x: Tensor) -> Tensor:
    y = layer.convolution(x)
    return torch.where(x.amax() > 100, 2 * y, y)


def without_infinities(layer: Centred, x: Tensor) -> Tensor:
    y = layer.convolution(x)
    return torch.where(y.isfinite(), y, 0)


def counting(layer: Centred, x: Tensor) -> Tensor:
    layer.count += 1
    return layer.convolution(x, 2 if layer.count > 99 else 1)


def counting_in_a_buffer(layer: Centred, x: Tensor) -> Tensor:
    layer.count.add_(1)
    return layer.convolution(x, torch.where(layer.count > 99, 2, 1))


ALMOST: Mapping[str, Callable[[], Centred]] = {
    "bounds of the output": lambda: Centred(lambda layer, x: layer.convolution(x).clamp(-200, 200)),
    "bounds of the input": lambda: Centred(lambda layer, x: layer.convolution(x.clamp(-200, 200))),
    "a choice by the input": lambda: Centred(doubled_above),
    "infinities": lambda: Centred(without_infinities),
    "the width": lambda: Centred(lambda layer, x: layer.convolution(x, padding=int(x.shape[-1] > 1000))),
    "one width": lambda: Centred(lambda layer, x: layer.convolution(x, padding=int(x.shape[-1] == 77))),
    "the area": lambda: Centred(lambda layer, x: layer.convolution(x, padding=int(x[0, 0].numel() > 1e5))),
    "the batch": lambda: Centred(lambda layer, x: layer.convolution(x, padding=int(x.shape[0] > 40))),
    "calls so far": lambda: Centred(counting),
    "calls so far in a buffer": lambda: Centred(counting_in_a_buffer, torch.zeros(())),
}
"""On most inputs a convolution with a constant weight."""


@pytest.mark.parametrize("name", ALMOST)
def test_what_is_a_convolution_for_most_inputs_alone_stays(name: str) -> None:
    assert computed(ALMOST[name]().eval(), (2, 4, 9, 8)) is None


def test_a_convolution_of_all_sizes_is_the_plain_one() -> None:
    found = computed(Centred(Centred.convolution).eval(), (2, 4, 9, 8))
    assert found is not None
    assert type(found.plain) is nn.Conv2d


@pytest.mark.parametrize("detached", [False, True])
def test_cen_conv_takes_the_place_of_what_trains_as_it_does(detached: bool) -> None:
    layer = Centred(lambda self, x: F.conv2d(x, self.weight - mean(self.weight), self.bias))

    def mean(weight: Tensor) -> Tensor:
        return (weight.detach() if detached else weight).mean((1, 2, 3), keepdim=True)

    found = computed(layer.eval(), (2, 4, 9, 8))
    assert found is not None
    assert isinstance(centred(layer, found), CenConv2d) is not detached


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(7, 5), (2, 7)),
        (lambda: nn.Linear(7, 5), (2, 3, 1, 7)),
        (lambda: nn.Conv2d(4, 6, 1), (2, 4, 1, 1)),
        (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
        (lambda: nn.ConvTranspose3d(4, 6, 3, padding=3), (2, 4, 9, 9, 9)),
    ],
)
def test_parametrized_layers_of_all_kinds_are_plain(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    assert computed(parametrizations.weight_norm(layer()).eval(), shape) is not None
