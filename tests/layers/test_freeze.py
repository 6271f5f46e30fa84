"""Frozen MABN: what it computes, what it leaves alone, and how it is undone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from mabn_steps import SHORT, C, batches, new_layer, run_step, trained_affine
from tolerances import EXACT, FLOAT64, FOLD_FLOAT32, OP_FLOAT32
from torch import Tensor, nn

import deploynorm
from deploynorm.errors import InputError
from deploynorm.layers import CenConv2d, FRN2d, MABN2d
from deploynorm.layers.freeze import freeze_mabn, unfreeze_mabn
from deploynorm.layers.recalibration import recalibrate


def new_net(**settings: Any) -> nn.Module:
    """A stem and two stages, trained for some steps."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for name in ("stem", "stage1", "stage2"):
        layers = CenConv2d(C, C, 3, padding=1, dtype=torch.float64), MABN2d(C, **{**SHORT, **settings}), nn.ReLU()
        net.add_module(name, nn.Sequential(*layers))
    steps(net, 10)
    return net


def steps(net: nn.Module, count: int) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    for x, _ in batches(count, (4, 4), range(2, 4), scaled=False):
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def changed_norms(net: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name in changed(net, before) if ".1." in name}


STATE = {"weight", "bias", "running_var", "num_batches_tracked", "recent_x2", "recent_gz"}


