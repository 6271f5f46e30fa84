"""Every refusal of load, with the phrases of its message; which factories a file may name; random damage."""

from __future__ import annotations

import io
import pickle
import random
import re
import sys
import zipfile
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import FACTORY, own, rewritten, saved
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deploynorm.checkpoint import load, save
from deploynorm.errors import InputError, ModelError
from deploynorm.layers import MABN2d
from deploynorm.models import frn_resnet
from deploynorm.models.frn_resnet import resnet20

STATE = nn.Conv2d(1, 2, 3).state_dict()

NETS = """
from torch import nn
from torch.nn.utils import parametrizations
NUMBER = 3
def conv(): return nn.Conv2d(1, 2, 3)
def on_meta(): return nn.Conv2d(1, 2, 3, device="meta")
def with_statistics(): return nn.BatchNorm2d(2)
def number(): return 3
def fails(): raise RuntimeError("no weights today")
def leaves(): raise SystemExit(4)
"""


@pytest.fixture
def nets(here: Path) -> None:
    """A module of the user in the current directory, and three that cannot be imported."""
    (here / "load_errors_nets.py").write_text(NETS)
    (here / "load_errors_broken.py").write_text("import a_package_that_nobody_has")
    (here / "load_errors_syntax.py").write_text("def f(:")
    (here / "load_errors_script.py").write_text("raise SystemExit(1)")


