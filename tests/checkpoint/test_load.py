"""Every kind of file that load accepts, and what it says about each."""

from __future__ import annotations

import errno
import hashlib
import re
import shlex
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import FACTORY, rewritten, saved
from tolerances import EXACT
from torch import Tensor, nn

from deploynorm.checkpoint import load, save
from deploynorm.errors import InputError, ModelError
from deploynorm.image import ImageSpec
from deploynorm.layers import FRN2d, MABN2d
from deploynorm.models.frn_resnet import resnet20

KWARGS = {"num_classes": 2, "in_channels": 1}
IMAGE = ImageSpec((1, 8, 8), (0.25,), (0.5,))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet20(**KWARGS).eval()


def assert_same(got: nn.Module, want: nn.Module, channels: int = 1) -> None:
    x = torch.randn(2, channels, 40, 33, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(got(x), want(x), **EXACT.kwargs())


def test_a_saved_checkpoint_comes_back_whole_and_silently(
    tmp_path: Path, network: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    training = {"accuracy": 0.75, "history": [1, 2.5, None, True], "options": {"lr": 0.1}}
    rest = {"image": IMAGE, "labels": ["cat", "dog"], "training": training}
    save(path, factory=FACTORY, kwargs=KWARGS, model=network.train(), **rest)
    got = load(path)
    network.eval()
    assert_same(got.model, network)
    assert not got.model.training
    assert (got.kind, got.factory) == ("deploynorm", FACTORY)
    assert (got.image, got.labels, got.training) == (IMAGE, ("cat", "dog"), training)
    assert (got.path, got.sha256) == (path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert (got.example_inputs, got.exported, got.notes) == (None, None, ())
    assert capfd.readouterr() == ("", "")
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"format", "factory", "kwargs", "input", "labels", "training", "state_dict"}
    assert (content["format"], content["kwargs"]) == ("deploynorm", KWARGS)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"kwargs": {"block": nn.ReLU}}, InputError),
        ({"labels": ["cat", 1]}, InputError),
        ({"training": {"rate": np.float64(0.1), "seen": [{"at": torch.ones(1)}]}}, InputError),
        ({"factory": "deploynorm.models.train:main"}, ModelError),
        ({"factory": "deploynorm.models.frn_resnet:resnet21"}, ModelError),
        ({"factory": "nets.unet"}, ModelError),
        ({"a disk": "that is full"}, InputError),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else value.__name__,
)
def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, network: nn.Module, wrong: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(file: Path, content: object) -> None:
        file.write_text("half")
        raise OSError(errno.ENOSPC, "disk full")

    path = tmp_path / "model.pt"
    path.write_text("old")
    if "a disk" in wrong:
        wrong = {}
        monkeypatch.setattr(Path, "write_bytes", break_off)
    with pytest.raises(error):
        save(path, **{"factory": FACTORY, "kwargs": KWARGS, "model": network, **wrong})
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.pt", "old")]


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("wrap", "notes"),
    [
        pytest.param(dict, [], id="bare"),
        pytest.param(lambda state: {"model": state, "epoch": 3}, ["under 'model'"], id="model"),
        pytest.param(lambda state: {"state_dict": state}, ["under 'state_dict'"], id="state_dict"),
        pytest.param(lambda state: {"ema": state, "optimizer": {}}, ["under 'ema'"], id="ema"),
        pytest.param(
            lambda state: {"ema": prefixed("other.")(state), "state_dict": state},
            ["under 'state_dict'; the one under 'ema' is not used"],
            id="two",
        ),
        pytest.param(prefixed("module."), ["'module.' of DataParallel"], id="DataParallel"),
        pytest.param(prefixed("_orig_mod."), ["'_orig_mod.' of torch.compile"], id="compile"),
        pytest.param(
            lambda state: {"model": prefixed("module._orig_mod.")(state)},
            ["under 'model'", "'module.' of DataParallel", "'_orig_mod.' of torch.compile"],
            id="all",
        ),
    ],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_state_dict_is_found_and_its_prefixes_are_noted(
    tmp_path: Path, network: nn.Module, wrap: Callable[[dict[str, Tensor]], Any], notes: list[str], legacy: bool
) -> None:
    torch.save(wrap(network.state_dict()), tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    got = load(tmp_path / "w.pt", factory=FACTORY, kwargs=KWARGS)
    assert (got.kind, got.factory, len(got.notes)) == ("state_dict", FACTORY, len(notes))
    assert all(part in note for part, note in zip(notes, got.notes, strict=True))
    assert_same(got.model, network)


NETS = """
import torch
from torch import nn

class Wrapped(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.module = nn.Conv2d(1, width, 3)

    def forward(self, x):
        return self.module(x)

def wide():
    return Wrapped(6)
"""


@pytest.fixture
def nets(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the user's module `user_nets`, whose network has a part called `module`."""
    (here / "user_nets.py").write_text(NETS)
    monkeypatch.delitem(sys.modules, "user_nets", raising=False)
    return here


def test_a_part_that_is_called_module_keeps_its_name(nets: Path) -> None:
    state = {"module.weight": torch.ones(4, 1, 3, 3), "module.bias": torch.ones(4)}
    torch.save(state, nets / "w.pt")
    got = load(nets / "w.pt", factory="user_nets:Wrapped")
    assert got.notes == ()
    assert bool((got.model.module.weight == 1).all())
    torch.save(prefixed("module.")(state), nets / "w.pt")
    assert len(load(nets / "w.pt", factory="user_nets:Wrapped").notes) == 1


def test_the_current_directory_is_searched_for_typed_factories_and_left_again(nets: Path) -> None:
    torch.save({"module.weight": torch.ones(6, 1, 3, 3), "module.bias": torch.ones(6)}, nets / "w.pt")
    before = list(sys.path)
    assert load(nets / "w.pt", factory="user_nets:wide").model.module.out_channels == 6
    assert load(nets / "w.pt", factory="user_nets:Wrapped", kwargs={"width": 6}).model.module.out_channels == 6
    assert sys.path == before


def test_the_refusal_of_an_own_network_has_the_command_that_loads_it(nets: Path) -> None:
    path = nets / "own network.pt"
    network = nn.ModuleDict({"module": nn.Conv2d(1, 5, 3)})
    save(path, factory="user_nets:Wrapped", kwargs={"width": 5}, model=network, labels=["cat"])
    with pytest.raises(ModelError) as refused:
        load(path)
    command = re.search(r"(deploynorm export .*), or deploynorm\.load\(\.\.\., (factory=.*)\);", str(refused.value))
    assert command is not None
    assert shlex.split(command[1]) == ["deploynorm", "export", str(path), "--factory", "user_nets:Wrapped"]
    assert command[2] == "factory='user_nets:Wrapped'"
    got = load(path, factory="user_nets:Wrapped")
    assert (got.model.module.out_channels, got.labels) == (5, ("cat",))


def test_a_typed_factory_and_typed_arguments_win_over_those_in_the_file(nets: Path, network: nn.Module) -> None:
    (nets / "user_nets.py").write_text("from deploynorm.models.frn_resnet import resnet20 as mine")
    save(nets / "model.pt", factory="elsewhere:gone", kwargs={"num_classes": 9}, model=network)
    got = load(nets / "model.pt", factory="user_nets:mine", kwargs=KWARGS)
    assert (got.factory, got.kind) == ("user_nets:mine", "deploynorm")
    assert_same(got.model, network)
    save(nets / "model.pt", factory="elsewhere:gone", kwargs=KWARGS, model=network)
    assert_same(load(nets / "model.pt", factory="user_nets:mine").model, network)


@pytest.mark.parametrize(
    "build",
    [
        lambda: resnet20(**KWARGS),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), FRN2d(4, learned_eps="layer"), MABN2d(4), nn.AdaptiveAvgPool2d(1)),
    ],
    ids=["deploynorm.models", "torch.nn"],
)
def test_a_pickled_network_of_known_classes_is_read(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    network = build()
    torch.save(network, tmp_path / "net.pt")
    safe = torch.serialization.get_safe_globals()
    got = load(tmp_path / "net.pt")
    assert (got.kind, got.factory, got.notes, got.model.training) == ("module", None, (), False)
    assert_same(got.model, network.eval())
    assert set(torch.serialization.get_safe_globals()) == set(safe)


def test_a_pickled_timm_network_is_read(tmp_path: Path, timm: ModuleType) -> None:
    network = timm.create_model("regnety_002", norm_layer="frntlu", num_classes=3)
    torch.save(network, tmp_path / "net.pt")
    got = load(tmp_path / "net.pt")
    assert got.kind == "module"
    assert_same(got.model, network.eval(), channels=3)


def test_data_parallel_is_taken_off_a_pickled_network(tmp_path: Path, network: nn.Module) -> None:
    torch.save(nn.DataParallel(network), tmp_path / "net.pt")
    got = load(tmp_path / "net.pt")
    assert got.notes == ("DataParallel was removed from the network",)
    assert_same(got.model, network)


def test_a_pickled_network_gives_its_weights_to_a_typed_factory(nets: Path) -> None:
    torch.save(nn.ModuleDict({"module": nn.Conv2d(1, 4, 3)}), nets / "net.pt")
    got = load(nets / "net.pt", factory="user_nets:Wrapped")
    assert (type(got.model).__name__, got.factory) == ("Wrapped", "user_nets:Wrapped")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_exported_program_computes_the_same_on_the_cpu(
    tmp_path: Path, traced: nn.Module, pt2: bytes, device: str, capfd: Any
) -> None:
    def placed(name: str, content: bytes) -> bytes:
        return content.replace(b'"type": "cpu"', f'"type": "{device}"'.encode()) if name.endswith("json") else content

    (tmp_path / "m.pt2").write_bytes(rewritten(pt2, placed, {"extra/notes.txt": b"any"}))
    got = load(tmp_path / "m.pt2")
    assert got.kind == "pt2"
    assert got.exported is not None
    assert got.example_inputs is not None
    torch.testing.assert_close(dict(got.example_inputs), {"input": torch.ones(2, 3, 16, 20)}, **EXACT.kwargs())
    assert_same(got.model, traced, channels=3)
    with pytest.raises(AssertionError, match="Guard failed"):
        got.model(torch.randn(1, 3, 4, 20))
    assert capfd.readouterr() == ("", "")


def test_an_archive_with_pickled_weights_as_torch_2_8_wrote_them_is_read(
    tmp_path: Path, traced: nn.Module, pt2: bytes, capfd: Any
) -> None:
    def dropped(name: str, content: bytes) -> bytes | None:
        return None if name.startswith(("data/weights", "data/constants")) else content

    state = dict(traced.state_dict(keep_vars=True))
    add = {"data/weights/model.pt": saved(state), "data/constants/model.pt": saved({})}
    (tmp_path / "m.pt2").write_bytes(rewritten(pt2, dropped, add))
    assert_same(load(tmp_path / "m.pt2").model, traced, channels=3)
    assert capfd.readouterr() == ("", "")


def test_an_expression_survives_that_a_deeper_network_needs(tmp_path: Path) -> None:
    class Resized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.interpolate(x[:, :, ::2], scale_factor=1.5)
            return y.flatten(1) * x.shape[0]

    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Resized(), (torch.ones(2, 3, 16, 20),), dynamic_shapes=(free,))
    torch.export.save(program, tmp_path / "m.pt2")
    assert_same(load(tmp_path / "m.pt2").model, Resized(), channels=3)


def test_trust_reads_classes_and_values_that_are_refused_otherwise(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.path)
    with monkeypatch.context() as patched:
        patched.syspath_prepend(nets)
        import user_nets  # type: ignore[import-not-found]
    torch.save(user_nets.Wrapped(), nets / "net.pt")
    del sys.modules["user_nets"]
    with pytest.raises(ModelError, match=r"user_nets\.Wrapped"):
        load(nets / "net.pt")
    assert type(load(nets / "net.pt", trust_pickle=True).model).__name__ == "Wrapped"
    content = {
        "model": {"module.weight": torch.ones(4, 1, 3, 3), "module.bias": torch.ones(4)},
        "accuracy": Fraction(1, 2),
    }
    torch.save(content, nets / "w.pt")
    with pytest.raises(ModelError, match=r"fractions\.Fraction"):
        load(nets / "w.pt", factory="user_nets:Wrapped")
    assert load(nets / "w.pt", factory="user_nets:Wrapped", trust_pickle=True).kind == "state_dict"
    assert sys.path == before
