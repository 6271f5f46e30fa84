"""Checkpoints of other projects through the network of a factory, as files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import EXACT, PLANE_FLOAT32
from torch import Tensor, nn

from deploynorm.checkpoint import import_checkpoint, load, save
from deploynorm.errors import InputError, ModelError
from deploynorm.layers import FRN2d

NETS = """
from collections import OrderedDict
from torch import nn
from deploynorm.layers import CenConv2d, FRN2d, MABN2d, TLU

def named(**layers):
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), **layers))

def frn(**settings):
    return named(norm=FRN2d(4, **settings))

def separate():
    return named(norm=FRN2d(4, tlu=False), act=TLU(4))

def merged():
    return named(norm=FRN2d(4), act=nn.Identity())

def other_names():
    return named(normalization=FRN2d(4))

def theirs():
    return named(norm=nn.BatchNorm2d(4))

def mabn(convolution=nn.Conv2d, **settings):
    return nn.Sequential(OrderedDict(conv=convolution(3, 4, 3), norm=MABN2d(4, **settings)))

def cenconv():
    return mabn(CenConv2d)
"""


@pytest.fixture
def nets(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's module `import_nets`, in the current directory, where the files are written too."""
    (here / "import_nets.py").write_text(NETS)
    sys.modules.pop("import_nets", None)


def conv() -> dict[str, Tensor]:
    return nn.Conv2d(3, 4, 3).state_dict(prefix="conv.")


def row() -> Tensor:
    return torch.randn(1, 4, 1, 1)


def greek() -> dict[str, Tensor]:
    layer = {"gamma": row(), "beta": row(), "tau": row(), "eps": torch.tensor([-3e-5])}
    return {**conv(), **{f"norm.{name}": tensor for name, tensor in layer.items()}}


def plain() -> dict[str, Tensor]:
    return {**conv(), "norm.weight": row(), "norm.bias": row(), "norm.eps": torch.tensor([2e-5]), "act.tau": row()}


def mabn() -> dict[str, Tensor]:
    layer = {"weight": torch.rand(4), "bias": torch.rand(4), "running_var": torch.rand(1, 4, 1, 1) + 0.5}
    layer |= {"iters": torch.tensor([5]), "buffer_x2": torch.rand(16, 4), "buffer_gz": torch.rand(16, 4)}
    return {**conv(), **{f"norm.{name}": tensor for name, tensor in layer.items()}}


def computed(state: Mapping[str, Tensor], x: Tensor, tau: str) -> Tensor:
    y = nn.functional.conv2d(x, state["conv.weight"], state["conv.bias"])
    names = ("gamma", "beta") if "norm.gamma" in state else ("weight", "bias")
    weight, bias = (state[f"norm.{name}"] for name in names)
    y = weight * y / (y.square().mean((2, 3), keepdim=True) + state["norm.eps"].abs()).sqrt() + bias
    return torch.maximum(y, state[tau])


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("file", "tau", "factory"),
    [(greek, "norm.tau", "frn"), (plain, "act.tau", "separate"), (plain, "act.tau", "merged")],
    ids=["frn", "separate", "merged"],
)
def test_the_network_of_the_factory_computes_as_theirs_and_as_the_checkpoint_that_is_written(
    file: Callable[[], dict[str, Tensor]], tau: str, factory: str
) -> None:
    state = {name: tensor.double() for name, tensor in file().items()}
    torch.save({"model": {f"module.{name}": tensor.float() for name, tensor in state.items()}}, "theirs.pth")
    imported = import_checkpoint("theirs.pth", factory=f"import_nets:{factory}")
    imported.save("model.pt")
    x = torch.randn(2, 3, 8, 9) * 1e-2
    want = computed(state, x.double(), tau).float()
    assert imported.network is not None
    assert not imported.network.training
    for network in (imported.network, load("model.pt", factory=f"import_nets:{factory}").model):
        with torch.no_grad():
            assert float((network(x) - want).abs().max()) <= 1e-5 * float(want.abs().max())
    printed = str(imported)
    assert "the prefix 'module.' of DataParallel was removed" in printed
    assert "the state dict is under 'model'" in printed


@pytest.mark.usefixtures("nets")
def test_without_a_factory_a_state_dict_is_written_that_load_takes() -> None:
    torch.save({f"net.{name}": tensor for name, tensor in greek().items()}, "theirs.pth")
    imported = import_checkpoint("theirs.pth", strip_prefix="net")
    imported.save("model.pt")
    assert imported.network is None
    layer = load("model.pt", factory="import_nets:frn").model.get_submodule("norm")
    torch.testing.assert_close(layer.eps, torch.full((4,), 3e-5), **PLANE_FLOAT32.kwargs())
    whole = import_checkpoint("theirs.pth", strip_prefix="net", factory="import_nets:frn").network
    assert whole is not None
    torch.testing.assert_close(whole.get_submodule("norm").state_dict(), layer.state_dict(), **EXACT.kwargs())


