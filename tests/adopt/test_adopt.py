"""Layers of other projects become ours by what they compute; what only looks like them does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from published_layers import (
    IMAGE,
    PUBLISHED,
    C,
    FusedFRN,
    RootCenConv,
    RootMABN,
    SeparateFRN,
    SeparateTLU,
    UnifiedNormalization,
    parameter,
)
from torch import Tensor, nn

import deploynorm
from deploynorm import adopt, convert, export, fold, swap
from deploynorm._adopt import AdoptResult
from deploynorm.contract import DOMAIN, OP_TYPE
from deploynorm.errors import ModelError
from deploynorm.layers import TLU, CenConv2d, FRN2d, MABN2d

FRN_NODE = f"{DOMAIN}::{OP_TYPE}"


class Each(nn.Module):
    """Layers side by side, each of an input of its own."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name.replace(".", ""): layer for name, layer in layers.items()})

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers.values(), inputs, strict=True))


def drawn(net: nn.Module) -> nn.Module:
    """The network in evaluation, with parameters and statistics as after training, but for an epsilon."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in [*net.named_parameters(), *net.named_buffers()]:
            if isinstance(x, nn.Parameter) and "eps" not in name:
                x.uniform_(-1.5, 1.5)
            elif name.endswith(("running_var", "running_phi")):
                x.uniform_(0.5, 2)
    return net.eval()


@cache
def published() -> tuple[nn.Module, tuple[Tensor, ...], AdoptResult]:
    net = drawn(Each({name: build() for name, (build, *_) in PUBLISHED.items()}))
    inputs = tuple(torch.randn(shape) for _, shape, *_ in PUBLISHED.values())
    return net, inputs, adopt(net, inputs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_layer_becomes_ours_and_goes_on_being_trained(name: str) -> None:
    _, _, (net, report) = published()
    _, _, became, trained = PUBLISHED[name]
    new = net.layers[name]
    parts = new if type(new) is nn.Sequential else [new]
    assert " ".join(type(part).__name__ for part in parts) == became
    assert sorted(each.rsplit(".")[-1] for each, x in new.named_parameters() if x.requires_grad) == sorted(
        trained.split()
    )
    assert {change.outcome for change in report.changes} == {"adopted"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_layer_computes_the_same_as_ours_and_has_its_gradients(name: str) -> None:
    given, inputs, (net, _) = published()
    place = list(PUBLISHED).index(name)
    results = []
    for each in (given, net):
        layer = copy.deepcopy(each.layers[name]).double()
        x = (inputs[place].double() * 1e-3).requires_grad_()  # as small as the root of epsilon
        y = layer(x)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y))
        grads = [p.grad.reshape(-1) for p in layer.parameters() if p.requires_grad and p.grad is not None]
        results.append((y, x.grad, *sorted((g.sum() for g in grads), key=float)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def centred(self: FusedFRN, x: Tensor) -> Tensor:
    return FusedFRN.forward(self, x - x.mean((2, 3), keepdim=True))


def form(compute: Callable[[Any, Tensor], Tensor], **options: Any) -> Callable[[], nn.Module]:
    """A layer with FusedFRN's parameters that computes something else."""
    return lambda: type("Other", (FusedFRN,), {"forward": compute})(C, **options)


def root(x: Tensor, axes: Any, eps: float = 1e-6) -> Tensor:
    return torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)


