"""How the verbs read a file: which weights of a checkpoint, and whether an ONNX file is as its manifest says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from rtx_builds import conv_frn_conv
from torch import nn

from deploynorm.files import sha256

CHANGED = "is not the file that {} was written for. Got SHA-256 {}; expected {}. Fix: export it again, or pass --accept"


def test_the_weights_of_a_file_are_chosen_and_said(factories: ModuleType, deploynorm: Callable) -> None:
    raw, average = factories.conv(), factories.conv()
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": average.state_dict()}, "w.pt")
    told = "note: the state dict is under '{}'; the one under '{}' is not used; --key chooses"
    for options, network, words in (
        ((), average, ("state_dict_ema", "state_dict")),
        (("--key", "state_dict"), raw, ("state_dict", "state_dict_ema")),
    ):
        np.save("x.npy", x := np.random.default_rng(0).normal(size=(1, 3, 9, 8)).astype(np.float32))
        model = ("w.pt", "--factory", "factories:conv", *options)
        assert told.format(*words) in deploynorm("fold", *model, "--input-shape", "1x3x9x8").out
        deploynorm("inspect", *model, "--json", "facts.json")
        assert f"note: {json.loads(Path('facts.json').read_text())['notes'][0]}" == told.format(*words)
        shown = deploynorm("run", *model, "x.npy", "-o", "y.npz", "--input-shape", "1x3x9x8").out
        assert told.format(*words) in shown
        want = network.eval()(torch.from_numpy(x)).detach().numpy()
        (got,) = np.load("y.npz").values()
        np.testing.assert_array_equal(got, want)


@pytest.mark.usefixtures("ort")
def test_a_part_of_a_larger_network_is_exported_and_checked(factories: ModuleType, deploynorm: Callable) -> None:
    network = nn.ModuleDict({"backbone": factories.conv(), "head": nn.Linear(2, 2)})
    torch.save(network.state_dict(), "w.pt")
    model = ("w.pt", "--factory", "factories:conv", "--input-shape", "1x3x9x8")
    assert "pass --strip-prefix backbone. if" in deploynorm("export", *model, code=2).err
    model += ("--strip-prefix", "backbone")
    assert "2 names without it were left out" in deploynorm("export", *model, "--dynamic", "none").out
    assert "note: the prefix 'backbone.' was removed" in deploynorm("check", *model, "w.onnx").out


def test_a_wrong_key_lists_those_that_there_are(factories: ModuleType, refused: Callable) -> None:
    torch.save({"net": factories.conv().state_dict()}, "w.pt")
    refused(2, "Got model; expected net.", "inspect", "w.pt", "--factory", "factories:conv", "--key", "model")


VERBS = {
    "run": ("run", "frn.onnx", "x.npy", "-o", "y.npz"),
    "check": ("check", "frn.pt", "frn.onnx"),
    "rewrite": ("rewrite", "frn.onnx", "--optimize-for-cpu"),
}


@pytest.fixture
def flipped(frn_pt: Path, export: Callable) -> Path:
    """An exported file of which one bit of one weight is another, beside its manifest."""
    export(frn_pt)
    np.save("x.npy", np.zeros((1, 1, 12, 12), np.float32))
    path = frn_pt.with_suffix(".onnx")
    data = bytearray(path.read_bytes())
    weight = torch.load(frn_pt, weights_only=True)["state_dict"]["stem.0.weight"].numpy().tobytes()
    data[data.find(weight)] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.usefixtures("native")
@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("verb", VERBS)
def test_a_changed_file_is_refused_with_both_hashes_unless_it_is_accepted(
    flipped: Path, verb: str, refused: Callable, deploynorm: Callable
) -> None:
    manifest = flipped.with_suffix(".deploynorm.json")
    expected = json.loads(manifest.read_text())["onnx"]["sha256"]
    refused(2, CHANGED.format(manifest.name, sha256(flipped), expected), *VERBS[verb])
    error = deploynorm(*VERBS[verb], "--accept-changed").err
    assert f"SHA-256 {sha256(flipped)}, not {expected}; taken as it is" in error
    manifest.unlink()
    assert deploynorm(*VERBS[verb]).err == ""


def test_build_compares_the_hash_too(require: Callable, refused: Callable) -> None:
    require("trt-rtx")
    Path("net.onnx").write_bytes(conv_frn_conv("float32", (1, 16, 8, 8)).SerializeToString())
    record = {"onnx": {"file": "net.onnx", "sha256": "0" * 64, "external_data": None}}
    Path("net.deploynorm.json").write_text(json.dumps(record))
    options = ("--compute-capability", "8.9", "--backend", "tensorrt-rtx")
    refused(2, CHANGED.format("net.deploynorm.json", sha256(Path("net.onnx")), "0" * 64), "build", "net.onnx", *options)


@pytest.mark.usefixtures("ort")
def test_weights_in_a_file_of_their_own_are_compared(small: Callable, refused: Callable, deploynorm: Callable) -> None:
    model = small("conv")
    deploynorm("export", *model, "--external-data", "--dynamic", "none")
    np.save("x.npy", np.zeros((1, 3, 12, 12), np.float32))
    deploynorm("run", "weights.onnx", "x.npy")
    (weights,) = Path().glob("weights.onnx*data")
    manifest = Path("weights.deploynorm.json")
    record = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(record | {"onnx": record["onnx"] | {"external_data": None}}))
    refused(
        2,
        "cannot be read as a manifest: ValueError: it has no hash of weights.onnx.data",
        "run",
        "weights.onnx",
        "x.npy",
    )
    manifest.write_text(json.dumps(record))
    data = bytearray(weights.read_bytes())
    data[8] ^= 1
    weights.write_bytes(data)
    refused(2, f"{weights}: is not the file that", "run", "weights.onnx", "x.npy")
    weights.unlink()
    refused(2, f"{weights}: is not the file that weights.deploynorm.json", "run", "weights.onnx", "x.npy")


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"onnx": 3}', '{"onnx": {"sha256": 3}}', "[" * 10**5,
     '{"onnx": {"sha256": "0", "external_data": {"file": "../x", "sha256": "0"}}}'],
    ids=range(6),
)  # fmt: skip
def test_a_damaged_manifest_is_refused(
    frn_pt: Path, text: str, export: Callable, refused: Callable, deploynorm: Callable
) -> None:
    export(frn_pt)
    np.save("x.npy", np.zeros((1, 1, 12, 12), np.float32))
    Path("frn.deploynorm.json").write_text(text)
    refused(2, "frn.deploynorm.json: cannot be read as a manifest", "run", "frn.onnx", "x.npy")
    assert "taken as it is" in deploynorm("run", "frn.onnx", "x.npy", "--accept-changed").err


def test_a_file_that_was_renamed_with_its_manifest_is_the_same(
    frn_pt: Path, export: Callable, deploynorm: Callable
) -> None:
    export(frn_pt)
    np.save("x.npy", np.zeros((1, 1, 12, 12), np.float32))
    shutil.move("frn.onnx", "net.onnx")
    shutil.move("frn.deploynorm.json", "net.deploynorm.json")
    deploynorm("run", "net.onnx", "x.npy")


def test_files_in_the_place_of_others_are_named(
    frn_pt: Path, export: Callable, refused: Callable, deploynorm: Callable
) -> None:
    export(frn_pt)
    refused(2, "the network comes first, and the ONNX file second", "check", "frn.onnx", str(frn_pt))
    refused(2, "frn.onnx: ends in .onnx already", "export", "frn.onnx")
