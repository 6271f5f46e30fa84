"""Where weights are found in a file, what training put around their names, and that nothing beside them is lost."""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import saved
from safetensors.torch import save_file
from tolerances import EXACT
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from deploynorm.checkpoint import load, save
from deploynorm.errors import BackendError, InputError, ModelError

NETS = """
import torch
from torch import nn

def conv():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1))

def lazy():
    return nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d())

def parallel():
    return nn.DataParallel(conv())

class Scaled(nn.Module):
    '''Version 1 kept the logarithm of the scale.'''

    _version = 2

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(2))

    def _load_from_state_dict(self, state, prefix, versions, *rest):
        if versions.get("version", 1) < 2:
            state[prefix + "scale"] = state[prefix + "scale"].exp()
        super()._load_from_state_dict(state, prefix, versions, *rest)

    def forward(self, x):
        return x * self.scale[:, None, None]

class Versioned(nn.Sequential):
    _version = 3

    def _load_from_state_dict(self, state, prefix, versions, *rest):
        if versions.get("version") != 3:
            raise ValueError("of an unknown version")
        super()._load_from_state_dict(state, prefix, versions, *rest)

def scaled():
    return Versioned(nn.Conv2d(1, 2, 3), Scaled())

class Remembering(nn.Conv2d):
    memory = None

    def get_extra_state(self):
        return {"seen": self.memory}

    def set_extra_state(self, state):
        self.memory = state["seen"]

def remembering():
    return nn.Sequential(Remembering(1, 2, 3))
"""