OTHERS: Mapping[str, Callable[[], nn.Module]] = {
    "layer normalization": form(lambda self, x: F.layer_norm(x, x.shape[1:]) * self.gamma + self.beta),
    "RMSNorm over the channels": form(lambda self, x: x * root(x, 1) * self.gamma + self.beta),
    "RMSNorm over all but the batch": form(lambda self, x: x * root(x, (1, 2, 3)) * self.gamma + self.beta),
    "group normalization": form(lambda self, x: F.group_norm(x, 2) * self.gamma + self.beta),
    "instance normalization": form(lambda self, x: F.instance_norm(x) * self.gamma + self.beta),
    "mean over one axis": form(lambda self, x: x * root(x, 3) * self.gamma + self.beta),
    "centred": form(centred),
    "epsilon outside of the root": form(lambda self, x: x / (x.square().mean((2, 3), True).sqrt() + 1e-6) * self.gamma),
    "no epsilon": form(lambda self, x: x * root(x, (2, 3), 0.0) * self.gamma),
    "another square": form(lambda self, x: x * root(x + self.tau, (2, 3)) * self.gamma),
    "not the root": form(lambda self, x: x * root(x, (2, 3)) ** 2 * self.gamma),
    "the batch too": form(lambda self, x: x * root(x, (0, 2, 3)) * self.gamma + self.beta),
    "a threshold from above": form(lambda self, x: torch.min(FusedFRN.forward(self, x), self.tau)),
    "a slope below": form(lambda self, x: F.leaky_relu(FusedFRN.forward(self, x), 0.1)),
    "a threshold by position": lambda: SeparateTLU(1, C, *IMAGE[2:]),
    "a threshold by column": lambda: SeparateTLU(1, 1, 1, IMAGE[3]),
    "a gate": form(lambda self, x: x * torch.sigmoid(x.square().mean((2, 3), True)) * self.gamma),
    "tokens": lambda: UnifiedNormalization(C),
    "its mean only": form(lambda self, x: (x - x.mean((2, 3), keepdim=True)) * self.gamma),
}
"""Layers that must stay, with parameters of one number for each channel or nearly."""

TOLD = {
    "tokens": "its channels are last, where MABN does not fold",
    "a slope below": "it has a slope below 0",
    "a threshold from above": "Min is not understood",
    "no epsilon": "its epsilon is not positive",
    "epsilon outside of the root": "it adds a constant to what is not the mean: an epsilon outside of the root",
}
"""Those of them that are FRN or MABN all the same, and what is said of them."""


@pytest.fixture(scope="module")
def others() -> AdoptResult:
    net = drawn(Each({name: build() for name, build in OTHERS.items()}))
    return adopt(net, tuple(torch.randn(2, 9, C) if name == "tokens" else torch.randn(IMAGE) for name in OTHERS))


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_it_stays(name: str, others: AdoptResult) -> None:
    assert type(others.model.layers[name]).__name__ in ("Other", "SeparateTLU", "UnifiedNormalization")
    left = {change.name.removeprefix("layers."): change.detail for change in others.report.with_outcome("left")}
    assert left.get(name, "").removeprefix("no FRN as ours is: ") == TOLD.get(name, "")


