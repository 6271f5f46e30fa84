"""Folding over a table of named networks, those that must not fold among them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tolerances import FLOAT64, FOLD_FLOAT32, Tolerance
from torch import Tensor, nn

from deploynorm._fold import fold
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


class Forward(nn.Module):
    """Layers, and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


class OwnForwardConv(nn.Conv2d):
    """Has a bias and leaves it out: a bias folded into it would be lost."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight)


class OwnForwardMABN(MABN2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


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
    left: int = 0
    reason: str = ""

    def __str__(self) -> str:
        return self.name


def _conv_mabn(**options: object) -> Callable[[], nn.Module]:
    channels = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, **options}
    return lambda: nn.Sequential(CenConv2d(**channels), MABN2d(channels["out_channels"]))


FOLDS = [
    Case("conv_mabn", lambda: nn.Sequential(nn.Conv2d(3, 8, 3), MABN2d(8)), folded=1),
    Case("cenconv_mabn", _conv_mabn(), (2, 4, 9, 7), folded=2),
    Case("no_bias", _conv_mabn(bias=False), (2, 4, 9, 7), folded=2),
    Case("groups", _conv_mabn(groups=2), (2, 4, 9, 7), folded=2),
    Case("depthwise", _conv_mabn(groups=4), (2, 4, 9, 7), folded=2),
    Case("stride_dilation", _conv_mabn(stride=2, dilation=2, padding=2), (2, 4, 9, 7), folded=2),
    Case("padding_same", _conv_mabn(padding="same"), (2, 4, 9, 7), folded=2),
    Case("padding_reflect", _conv_mabn(padding=1, padding_mode="reflect"), (2, 4, 9, 7), folded=2),
    Case("padding_circular", _conv_mabn(padding=1, padding_mode="circular"), (2, 4, 9, 7), folded=2),
    Case("not_affine", lambda: nn.Sequential(CenConv2d(3, 8, 3), MABN2d(8, affine=False)), folded=2),
    Case("conv_bn", lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), folded=1),
    Case("conv1d", lambda: nn.Sequential(CenConv1d(3, 8, 3), MABN1d(8)), (2, 3, 9), folded=2),
    Case("conv3d", lambda: nn.Sequential(CenConv3d(3, 8, 3), MABN3d(8)), (2, 3, 5, 6, 7), folded=2),
    Case("transposed", lambda: nn.Sequential(CenConvTranspose2d(4, 6, 3, stride=2), MABN2d(6)), (2, 4, 5, 4), folded=2),
    Case(
        "transposed_groups",
        lambda: nn.Sequential(CenConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2), MABN2d(6)),
        (2, 4, 5, 4),
        folded=2,
    ),
    Case("transposed1d", lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), MABN1d(6)), (2, 4, 5), folded=1),
    Case(
        "transposed3d",
        lambda: nn.Sequential(nn.ConvTranspose3d(4, 6, 3, groups=2), MABN3d(6)),
        (2, 4, 3, 4, 5),
        folded=1,
    ),
    Case("linear", lambda: nn.Sequential(nn.Linear(5, 8), MABN1d(8)), (4, 5), folded=1),
    Case("linear_bn", lambda: nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8)), (4, 5), folded=1),
    Case("other_order_of_definition", Deeper, folded=3),
    Case(
        "one_norm_after_two_convs",
        lambda: Forward(
            lambda m, x: m.n(m.a(x)) + m.n(m.b(x)), a=CenConv2d(3, 8, 3), b=CenConv2d(3, 8, 3), n=MABN2d(8)
        ),
        folded=3,
    ),
    Case(
        "norm_after_norm",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), MABN2d(4)),
        folded=2,
    ),
    Case("cenconv_alone", lambda: CenConv2d(3, 8, 3), folded=1),
    Case("learned_eps", lambda: nn.Sequential(nn.Conv2d(3, 8, 3), FRN2d(8, learned_eps="layer")), folded=1),
    Case("learned_eps_per_channel", lambda: FRN1d(3, learned_eps="channel", tlu=False), (2, 3, 9), folded=1),
]

STAYS = [
    Case("mabn_alone", lambda: MABN2d(3), affine=1, reason="the network's input"),
    Case(
        "mabn_after_add",
        lambda: Forward(lambda m, x: m.n(m.c(x) + x), c=nn.Conv2d(3, 3, 1), n=MABN2d(3)),
        affine=1,
        reason="the output of add",
    ),
    Case(
        "bn_after_relu",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        left=1,
        reason="the output of relu",
    ),
    Case(
        "shared_conv",
        lambda: Forward(lambda m, x: m.a(m.c(x)) + m.b(m.c(x)), c=CenConv2d(3, 4, 3), a=MABN2d(4), b=MABN2d(4)),
        folded=1,
        affine=2,
        reason="called 2 times",
    ),
    Case(
        "shared_conv_and_norm",
        lambda: Forward(lambda m, x: m.n(m.c(m.n(m.c(x)))), c=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3)),
        left=1,
        reason="called 2 times",
    ),
    Case(
        "conv_bare_once",
        lambda: Forward(lambda m, x: m.n(m.c(x)) + m.c(x + 1), c=nn.Conv2d(3, 4, 3), n=MABN2d(4)),
        affine=1,
        reason="called 2 times",
    ),
    Case(
        "output_used_twice",
        lambda: Forward(lambda m, x: (lambda y: m.n(y) + y)(m.c(x)), c=nn.Conv2d(3, 4, 3), n=MABN2d(4)),
        affine=1,
        reason="used 2 times",
    ),
    Case(
        "functional_conv",
        lambda: Forward(lambda m, x: m.n(F.conv2d(x, m.c.weight)), c=nn.Conv2d(3, 4, 3), n=MABN2d(4)),
        affine=1,
        reason="a functional call",
    ),
    Case(
        "functional_norm",
        lambda: Forward(
            lambda m, x: F.batch_norm(m.c(x), m.n.running_mean, m.n.running_var),
            c=nn.Conv2d(3, 4, 3),
            n=nn.BatchNorm2d(4),
        ),
        left=1,
        reason="outside its own forward",
    ),
    Case(
        "subclassed_conv",
        lambda: nn.Sequential(OwnForwardConv(3, 4, 3), MABN2d(4)),
        affine=1,
        reason="forward of its own",
    ),
    Case("subclassed_norm", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), OwnForwardMABN(4))),
    Case(
        "parametrized_weight",
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), MABN2d(4)),
        affine=1,
        reason="computed, not stored",
    ),
    Case("tied_weights", lambda: _tied(), affine=2, reason="called 2 times"),
    Case("hooked_conv", lambda: nn.Sequential(_hooked(nn.Conv2d(3, 4, 3)), MABN2d(4)), affine=1, reason="has hooks"),
    Case("hooked_norm", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), _hooked(MABN2d(4))), left=1, reason="has hooks"),
    Case("hooked_bn", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), _hooked(nn.BatchNorm2d(4))), left=1, reason="hooks"),
    Case(
        "no_running_statistics",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        left=1,
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
        lambda: Forward(lambda m, x: m.n(m.c(x)) if x.sum() > 0 else m.c(x), c=CenConv2d(3, 4, 3), n=MABN2d(4)),
        folded=1,
        affine=1,
        reason="cannot be traced",
    ),
    Case(
        "control_flow_on_the_batch",
        lambda: Forward(lambda m, x: m.n(m.c(x)) if x.shape[0] < 5 else m.c(x), c=nn.Conv2d(3, 4, 3), n=MABN2d(4)),
        affine=1,
        reason="other ways for other sizes",
    ),
    Case(
        "cond",
        lambda: Forward(
            lambda m, x: torch.cond(x.sum() > 0, lambda y: m.n(m.c(y)), lambda y: m.c(y), (x,)),
            c=nn.Conv2d(3, 4, 1),
            n=MABN2d(4),
        ),
        affine=1,
        reason="outside its own forward|not reached",
    ),
    Case("unused_norm", lambda: Forward(lambda m, x: m.c(x), c=nn.Conv2d(3, 4, 3), n=MABN2d(4)), affine=1,
         reason="not reached"),
    Case("frn_alone", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), FRN2d(4), TLU(4))),
    Case("nothing_to_fold", lambda: nn.Conv2d(3, 4, 3)),
]  # fmt: skip


def _tied() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), MABN2d(3), nn.Conv2d(3, 3, 3, padding=1), MABN2d(3))
    net[2].weight = net[0].weight
    return net


def _hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


def _trained(case: Case) -> nn.Module:
    """The case's network with parameters and statistics as after training: none of them at a neutral value."""
    torch.manual_seed(hash(case.name) % 1000)
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
    return network.eval()