@pytest.fixture
def nets(here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The user's module `weights_nets`, in the current directory, where the files are written too."""
    (here / "weights_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(here)
    sys.modules.pop("weights_nets", None)
    import weights_nets  # type: ignore[import-not-found]

    return weights_nets


def assert_same(got: nn.Module, want: nn.Module) -> None:
    x = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(got.eval()(x), want.eval()(x), **EXACT.kwargs())


def written(content: object, name: str = "w.pt") -> Path:
    torch.save(content, name)
    return Path(name)


def named(state: dict[str, Tensor], name: Callable[[str], str]) -> dict[str, Tensor]:
    return {name(old): tensor for old, tensor in state.items()}


@pytest.mark.parametrize(
    ("keys", "used"),
    [
        ("state_dict state_dict_ema", "state_dict_ema"),
        ("state_dict model_ema", "model_ema"),
        ("model model_ema state_dict", "model_ema"),
        ("model state_dict", "state_dict"),
        ("ema model", "model"),
        ("net", "net"),
        ("teacher model", "model"),
    ],
)
def test_an_average_is_taken_before_the_raw_weights_and_the_others_are_named(nets: Any, keys: str, used: str) -> None:
    networks = {key: nets.conv() for key in keys.split()}
    states = {key: network.state_dict() for key, network in networks.items()}
    path = written({"epoch": 3, **states, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {0: {"step": 1}}}})
    got = load(path, factory="weights_nets:conv")
    assert_same(got.model, networks[used])
    (note,) = got.notes
    assert note.startswith(f"the state dict is under {used!r}")
    assert all(f"{key!r} is not used" in note for key in networks if key != used)
    assert ("--key" in note) == (len(networks) > 1)
    for key, network in networks.items():
        assert_same(load(path, factory="weights_nets:conv", key=key).model, network)


def test_a_training_checkpoint_of_timm_gives_its_average(timm: ModuleType, tmp_path: Path) -> None:
    from timm.utils import CheckpointSaver, ModelEmaV2

    arguments = {"model_name": "regnety_002", "num_classes": 3}
    network = timm.create_model(**arguments)
    average = ModelEmaV2(network)
    torch.nn.init.normal_(average.module.stem.conv.weight)
    parsed = argparse.Namespace(model="regnety_002", lr=0.1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    saver = CheckpointSaver(network, optimizer, parsed, average, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    saver.save_checkpoint(0, metric=80.5)
    got = load(tmp_path / "last.pth.tar", factory="timm:create_model", kwargs=arguments)
    assert "the state dict is under 'state_dict_ema'; the one under 'state_dict' is not used" in got.notes[0]
    assert torch.equal(got.model.stem.conv.weight, average.module.stem.conv.weight)


def test_weights_in_a_dict_in_a_dict_are_found(nets: Any) -> None:
    network = nets.conv()
    path = written({"ema": {"module": network.state_dict(), "updates": 7}, "epoch": 3})
    for key in (None, "ema.module"):
        got = load(path, factory="weights_nets:conv", key=key)
        assert "under 'ema.module'" in got.notes[0]
        assert_same(got.model, network)


def test_several_unknown_keys_are_listed_and_a_wrong_key_is_refused(nets: Any) -> None:
    state = nets.conv().state_dict()
    path = written({"teacher": state, "student": state})
    with pytest.raises(ModelError, match=r"several state dicts.* Got teacher, student; .*--key"):
        load(path, factory="weights_nets:conv")
    with pytest.raises(InputError, match="Got tutor; expected teacher, student"):
        load(path, factory="weights_nets:conv", key="tutor")
    with pytest.raises(InputError, match="expected no --key"):
        load(written(state), factory="weights_nets:conv", key="model")


def test_a_network_under_a_key_is_read(nets: Any) -> None:
    first, second = nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Sequential(nn.Conv2d(1, 2, 3))
    path = written({"model": first, "ema": second, "epoch": 3})
    got = load(path)
    assert (got.kind, got.notes) == (
        "module",
        ("the network is under 'model'; the one under 'ema' is not used; --key chooses",),
    )
    assert_same(got.model, first)
    assert_same(load(path, key="ema").model, second)
    path = written({"model": nets.scaled()})
    with pytest.raises(ModelError, match=r"weights_nets\.Scaled"):
        load(path)
    assert type(load(path, trust_pickle=True).model).__name__ == "Versioned"


class OptimizedModule(nn.Module):
    """As torch.compile wraps a network, without its warnings."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._orig_mod = network


WRAPPED: dict[str, tuple[Callable[[nn.Module], Any], list[str]]] = {
    "AveragedModel": (lambda net: AveragedModel(net).state_dict(), ["'module.' of AveragedModel"]),
    "compiled average": (
        lambda net: OptimizedModule(AveragedModel(net)).state_dict(),
        ["'_orig_mod.' of torch.compile", "'module.' of AveragedModel"],
    ),
    "Lightning": (
        lambda net: {"state_dict": nn.ModuleDict({"model": net}).state_dict(), "epoch": 3},
        ["under 'state_dict'", "'model.' of Lightning"],
    ),
    "compiled in Lightning": (
        lambda net: nn.ModuleDict({"model": OptimizedModule(net)}).state_dict(),
        ["'model.' of Lightning", "'_orig_mod.' of torch.compile"],
    ),
    "a compiled part": (
        lambda net: type(net)(OptimizedModule(net[0]), net[1]).state_dict(),
        ["names of compiled or parallel parts"],
    ),
    "a parallel part": (
        lambda net: type(net)(net[0], nn.DataParallel(net[1])).state_dict(),
        ["names of compiled or parallel parts"],
    ),
}


@pytest.mark.parametrize("factory", ["conv", "scaled"])
@pytest.mark.parametrize(("wrap", "notes"), WRAPPED.values(), ids=WRAPPED)
def test_what_training_put_around_the_names_is_removed_and_the_versions_stay(
    nets: Any, wrap: Callable[[nn.Module], Any], notes: list[str], factory: str
) -> None:
    network = getattr(nets, factory)()
    if factory == "scaled":
        network[1].scale.copy_(torch.tensor([0.5, 3.0]))
    got = load(written(wrap(network)), factory=f"weights_nets:{factory}")
    assert len(got.notes) == len(notes)
    assert all(part in note for part, note in zip(notes, got.notes, strict=True)), got.notes
    assert_same(got.model, network)


def test_one_part_of_a_larger_network_is_read_by_its_prefix(nets: Any) -> None:
    network = nets.scaled()
    network[1].scale.copy_(torch.tensor([0.5, 3.0]))
    whole = nn.ModuleDict({"net": nn.ModuleDict({"encoder": OptimizedModule(network)}), "loss": nn.Linear(2, 2)})
    path = written(whole.state_dict())
    with pytest.raises(ModelError, match=r"does not fit.*pass --strip-prefix net\.encoder\._orig_mod\. if"):
        load(path, factory="weights_nets:scaled")
    for prefix in ("net.encoder.", "net.encoder"):
        got = load(path, factory="weights_nets:scaled", strip_prefix=prefix)
        assert got.notes == (
            "the prefix 'net.encoder.' was removed",
            "2 names without it were left out: loss.weight, loss.bias",
            "the prefix '_orig_mod.' of torch.compile was removed from every name",
        )
        assert_same(got.model, network)
    with pytest.raises(InputError, match=r"begins so\. Got decoder\.; expected net\., loss\."):
        load(path, factory="weights_nets:scaled", strip_prefix="decoder")


def test_save_keeps_the_versions_of_layers(nets: Any) -> None:
    network = nets.scaled()
    network[1].scale.copy_(torch.tensor([0.5, 3.0]))
    save("own.pt", factory="weights_nets:scaled", model=network)
    assert_same(load("own.pt", factory="weights_nets:scaled").model, network)
    assert_same(load(written(network), factory="weights_nets:scaled", trust_pickle=True).model, network)


def test_a_file_without_versions_is_one_of_the_first_version_as_in_torch(nets: Any) -> None:
    state = {"0.weight": torch.ones(2, 1, 3, 3), "0.bias": torch.zeros(2), "1.scale": torch.zeros(2)}
    with pytest.raises(ModelError, match="of an unknown version"):
        load(written(state), factory="weights_nets:scaled")
    got = load(written({"scale": torch.zeros(2)}), factory="weights_nets:Scaled")
    assert got.model.scale.tolist() == [1, 1]


@pytest.mark.parametrize("versions", [3, {"": 3}, {3: {}}], ids=repr)
def test_damaged_versions_are_refused(nets: Any, versions: object) -> None:
    state = nets.conv().state_dict()
    state._metadata = versions
    with pytest.raises(ModelError, match="_metadata"):
        load(written(state), factory="weights_nets:conv")


def test_extra_state_reaches_its_layer(nets: Any) -> None:
    network = nets.remembering()
    network[0].memory = {"maxima": torch.ones(2), "steps": [1, 2]}
    save("own.pt", factory="weights_nets:remembering", model=network)
    for path in (written(network.state_dict()), written(AveragedModel(network).state_dict(), "a.pt"), Path("own.pt")):
        assert load(path, factory="weights_nets:remembering").model[0].memory["steps"] == [1, 2]
    with pytest.raises(ModelError, match=r"1 missing from the file: 0\._extra_state"):
        load(written(nn.Sequential(nn.Conv2d(1, 2, 3)).state_dict()), factory="weights_nets:remembering")
    with pytest.raises(ModelError, match=r"1 unknown to the network: 0\._extra_state"):
        load(written({**network.state_dict(), **nets.conv().state_dict()}), factory="weights_nets:conv")
    network[0].memory = print
    with pytest.raises(InputError, match=r"state_dict\.0\._extra_state\.seen is not plain data"):
        save("own.pt", factory="weights_nets:remembering", model=network)


def test_a_safetensors_file_is_a_state_dict(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nets.conv()
    save_file(named(network.state_dict(), "model.{}".format), "w.safetensors", {"format": "pt"})
    got = load("w.safetensors", factory="weights_nets:conv")
    assert (got.kind, len(got.notes)) == ("state_dict", 1)
    assert_same(got.model, network)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(BackendError, match=r"pip install 'deploynorm\[safetensors\]'"):
        load("w.safetensors", factory="weights_nets:conv")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_numbers_of_numpy_become_numbers_of_python(nets: Any, legacy: bool) -> None:
    numbers = [np.float64(0.9), np.float32(0.5), np.float16(2), np.int64(-3), np.uint8(200), np.bool_(True)]
    content = {"model": nets.conv().state_dict(), "best": numbers}
    Path("w.pt").write_bytes(saved(content, _use_new_zipfile_serialization=not legacy))
    assert load("w.pt", factory="weights_nets:conv").kind == "state_dict"
    state = {"w": torch.ones(1)}
    own = {"format": "deploynorm", "factory": "gone:f", "kwargs": {}, "state_dict": state, "training": {"n": numbers}}
    Path("own.pt").write_bytes(saved(own, _use_new_zipfile_serialization=not legacy))
    got = load("own.pt", factory="torch.nn:ParameterDict", kwargs={"parameters": {"w": torch.zeros(1)}}).training
    assert got == {"n": [0.9, 0.5, 2.0, -3, 200, True]}
    assert [type(number) for number in got["n"]] == [float, float, float, int, int, bool]


def test_a_factory_of_lazy_layers_is_told_to_run_them(nets: Any) -> None:
    network = nets.lazy()
    network(torch.ones(2, 1, 5, 5))
    path = written(network.state_dict())
    with pytest.raises(ModelError, match=r"Lazy layers that have not run\. Got 0\.weight, 0\.bias, .*run it once"):
        load(path, factory="weights_nets:lazy")


def test_a_network_that_a_factory_wraps_is_unwrapped(nets: Any) -> None:
    network = nets.conv()
    got = load(written(network.state_dict()), factory="weights_nets:parallel")
    assert got.notes == ("DataParallel was removed from the network",)
    assert_same(got.model, network)


def test_many_names_of_a_foreign_file_are_refused_at_once(nets: Any) -> None:
    one = torch.zeros(1)
    with pytest.raises(ModelError, match=r"4 missing from the file: .*; 20000 unknown to the network"):
        load(written({f"layer{index}.weight": one for index in range(20_000)}), factory="weights_nets:conv")


def test_plain_data_that_holds_itself_is_refused(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploynorm.checkpoint._own._MOST", 10_000)
    circle: list[Any] = [1]
    circle.append(circle)
    twice: list[Any] = [1, 2]
    for _ in range(30):
        twice = [twice, twice]
    state = nets.conv().state_dict()
    for endless in (circle, twice):
        own = {"format": "deploynorm", "factory": "gone:f", "kwargs": {"a": endless}, "state_dict": state}
        with pytest.raises(ModelError, match=r"its kwargs is not plain data\. Got more than"):
            load(written(own), factory="weights_nets:conv")


class Shadowed:
    """Pickled, it is an OrderedDict with attributes."""

    def __init__(self, items: dict[str, Any], /, **attributes: object) -> None:
        self.items, self.attributes = items, attributes

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), self.attributes, None, iter(self.items.items())


@pytest.mark.parametrize("attribute", ["items", "values", "keys", "get"])
def test_a_dict_whose_methods_are_hidden_is_refused(nets: Any, attribute: str) -> None:
    state = dict(nets.conv().state_dict())
    shadow: dict[str, Any] = {attribute: 3}
    own = {"format": "deploynorm", "factory": "gone:f", "kwargs": {}, "state_dict": state}
    for content in (
        Shadowed(state, **shadow),
        {"model": [Shadowed(state, **shadow)]},
        Shadowed(state, _metadata=Shadowed({"": {}}, **shadow)),
        Shadowed(own, **shadow),
        {**own, "kwargs": {"a": Shadowed({}, **shadow)}},
    ):
        with pytest.raises(ModelError, match=f"attributes that no dict has. Got {attribute}"):
            load(written(content), factory="weights_nets:conv")