@pytest.mark.usefixtures("nets")
def test_a_network_of_mabn_without_centred_convolutions_is_told() -> None:
    torch.save(mabn(), "theirs.pth")
    assert "the network has no CenConv2d" in str(import_checkpoint("theirs.pth", factory="import_nets:mabn"))
    assert "no CenConv2d" not in str(import_checkpoint("theirs.pth", factory="import_nets:cenconv"))


def without(file: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in file.items() if key != name}


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "other names": (
        greek,
        {"factory": "other_names"},
        r"missing from the file: normalization.weight.*alike: norm.weight in the file and normalization.weight in the",
    ),
    "missing": (lambda: without(greek(), "conv.bias"), {"factory": "frn"}, "1 missing from the file: conv.bias"),
    "unexpected": (lambda: {**greek(), "head.w": row()}, {"factory": "frn"}, "1 unknown to the network: head.w"),
    "of another shape": (
        lambda: {**greek(), "conv.bias": torch.ones(5)}, {"factory": "frn"}, r"conv.bias \(5,\) in the file, \(4,\)",
    ),
    "their layer": (
        greek,
        {"factory": "theirs"},
        r"norm is another layer in the network of the factory. Got torch\.nn\.\S+BatchNorm2d; "
        r"expected deploynorm\.layers\.FRN2d\(4\)\. Fix: build the network with our layers",
    ),
    "no threshold": (
        greek, {"factory": "frn", "factory_kwargs": {"tlu": False}}, r"FRN2d with no threshold; .*FRN2d\(4\)",
    ),
    "a threshold": (
        lambda: without(plain(), "act.tau"), {"factory": "frn"}, r"Got FRN2d with a threshold; .*FRN2d\(4, tlu=False\)",
    ),
    "epsilon of mabn": (mabn, {"factory": "mabn", "factory_kwargs": {"eps": 1e-3}}, r"with eps=0.001; .*eps=1e-05"),
    "epsilon below the bound": (
        greek, {"factory": "frn", "factory_kwargs": {"learned_eps": "layer", "eps": 1e-2}}, "below the lower bound",
    ),
    "nan in a norm, without a network": (
        lambda: {**greek(), "norm.beta": torch.full((1, 4, 1, 1), torch.nan)}, {}, "NaN or infinity in 1 .*norm.bias",
    ),
    "nan": (lambda: {**greek(), "conv.bias": torch.full((4,), torch.nan)}, {"factory": "frn"}, "NaN or infinity in 1"),
    "arguments without a factory": (greek, {"factory_kwargs": {}}, "arguments of a factory, and no factory"),
    "no weights": (lambda: {"epoch": 1}, {}, "neither a network nor a state dict"),
    "wrong key": (lambda: {"model": greek()}, {"key": "ema"}, "has no network and no state dict there. Got ema"),
    "wrong prefix": (greek, {"strip_prefix": "net."}, "no name in theirs.pth begins so"),
}  # fmt: skip


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(("content", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(content: Callable[[], Any], given: dict[str, Any], message: str) -> None:
    torch.save(content(), "theirs.pth")
    if "factory" in given:
        given = {**given, "factory": f"import_nets:{given['factory']}"}
    with pytest.raises((InputError, ModelError), match=message):
        import_checkpoint("theirs.pth", **given)


@pytest.mark.usefixtures("nets")
def test_load_of_layers_of_another_project_names_import() -> None:
    torch.save(greek(), "theirs.pth")
    with pytest.raises(ModelError, match=r"Fix: its FRN or MABN layers are another project's: deploynorm import makes"):
        load("theirs.pth", factory="import_nets:frn")
    torch.save({**greek(), "norm.eps": torch.ones(1, device="meta")}, "theirs.pth")
    with pytest.raises(ModelError, match=r"tensors without values .* Fix: write the file again"):
        load("theirs.pth", factory="import_nets:frn")
    torch.save(without(FRN2d(4).state_dict(prefix="norm."), "norm.bias"), "ours.pth")
    with pytest.raises(ModelError, match="Fix: give the factory"):
        load("ours.pth", factory="import_nets:frn")


@pytest.mark.usefixtures("here")
def test_our_own_checkpoints_and_archives_are_refused() -> None:
    save("own.pt", factory="nets:frn", model=FRN2d(4))
    with pytest.raises(ModelError, match=r"a deploynorm checkpoint: nothing to import\. Fix: give it to"):
        import_checkpoint("own.pt")
    program = torch.export.export(FRN2d(4), (torch.ones(1, 4, 2, 2),))
    torch.export.save(program, "own.pt2")
    with pytest.raises(ModelError, match=r"a torch.export archive: nothing to import"):
        import_checkpoint("own.pt2")