def zipped(*members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member in members:
            archive.writestr(member, b"any")
    return buffer.getvalue()


def ours(**changed: Any) -> bytes:
    return saved(own(**changed))


def conv(**tensors: Tensor | None) -> bytes:
    return saved({name: tensor for name, tensor in {**STATE, **tensors}.items() if tensor is not None})


def spoiled(_: str, content: bytes) -> bytes:
    return content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v\xff")


TYPED = {"factory": "load_errors_nets:conv"}
NAN = torch.tensor([1.0, torch.nan])
BROKEN_NORM = OrderedDict(nn.BatchNorm2d(2).state_dict(), running_var=torch.tensor([1.0, torch.inf]))

FILES: dict[str, tuple[bytes, dict[str, Any], tuple[str, ...]]] = {
    # what the file is
    "empty": (b"", {}, ("the file is empty",)),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), {}, ("not a checkpoint", "a PNG image")),
    "text": (b"epoch,loss\n1,0.5\n", {}, ("not a checkpoint", "Got text")),
    "html": (b"\n<!DOCTYPE html><html>", {}, ("an HTML or XML page",)),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid", {}, ("a Git LFS pointer",)),
    "safetensors": ((16).to_bytes(8, "little") + b'{"a":1}         ' + bytes(9), {}, ("file cannot be read",)),
    "onnx": (b"\x08\x08\x12\x07pytorch", {}, ("not a checkpoint", "unknown bytes")),
    "other zip": (zipped("a/b.txt"), {}, ("not a checkpoint", "another zip archive")),
    "npz": (zipped("a.npy", "b.npy"), {}, ("a NumPy .npz, and what is in it is no dict of arrays",)),
    "torchscript": (
        zipped("m/data.pkl", "m/constants.pkl", "m/code/a.py"), {}, ("a TorchScript archive", "torch.jit.load"),
    ),
    "old export": (zipped("version", "serialized_exported_program.json"), {}, ("PyTorch 2.7 or older",)),
    "plain pickle": (pickle.dumps({"a": 1}), {}, ("a pickle that torch.save did not write",)),
    "cut short": (saved(STATE)[:-40], {}, ("a damaged or cut-short zip archive",)),
    "cut legacy": (saved(STATE, _use_new_zipfile_serialization=False)[:90], {}, ("the file cannot be read",)),
    "damaged pickle": (rewritten(saved(STATE), spoiled), {}, ("the file cannot be read",)),
    "damaged member": (spoiled("data.pkl", saved(STATE)), {}, ("a member of it is not", "Got archive/data.pkl")),
    # what it holds
    "a list": (saved([1, 2]), {}, ("neither a network nor a state dict", "Got list")),
    "no weights": (saved({"epoch": 3, "model": {}}), {}, ("neither a network", "'epoch' (int), 'model' (dict)")),
    "class of another package": (
        saved({"model": STATE, "best": Fraction(1, 2)}),
        TYPED,
        ("would run code", "Got fractions.Fraction;", "state_dict()", "--trust-pickle"),
    ),
    "numpy number that is none": (saved({"model": STATE, "time": np.datetime64(1, "s")}), TYPED, ("'M8'",)),
    "legacy class": (
        saved({"model": STATE, "best": Fraction(1, 2)}, _use_new_zipfile_serialization=False),
        TYPED,
        ("would run code", "Got fractions.Fraction;"),
    ),
    "protocol 4": (saved(STATE, pickle_protocol=4), TYPED, ("a form of pickle that", "--trust-pickle")),
    "no factory": (saved(STATE), {}, ("a state dict of 2 tensors does not say which network", "--factory")),
    # whether it fits
    "missing": (conv(bias=None), TYPED, ("does not fit Conv2d", "1 missing from the file: bias")),
    "unexpected": (conv(**{f"x{i}": NAN for i in range(7)}), TYPED, ("7 unknown to the network: x0, x1", "(2 more)")),
    "shape": (conv(bias=torch.ones(5)), TYPED, ("1 of another shape: bias (5,) in the file, (2,) in the network",)),
    "all three": (
        conv(bias=None, weight=torch.ones(2, 1, 3, 2), extra=NAN),
        TYPED,
        ("1 missing from the file: bias; 1 unknown to the network: extra; 1 of another shape: weight (2, 1, 3, 2)",),
    ),
    "meta tensor": (conv(bias=torch.ones(2, device="meta")), TYPED, ("tensors without values", "Got bias")),
    "meta network": (conv(), {"factory": "load_errors_nets:on_meta"}, ("tensors without values", "on the CPU")),
    "nan": (conv(bias=NAN), TYPED, ("NaN or infinity in 1 tensors", "Got bias (1 of 2)")),
    "inf statistic": (
        saved(BROKEN_NORM), {"factory": "load_errors_nets:with_statistics"}, ("NaN or inf", "running_var (1 of 2)"),
    ),
    "nan in a pickled network": (
        saved(nn.Sequential(nn.PReLU(init=float("nan")))), {}, ("NaN or infinity in 1 tensors. Got 0.weight (1 of 1)",),
    ),
    # our own format
    "no kwargs": (ours(kwargs=...), {}, ("not a whole deploynorm checkpoint", "without kwargs")),
    "unknown key": (ours(lables=["a"]), {}, ("with 'lables'",)),
    "kwargs a list": (ours(kwargs=[1]), {}, ("its kwargs is not plain data", "Got list")),
    "kwargs a tensor": (ours(kwargs={"a": [NAN]}), {}, ("its kwargs.a[0] is not plain data", "Got Tensor")),
    "labels": (ours(labels=["cat", 3]), {}, ("its labels[1] is not plain data", "Got int")),
    "training": (ours(training="long"), {}, ("its training is not plain data", "Got str")),
    "input": (ours(input={"shape": [1, 8, 8], "mean": [0.5], "std": [0]}), {}, ("its input.std is wrong", "Got (0,)")),
    "state": (ours(state_dict={"a": 1}), {}, ("its state_dict is none", "'a' (int)")),
    "misfit": (ours(), {}, ("does not fit ResNet",)),
    "factory of a file": (
        ours(factory="load_errors_nets:conv"), {},
        ("not one of deploynorm.models", " --factory load_errors_nets:conv,"),
    ),
    "hostile factory of a file": (
        ours(factory="nets:f; rm -r ~"), {}, ("not one of deploynorm.models", "with --factory pkg.mod:function."),
    ),
    "wrong kwargs of a file": (ours(kwargs={"colour": 1}), {}, ("does not take the arguments", "colour")),
    # what the user typed
    "not a name": (conv(), {"factory": "nets.conv"}, ("not a factory", "pkg.mod:function")),
    "no module": (conv(), {"factory": "load_errors_gone:f"}, ("ModuleNotFoundError", "in the folder of that module")),
    "no submodule": (conv(), {"factory": "json.gone:f"}, ("ModuleNotFoundError", "in the folder of that module")),
    "broken import": (
        conv(), {"factory": "load_errors_broken:f"},
        ("No module named 'a_package_that_nobody_has'", 'python -c "import load_errors_broken"'),
    ),
    "syntax error": (conv(), {"factory": "load_errors_syntax:f"}, ("cannot be imported: SyntaxError",)),
    "a script": (conv(), {"factory": "load_errors_script:f"}, ("cannot be imported: SystemExit",)),
    "no function": (conv(), {"factory": "load_errors_nets:con"}, ("does not exist", "one of conv, on_meta")),
    "not callable": (conv(), {"factory": "load_errors_nets:NUMBER"}, ("is not callable", "Got int")),
    "raises": (conv(), {"factory": "load_errors_nets:fails"}, ("failed: RuntimeError: no weights today",)),
    "exits": (conv(), {"factory": "load_errors_nets:leaves"}, ("failed: SystemExit: 4",)),
    "no network": (conv(), {"factory": "load_errors_nets:number"}, ("made no network. Got int",)),
    "arguments": (
        conv(), {**TYPED, "kwargs": {"width": 3}}, ("does not take the arguments", "width=3", "arguments of ()"),
    ),
    "kwargs for a network": (
        saved(nn.ReLU()), {"kwargs": {}}, ("a pickled network is whole, and takes no --factory-kwargs",),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(("data", "arguments", "phrases"), FILES.values(), ids=FILES)
def test_a_file_is_refused_in_words(
    tmp_path: Path, data: bytes, arguments: dict[str, Any], phrases: tuple[str, ...]
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with pytest.raises(ModelError) as raised:
        load(path, **arguments)
    message = str(raised.value)
    assert raised.value.exit_code == 2
    assert message.startswith(f"{path}: ")
    assert [phrase for phrase in phrases if phrase not in message] == [], message
    assert raised.value.expected is not None or raised.value.fix is not None or "failed:" in message
    if "failed: RuntimeError" in message:
        assert isinstance(raised.value.__cause__, RuntimeError), "that of the user's factory"


@pytest.mark.parametrize(
    ("name", "phrase"), [("gone.pt", "no such file"), ("folder.pt", "a folder, not a file")], ids=["gone", "folder"]
)
def test_a_path_without_a_file_is_refused(tmp_path: Path, name: str, phrase: str) -> None:
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ModelError, match=phrase):
        load(tmp_path / name)


def test_a_file_in_a_missing_folder_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write there"):
        save(tmp_path / "gone" / "model.pt", factory=FACTORY, kwargs={}, model=resnet20())


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"factory": FACTORY}, "--factory"),
        ({"kwargs": {}}, "--factory-kwargs"),
        ({"key": "a"}, "--key"),
        ({"strip_prefix": "a."}, "--strip-prefix"),
    ],
    ids=["factory", "kwargs", "key", "strip_prefix"],
)
def test_an_archive_takes_no_factory(tmp_path: Path, pt2: bytes, given: dict[str, Any], option: str) -> None:
    (tmp_path / "m.pt2").write_bytes(pt2)
    with pytest.raises(ModelError, match=f"archive is whole, and takes no {option}\\."):
        load(tmp_path / "m.pt2", **given)