class Block(nn.Module):
    """A residual block of a network with layers of others, one of them in two places, and an FRN of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.tlu = nn.Conv2d(C, C, 3, padding=1), SeparateFRN(C), SeparateTLU(1, C, 1, 1)
        self.conv2, self.norm2 = nn.Conv2d(C, C, 3, padding=1), SeparateFRN(C, learned=True)
        self.gamma = parameter(1, C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tlu(self.norm1(self.conv1(x)))
        y = self.tlu(x + self.norm2(self.conv2(y)))
        return y * root(y, (2, 3)) * self.gamma


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


def network() -> nn.Module:
    shared = FusedFRN(C, eps=parameter(1, value=1e-5))
    convs = [nn.Conv2d(C, C, 3, padding=1) for _ in range(2)]
    mabn = nn.Sequential(RootCenConv(C, C, 3, padding=1), RootMABN(C))
    layers = [RootCenConv(3, C, 3), RootMABN(C), convs[0], shared, convs[1], shared, Block(), hooked(FusedFRN(C)), mabn]
    return drawn(nn.Sequential(*layers))


@pytest.fixture(scope="module")
def taken() -> tuple[nn.Module, Tensor, AdoptResult]:
    net, x = network(), torch.randn(2, 3, 10, 9)
    net.train()
    for module in net.modules():
        if isinstance(module, RootMABN):
            module.eval()
    return net, x, adopt(net, x)


def test_a_network_gets_ours_in_place_and_the_report_says_what_stays(taken: Any) -> None:
    given, x, (net, report) = taken
    assert [type(layer) for layer in net[:4]] == [CenConv2d, MABN2d, nn.Conv2d, FRN2d]
    assert net[3] is net[5], "a layer that is used in two places is one"
    assert type(net[6].tlu) is TLU
    assert net[6].norm2.learned_eps == "layer"
    assert type(net[7]) is FusedFRN
    assert [layer.training for layer in net[:4]] == [True, False, True, True]
    assert {change.name: change.detail for change in report.with_outcome("left")} == {
        "6": "FRN in a layer that computes other things, or has other parameters: export fuses it where it can",
        "7": "it has hooks",
    }
    assert "RootMABN" in str(report)
    assert type(given[3]) is FusedFRN, "the network given is left as it is"
    given, net = (copy.deepcopy(each).eval().double() for each in (given, net))
    with torch.no_grad():
        torch.testing.assert_close(net(x.double()), given(x.double()), rtol=1e-6, atol=1e-6)


def test_ours_has_nothing_to_adopt(taken: Any) -> None:
    _, x, (net, _) = taken
    again = adopt(net[:6], x)
    assert not again.report.changes
    assert str(again.report) == "Layers: none of another project that computes FRN or MABN"


def test_convert_takes_the_layers_and_fuses_what_no_layer_has_for_itself(taken: Any) -> None:
    given, x, _ = taken
    conversion = convert(given, x, dynamic="none")
    assert conversion
    assert conversion.exported.node_counts() == {
        "Conv": 6, "Max": 1, FRN_NODE: 5, f"{DOMAIN}::FilterResponseNormalizationAdd": 1,
    }  # fmt: skip
    assert "fused in the graph: 2 FRN in loose operators" in conversion.exported.notes
    outcomes = {change.name: (change.outcome, change.became) for change in conversion.fold.changes}
    assert outcomes["0"] == ("folded", "Conv2d")
    assert outcomes["1"] == outcomes["8.1"] == ("folded", "Identity")
    assert outcomes["3"] == ("adopted", "FRN2d")
    assert "ours now" in str(conversion.fold)


def test_export_alone_takes_them_too_and_says_so() -> None:
    net = drawn(nn.Sequential(nn.Conv2d(3, C, 3), FusedFRN(C), SeparateFRN(C)))
    exported = export(net, torch.randn(2, 3, 8, 8))
    assert exported.node_counts() == {"Conv": 1, FRN_NODE: 2}
    assert exported.notes == ("layers of other projects became ours: 1 FusedFRN as FRN2d, 1 SeparateFRN as FRN2d",)


def test_swap_takes_them_too_for_training() -> None:
    net = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), FusedFRN(C, eps=parameter(1)))
    swapped, report = swap(net, torch.randn(2, 3, 8, 8), norm="frn")
    assert [type(layer) for layer in swapped] == [nn.Conv2d, FRN2d, nn.Identity, FRN2d]
    assert swapped.training
    assert swapped[3].eps_l.requires_grad
    assert report.notes[0] == "layers of other projects became ours: 1 FusedFRN as FRN2d"


class ReadsAttributes(nn.Module):
    """Its own code reads what ours do not have: a shape, and an attribute's name."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(3, C, 3), FusedFRN(C), read

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.read(self.norm)


@pytest.mark.parametrize(
    "read",
    [
        lambda norm: norm.gamma.mean(),
        lambda norm: 1 if type(norm) is FusedFRN else 1.005,
        pytest.param(lambda norm: 1 if type(norm) is FusedFRN else 9, marks=pytest.mark.slow),
    ],
)
def test_a_network_that_does_not_bear_ours_keeps_its_own(read: Callable[[Any], Any]) -> None:
    net, x = drawn(ReadsAttributes(read)), torch.randn(2, 3, 8, 8)
    new, report = adopt(net, x)
    assert type(new.norm) is FusedFRN
    assert report.changes[0].outcome == "left"
    exported = export(net, x, dynamic="none")
    assert exported.node_counts()[FRN_NODE] == 1
    assert "fused in the graph: 1 FRN in loose operators" in exported.notes
    assert type(fold(net, x)[0].norm) is FusedFRN


class Patched(FusedFRN):
    pass