def _outputs_agree(case: Case, dtype: torch.dtype, tolerance: Tolerance) -> None:
    network = _trained(case).to(dtype)
    x = torch.randn(case.shape, dtype=dtype)
    folded, _ = fold(network, (x,))
    with torch.no_grad():
        truth = copy.deepcopy(network).double()(x.double())
        scale = float(truth.abs().max())
        torch.testing.assert_close(folded(x).double() / scale, truth / scale, **tolerance.kwargs())


@pytest.mark.parametrize("case", FOLDS + STAYS, ids=str)
def test_folded_network_computes_the_same_in_float64(case: Case) -> None:
    _outputs_agree(case, torch.float64, FLOAT64)


@pytest.mark.parametrize("case", FOLDS, ids=str)
def test_folded_network_computes_the_same_in_float32(case: Case) -> None:
    _outputs_agree(case, torch.float32, FOLD_FLOAT32)


@pytest.mark.parametrize("case", FOLDS + STAYS, ids=str)
def test_report_tells_what_became_of_each_layer(case: Case) -> None:
    _, report = fold(_trained(case), (torch.randn(case.shape),))
    told = Counter(change.outcome for change in report.changes)
    assert told == Counter({"folded": case.folded, "affine": case.affine, "left": case.left}) + Counter()
    reasons = [change.detail for change in report.changes if change.outcome != "folded"]
    assert all(any(part in detail for part in case.reason.split("|")) for detail in reasons), reasons