def test_nan_in_an_archive_is_named(tmp_path: Path, pt2: bytes) -> None:
    def poisoned(name: str, content: bytes) -> bytes:
        return np.full(len(content) // 4, np.nan, np.float32).tobytes() if name == "data/weights/weight_1" else content

    (tmp_path / "m.pt2").write_bytes(rewritten(pt2, poisoned))
    with pytest.raises(ModelError, match=r"NaN or infinity in 1 tensors\. Got 0\.bias \(4 of 4\)"):
        load(tmp_path / "m.pt2")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"_parameters", b"_parametexs", "the pickled network is damaged, or of another version"),
        (
            b"torch.nn.modules.activation",
            b"torch.nn.modules.gone",
            r"its class torch\.nn\.modules\.gone\.ReLU cannot be imported",
        ),
    ],
    ids=["lacks parts", "missing module"],
)
def test_a_pickled_network_that_cannot_be_made_is_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    content = rewritten(saved(nn.ReLU()), lambda _, content: content.replace(old, new))
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "net.pt")


MODULES = {
    "train": "main Training save os.system torch",
    "data": "load ImageData read_idx",
    "frn_resnet": "conv nn.Sequential Sequence FRN2d partial gone resnet20.__globals__ __loader__ __name__",
}
HOSTILE = [
    "os:system",
    "posix:system",
    "subprocess:run",
    "hostile_nets:build",
    "torch.hub:load",
    "deploynorm:fold",
    "deploynorm.checkpoint:load",
    "deploynorm.modelsx:resnet20",
    "deploynorm.models_evil:build",
    "deploynorm.models/../evil:build",
    *(f"deploynorm.models.{module}:{name}" for module, names in MODULES.items() for name in names.split()),
    "deploynorm.models.gone:resnet20",
    "deploynorm.models..frn_resnet:resnet20",
    "deploynorm.models._private:resnet20",
    "deploynorm.models:__import__",
    "deploynorm.models.frn_resnet",
    "deploynorm.models.frn_resnet:",
    "deploynorm.models.frn_resnet:resnet20:resnet20",
    "deploynorm.models.frn_resnet:resnet20\n",
    " deploynorm.models.frn_resnet:resnet20",
    "",
    None,
    ["deploynorm.models.frn_resnet:resnet20"],
]


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_a_file_cannot_name_other_code(here: Path, monkeypatch: pytest.MonkeyPatch, name: object) -> None:
    (here / "hostile_nets.py").write_text("import os\nos.mkdir('code_ran')\n")
    monkeypatch.syspath_prepend(here)
    torch.save(own(factory=name), here / "model.pt")
    inside = isinstance(name, str) and re.match(r"deploynorm\.models([.:]|$)", name)
    with pytest.raises(ModelError, match="has no such network" if inside else r"not one of deploynorm\.models"):
        load(here / "model.pt")
    assert not (here / "code_ran").exists()
    assert "hostile_nets" not in sys.modules