def test_layers_of_one_class_that_compute_something_else_are_seen_through() -> None:
    net = drawn(nn.Sequential(Patched(3), Patched(3), Patched(3)))
    net[1].forward = lambda x: x * 2 + net[1].beta  # type: ignore[method-assign]
    net[2].floor = 0.0
    new, _ = adopt(net, torch.randn(2, 3, 8, 8))
    assert [type(layer) for layer in new] == [FRN2d, Patched, FRN2d]


class ByExponent(FusedFRN):
    """An epsilon that is another function of its parameter: it can only be kept as it is."""

    def normalized(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + self.eps.exp())


def test_numbers_that_are_computed_otherwise_become_constants() -> None:
    net = drawn(nn.Sequential(ByExponent(3, eps=parameter(1, 3, 1, 1, value=-9.0))))
    with torch.no_grad():
        net[0].eps += torch.arange(3.0).view(1, 3, 1, 1)
    new, report = adopt(net, torch.randn(2, 3, 8, 8))
    assert isinstance(new[0].eps, Tensor)
    torch.testing.assert_close(new[0].eps, net[0].eps.detach().exp().flatten())
    assert report.changes[0].detail == "eps computed from its parameters, and no longer trained"


class FrozenScale(nn.Module):
    """weight, bias (C), a scale that no mode changes, and a bound from below."""

    def __init__(self, channels: int, low: float | None = None) -> None:
        super().__init__()
        self.weight, self.bias = parameter(channels), parameter(channels, value=0)
        self.register_buffer("running_var", torch.ones(channels))
        self._low = low

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        y = x * torch.rsqrt(self.running_var + 1e-5).view(shape) * self.weight.view(shape) + self.bias.view(shape)
        return y if self._low is None else y.clamp(min=self._low)


def counting(self: Any, x: Tensor) -> Tensor:
    self.floor += 1
    return FusedFRN.forward(self, x) * (2 if self.floor > 40 else 1)


def updating(self: Any, x: Tensor) -> Tensor:
    self.gamma.data += 1e-9
    return FusedFRN.forward(self, x)


def doubled_if(condition: Callable[[Tensor], bool]) -> Callable[[], nn.Module]:
    return form(lambda self, x: FusedFRN.forward(self, x) * (2 if condition(x) else 1))


OF_CASES: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "one value": (form(lambda self, x: x if x.shape[2] * x.shape[3] == 1 else FusedFRN.forward(self, x)), "sizes"),
    "one row": (doubled_if(lambda x: x.shape[2] == 1), "sizes"),
    "one column": (doubled_if(lambda x: x.shape[3] == 1), "sizes"),
    "a high map": (doubled_if(lambda x: x.shape[2] > 200), "sizes"),
    "a wide map": (doubled_if(lambda x: x.shape[3] > 200), "sizes"),
    "a map of many values": (doubled_if(lambda x: x.shape[2] * x.shape[3] > 10**6), "sizes"),
    "a batch of five": (doubled_if(lambda x: x.shape[0] == 5), "sizes"),
    "a batch of one": (doubled_if(lambda x: x.shape[0] == 1), "sizes"),
    "a count of its calls": (form(counting), "state"),
    "its gamma": (form(updating), ""),
}
"""Layers that are FRN in most cases, what they tell apart, and what is said of them."""


def test_what_is_frn_in_some_cases_only_stays() -> None:
    net = drawn(Each({name: build() for name, (build, _) in OF_CASES.items()}))
    new, report = adopt(net, [torch.randn(IMAGE)] * len(OF_CASES))
    assert {type(layer).__name__ for layer in new.layers.values()} == {"Other"}
    said = {"sizes": "it computes something else at other sizes", "state": "it changes its own state in a call"}
    details = {change.name.removeprefix("layers."): change.detail for change in report.changes}
    for name, (_, why) in OF_CASES.items():
        assert not why or said[why] in details[name], name


def test_a_layer_with_other_gradients_stays() -> None:
    def detached(self: Any, x: Tensor) -> Tensor:
        return torch.max(self.gamma * x * root(x.detach(), (2, 3)) + self.beta, self.tau)

    new, report = adopt(nn.Sequential(form(detached)()), torch.randn(IMAGE))
    assert type(new[0]).__name__ == "Other"
    assert report.changes[0].detail == "in training mode it computes something else"