def test_a_frozen_layer_computes_in_training_what_it_computes_in_evaluation_with_its_true_gradients() -> None:
    layer = new_layer()
    for x, dy in batches(12, (3, 3), range(2, 4)):
        run_step(layer, x, dy)
    evaluated = copy.deepcopy(layer).eval()
    freeze_mabn(layer, affine=False)
    before = copy.deepcopy(layer.state_dict())
    scale = (layer.weight / (layer.running_var + layer.eps).sqrt()).detach().reshape(C, 1, 1)
    for x, dy in batches(4, (3, 3), range(2, 4)):
        y, dx, dw, db = run_step(layer.train(), x, dy)
        torch.testing.assert_close((y, dx, dw, db), run_step(evaluated, x, dy), **EXACT.kwargs())
        torch.testing.assert_close(dx, dy * scale, **FLOAT64.kwargs())
        torch.testing.assert_close(db, dy.sum((0, 2, 3)), **FLOAT64.kwargs())
    assert not changed(layer, before)
    assert torch.autograd.gradcheck(layer, torch.randn(2, C, 2, 2, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("affine", [True, False], ids=["with_affine", "statistics_only"])
def test_training_a_frozen_network_moves_its_convolutions_and_no_statistic(affine: bool) -> None:
    net = new_net()
    norm = net.get_submodule("stem.1")
    assert norm.weight.grad is not None
    assert freeze_mabn(net, affine=affine) == ["stem.1", "stage1.1", "stage2.1"]
    assert (norm.weight.grad is None) == affine, "an optimizer would still apply the gradient of what is frozen"
    before = copy.deepcopy(net.state_dict())
    net.eval()
    net.train()
    steps(net, 5)
    moving = [f"{stage}.{i}" for stage in ("stem", "stage1", "stage2") for i in ((0,) if affine else (0, 1))]
    assert changed(net, before) == {f"{layer}.{name}" for layer in moving for name in ("weight", "bias")}


def test_a_part_of_the_network_is_frozen_by_its_name() -> None:
    net = new_net()
    assert freeze_mabn(net, "stage1") == ["stage1.1"]
    assert freeze_mabn(net, ["stem.1"]) == ["stem.1"]
    before = copy.deepcopy(net.state_dict())
    steps(net, 3)
    assert changed_norms(net, before) == {f"stage2.1.{name}" for name in STATE}
    assert unfreeze_mabn(net, "stem") == ["stem.1"]
    assert unfreeze_mabn(net) == ["stage1.1"]
    assert unfreeze_mabn(net) == []


def test_unfreezing_is_the_inverse_whatever_was_trained_before() -> None:
    net = new_net()
    net.get_parameter("stem.1.weight").requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in net.named_parameters()}
    twin = copy.deepcopy(net)
    for affine in (True, False, True):  # freezing twice is freezing once
        freeze_mabn(net, affine=affine)
    assert not any(p.requires_grad for name, p in net.named_parameters() if ".1." in name)
    unfreeze_mabn(net)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == wanted
    for module in (net, twin):
        steps(module, 6)
    assert not changed(net, twin.state_dict())


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_copies_stay_frozen_and_can_be_unfrozen(twin_of: Any) -> None:
    net = new_net()
    freeze_mabn(net)
    twin = twin_of(net)
    before = copy.deepcopy(twin.state_dict())
    steps(twin, 3)
    assert not changed_norms(twin, before)
    assert len(unfreeze_mabn(twin)) == 3
    steps(twin, 3)
    assert {f"stem.1.{name}" for name in STATE} <= changed(twin, before)
    assert not any(p.requires_grad for name, p in net.named_parameters() if ".1." in name)


def test_a_state_dict_goes_in_and_out_of_a_frozen_network() -> None:
    net, fresh = new_net(), new_net(momentum=0.5)
    freeze_mabn(fresh)
    assert fresh.state_dict().keys() == net.state_dict().keys()
    fresh.load_state_dict(net.state_dict())
    before = copy.deepcopy(net.state_dict())
    steps(fresh, 3)
    assert not changed_norms(fresh, before)
    assert "frozen=True" in repr(fresh)


def test_a_frozen_network_folds_and_exports_as_before() -> None:
    net = new_net().float()
    example = (torch.randn(2, C, 4, 4),)
    freeze_mabn(net)
    folded, report = deploynorm.fold(net, example)
    assert not [layer for layer in folded.modules() if isinstance(layer, MABN2d)]
    assert len(report.with_outcome("folded")) > 0
    torch.testing.assert_close(folded(*example), copy.deepcopy(net).eval()(*example), **FOLD_FLOAT32.kwargs())
    nodes = deploynorm.export(folded, example).model.graph
    assert [node.op_type for node in nodes] == ["Conv", "Relu"] * 3


def test_a_frozen_layer_is_exported_in_training_mode_as_in_evaluation() -> None:
    layer = trained_affine(MABN2d(C, warmup=1))
    freeze_mabn(layer)
    program = torch.export.export(layer.train(), (torch.randn(2, C, 3, 3),))
    assert not program.graph_signature.buffers_to_mutate
    x = torch.randn(2, C, 3, 3)
    torch.testing.assert_close(program.module()(x), layer(x), **OP_FLOAT32.kwargs())


@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be instantiated")  # by dynamo
def test_freezing_reaches_a_compiled_network() -> None:
    net = new_net()
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x = torch.randn(2, C, 4, 4, dtype=torch.float64)
    compiled(x)
    freeze_mabn(compiled)
    before = copy.deepcopy(net.state_dict())
    torch.testing.assert_close(compiled(x), copy.deepcopy(net).eval()(x), **FLOAT64.kwargs())
    assert not changed(net, before)


def test_recalibrate_leaves_frozen_layers_alone() -> None:
    net = new_net()
    freeze_mabn(net, "stem")
    before = copy.deepcopy(net.state_dict())
    assert recalibrate(net, [torch.randn(4, C, 4, 4, dtype=torch.float64)]).keys() == {"stage1.1", "stage2.1"}
    assert changed(net, before) == {"stage1.1.running_var", "stage2.1.running_var"}


def test_a_shared_layer_is_found_under_each_of_its_names() -> None:
    norm = MABN2d(C)
    net = nn.ModuleDict({"a": norm, "b": norm})
    assert freeze_mabn(net, "b") == ["b"]
    assert norm.frozen
    assert freeze_mabn(net) == ["a", "b"]


def test_nothing_to_freeze_is_refused() -> None:
    net = new_net()
    with pytest.raises(InputError, match=r"^freeze_mabn: no such submodule\. Got 'stage9'; expected a name that"):
        freeze_mabn(net, "stage9")
    with pytest.raises(InputError, match=r"^freeze_mabn: there is no MABN\. Got 'stem\.0'"):
        freeze_mabn(net, ["stem", "stem.0"])
    with pytest.raises(InputError, match=r"^unfreeze_mabn: there is no MABN\. Got FRN2d"):
        unfreeze_mabn(FRN2d(C))
    assert not any(layer.frozen for layer in net.modules() if isinstance(layer, MABN2d)), "all or none"