@pytest.mark.parametrize("case", FOLDS, ids=str)
def test_nothing_of_mabn_or_cenconv_is_left_where_all_folds(case: Case) -> None:
    folded, report = fold(_trained(case), (torch.randn(case.shape),))
    ours = (MABN1d, MABN2d, MABN3d, CenConv1d, CenConv2d, CenConv3d, CenConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d)
    assert not [type(module).__name__ for module in folded.modules() if isinstance(module, ours)]
    assert report.modified


@pytest.mark.parametrize("case", FOLDS + STAYS, ids=str)
def test_second_fold_changes_nothing(case: Case) -> None:
    x = torch.randn(case.shape)
    once, _ = fold(_trained(case), (x,))
    twice, report = fold(once, (x,))
    assert not report.modified, report.changes
    assert repr(twice) == repr(once)
    before, after = once.state_dict(), twice.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("case", FOLDS + STAYS, ids=str)
def test_network_given_is_left_untouched(case: Case) -> None:
    network = _trained(case).train()
    before = copy.deepcopy(network.state_dict())
    shape, gradients = repr(network), [parameter.requires_grad for parameter in network.parameters()]
    fold(network, (torch.randn(case.shape),))
    assert network.training
    assert repr(network) == shape
    assert [parameter.requires_grad for parameter in network.parameters()] == gradients
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


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
    _, report = fold(Deeper().eval(), (torch.randn(2, 3, 9, 7),))
    assert {change.layer: change.detail for change in report.changes} == {
        "norms.late": "into body.last",
        "norms.early": "into body.first",
        "body.last": "weight centred, now Conv2d",
    }
    assert report.found == Counter(MABN2d=1, BatchNorm2d=1, CenConv2d=1)


def test_network_that_branches_on_a_size_folds_once_that_size_is_fixed() -> None:
    case = next(case for case in STAYS if case.name == "control_flow_on_the_batch")
    network, x = _trained(case), torch.randn(case.shape)
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


def test_chain_of_normalizations_is_rounded_once() -> None:
    network = _trained(next(case for case in FOLDS if case.name == "norm_after_norm")).half()
    folded, _ = fold(network, (torch.randn(2, 3, 5, 5).half(),))
    conv, first, second = network
    scale = first.weight.double() / (first.running_var.double() + first.eps).sqrt()
    scale = scale * second.weight.double() / (second.running_var.double() + second.eps).sqrt()
    assert torch.equal(folded[0].weight, (conv.weight.double() * scale[:, None, None, None]).half())


def test_half_precision_network_folds_in_float64() -> None:
    """Computed in float16 the scale alone would carry 1e-3 of error; rounded once, half an ulp of the weight."""
    network = _trained(FOLDS[1]).half()
    folded, _ = fold(network, (torch.randn(2, 4, 5, 5).half(),))
    conv, norm = network[0], network[1]
    weight = conv.weight.double()
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert torch.equal(folded[0].weight, (centred * scale[:, None, None, None]).half())