class Capped(FusedFRN):
    def __init__(self, channels: int, cap: float | None = None) -> None:
        super().__init__(channels)
        self._cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self._cap is None else super().forward(x).clamp(max=self._cap)


def test_private_arguments_tell_layers_of_one_class_apart() -> None:
    new, _ = adopt(nn.Sequential(Capped(3, 12.0), Capped(3)), torch.randn(2, 3, 8, 8))
    assert [type(layer) for layer in new] == [Capped, FRN2d]


def test_fold_takes_no_bounded_scale_for_one_without() -> None:
    net = drawn(nn.Sequential(*(part for low in (-50.0, None) for part in (nn.Conv2d(3, 3, 3), FrozenScale(3, low)))))
    folded = fold(net, torch.randn(2, 3, 9, 9))[0]
    x = torch.randn(2, 3, 9, 9) * 1e3
    with torch.no_grad():
        torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-3)


def test_a_scale_that_is_frozen_is_no_mabn_but_folds() -> None:
    net, x = drawn(nn.Sequential(nn.Conv2d(3, 3, 3), FrozenScale(3))), torch.randn(2, 3, 9, 9)
    new, report = adopt(net, x)
    assert type(new[1]) is FrozenScale
    assert "a scale that is frozen, and no MABN" in report.changes[0].detail
    assert type(fold(net, x)[0][1]) is nn.Identity


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_other_types_are_kept(dtype: torch.dtype) -> None:
    net = drawn(nn.Sequential(FusedFRN(3, eps=parameter(1, value=1e-3)))).to(dtype)
    new, _ = adopt(net, torch.randn(2, 3, 8, 8, dtype=dtype))
    assert {x.dtype for x in new.parameters()} == {dtype}
    assert type(new[0]) is FRN2d


def test_shared_parameters_stay_shared() -> None:
    net = nn.Sequential(SeparateTLU(1, 3, 1, 1), SeparateTLU(1, 3, 1, 1), FusedFRN(3))
    net[1].tau = net[0].tau
    new, _ = adopt(net, torch.randn(2, 3, 8, 8))
    assert new[0].tau is new[1].tau
    assert new[2].tau is not new[0].tau


@pytest.mark.slow
def test_timm_s_layers_become_ours_with_their_activation(timm: Any) -> None:
    layers = timm.layers.filter_response_norm
    act = layers.FilterResponseNormAct2d
    net = nn.Sequential(layers.FilterResponseNormTlu2d(3), act(3), act(3, act_layer=nn.SiLU), act(3, apply_act=False))
    new, report = adopt(drawn(net), torch.randn(2, 3, 8, 8))
    assert [change.became for change in report.changes] == ["FRN2d", "FRN2d and ReLU", "FRN2d and SiLU", "FRN2d"]
    assert new[0].eps == 1e-5
    assert new[0].weight.requires_grad


def test_an_archive_of_a_network_of_others_is_fused() -> None:
    net, x = drawn(nn.Sequential(nn.Conv2d(3, C, 3), FusedFRN(C))), torch.randn(2, 3, 8, 8)
    archive = torch.export.export(net, (x,)).module()
    exported = export(archive, x)
    assert exported.node_counts() == {"Conv": 1, FRN_NODE: 1}
    [node] = [node for node in exported.to_proto().graph.node if node.op_type == OP_TYPE]
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in exported.to_proto().graph.initializer}
    np.testing.assert_allclose(constants[node.input[1]], net[1].gamma.detach().flatten())


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (partial(adopt, nn.Sequential(FusedFRN(3)), torch.randn(2, 4, 8, 8)), "does not run on the example inputs"),
        (partial(deploynorm.adopt, nn.Sequential(FusedFRN(3)), [1]), "not a tensor"),
    ],
)
def test_bad_input_is_told(call: Callable[[], Any], problem: str) -> None:
    with pytest.raises((ModelError, deploynorm.InputError), match=problem):
        call()