@pytest.mark.parametrize("name", sorted({"resnet20", "resnet50"} & set(frn_resnet.__all__)))
def test_a_file_may_name_a_network_of_deploynorm(tmp_path: Path, name: str) -> None:
    content = own(factory=f"deploynorm.models.frn_resnet:{name}", kwargs={"num_classes": 1})
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ModelError, match="does not fit ResNet"):
        load(tmp_path / "model.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pt2"])
def test_a_damaged_file_is_refused_or_what_it_was(tmp_path: Path, pt2: bytes, kind: str) -> None:
    state = nn.PReLU(8).state_dict()
    whole = pt2 if kind == "pt2" else saved(state, _use_new_zipfile_serialization=kind == "zip")
    made: dict[str, Any] = {} if kind == "pt2" else {"factory": "torch.nn:PReLU", "kwargs": {"num_parameters": 8}}
    rng = random.Random(0)
    path = tmp_path / "m.pt"
    path.write_bytes(whole)
    want = load(path, **made).model.state_dict()
    refused = 0
    for trial in range(60):
        data = bytearray(whole)
        if trial % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            got = load(path, **made).model.state_dict()
        except ModelError:
            refused += 1
        else:
            # The old format has no checksums.
            assert kind == "legacy" or all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert refused >= 20  # what was cut off; a changed byte may stand in padding


def test_one_flipped_bit_of_a_weight_names_the_member(tmp_path: Path) -> None:
    whole = saved(STATE)
    at = whole.find(STATE["weight"].numpy().tobytes())
    for bit in range(8):
        data = bytearray(whole)
        data[at + 3] ^= 1 << bit
        (tmp_path / "m.pt").write_bytes(data)
        with pytest.raises(ModelError, match=r"a member of it is not what was written\. Got archive/data/0\."):
            load(tmp_path / "m.pt", factory="torch.nn:Conv2d")


def test_an_archive_that_torch_wrote_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    kwargs = {"in_channels": 1, "out_channels": 2, "kernel_size": 3}
    got = load(tmp_path / "m.pt", factory="torch.nn:Conv2d", kwargs=kwargs).model
    assert torch.equal(got.weight, STATE["weight"])


def test_an_archive_that_unpacks_into_far_more_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"any")
        archive.writestr("m/data/0", bytes(2**25))
    with pytest.raises(ModelError, match="the archive has too many bytes unpacked"):
        load(tmp_path / "m.pt")


def test_a_pickle_of_more_tensors_than_any_network_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may share one storage: torch takes longer for the hundred-thousands than the limits of time allow for."""
    monkeypatch.setattr("deploynorm.checkpoint._pickle.MOST_TENSORS", 8)
    path, values = tmp_path / "model.pt", torch.zeros(9)
    for legacy in (False, True):
        torch.save({f"w{i}": values[i:] for i in range(9)}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ModelError, match="the file has too many tensors"):
            load(path, factory=FACTORY)
        torch.save({f"w{i}": values[i:] for i in range(8)}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ModelError, match="8 unknown to the network"):
            load(path, factory=FACTORY)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, as it decomposes
@pytest.mark.parametrize(
    ("layer", "decomposed", "message"),
    [
        (
            nn.BatchNorm2d(3),
            True,
            r"traced in training mode: _native_batch_norm_legit_functional \(node \w+\) normalizes",
        ),
        (nn.InstanceNorm2d(3, track_running_stats=True), True, r"traced in training mode: .*Fix: call model.eval\(\)"),
        (
            parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
            False,
            r"_weight_norm(_interface)? \(node \w+\)\. Fix: call .*remove",
        ),
        (MABN2d(3), False, r"switches gradients off inside, as layers in training mode do. Fix: call model.eval\(\)"),
    ],
    ids=["batch norm", "instance norm", "weight norm", "MABN"],
)
def test_an_archive_of_training_says_so_with_the_node(
    tmp_path: Path, layer: nn.Module, decomposed: bool, message: str
) -> None:
    path = tmp_path / "model.pt2"
    program = torch.export.export(layer.train(), (torch.randn(2, 3, 4, 4),))
    torch.export.save(program.run_decompositions() if decomposed else program, path)
    with pytest.raises(ModelError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kwargs": 5}, "kwargs are no dict"),
        ({"key": ["a"]}, "key is no text"),
        ({"strip_prefix": 5}, "strip_prefix is"),
    ],
)
def test_options_of_other_types_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"load: {message}"):
        load(tmp_path / "model.pt", **options)


@pytest.mark.parametrize("options", [{"model": None}, {"image": 5}, {"training": 5}, {"kwargs": 5}])
def test_what_cannot_be_saved_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        save(tmp_path / "model.pt", **{"factory": "nets:net", "model": nn.ReLU(), "kwargs": {}} | options)
    assert not [*tmp_path.iterdir()]
