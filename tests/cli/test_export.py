"""`deploynorm export`: what it writes and prints, and that nothing is left of what it refuses."""

from __future__ import annotations

import importlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploynorm.cli import export as export_verb
from deploynorm.layers import FRN2d

FACTORY = """
import torch
from torch import nn
from deploynorm.layers import FRN2d

def conv(channels=4):
    return nn.Sequential(nn.Conv2d(3, channels, 3), FRN2d(channels))

def not_a_module():
    return 3

def raises():
    raise RuntimeError("no such architecture")

def unet():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.norm = nn.Conv2d(3, 4, 3, stride=2, padding=1), FRN2d(4)
            self.up, self.head = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.head(torch.cat([x, self.up(self.norm(self.down(x)))], 1))
    return UNet()

def branching():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Branching()
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own, with a module of factories that the user would type."""
    (tmp_path / "factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # A module of this name may come from another test's folder.
    monkeypatch.delitem(__import__("sys").modules, "factories", raising=False)


def _written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"factories.py", "__pycache__"}


@pytest.mark.parametrize("model", ["frn_pt", "mabn_pt"])
def test_model_alone_is_enough(
    model: str, deploynorm: Callable, request: pytest.FixtureRequest, tmp_path: Path, require: Callable
) -> None:
    require("ort")
    path: Path = request.getfixturevalue(model)
    result = deploynorm("export", path)
    assert result.code == 0, result.err
    assert _written(tmp_path) == {path.name, f"{path.stem}.onnx", f"{path.stem}.deploynorm.json"}
    for heading in ("Layers", "Nodes", "Parity with the network in float64"):
        assert heading in result.out
    assert "BROKEN" not in result.out
    onnx.checker.check_model(str(path.with_suffix(".onnx")), full_check=True)


def test_manifest_tells_origin_versions_and_checks(frn_pt: Path, deploynorm: Callable, require: Callable) -> None:
    require("ort")
    assert deploynorm("export", frn_pt, "--json", "report.json").code == 0
    record = json.loads(frn_pt.with_suffix(".deploynorm.json").read_text())
    assert record["source"]["factory"] == "deploynorm.models.frn_resnet:resnet20"
    assert record["onnx"]["inputs"] == [{"name": "x", "shape": ["N", 1, "H", "W"], "dtype": "float32"}]
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    samples = [comparison["sample"] for check in record["checks"] for comparison in check["comparisons"]]
    assert len(samples) >= 5
    assert all(check["ok"] for check in record["checks"])
    assert json.loads(Path("report.json").read_text())["onnx"] == record["onnx"]


def test_exported_file_carries_labels_and_preprocessing(frn_pt: Path, deploynorm: Callable, require: Callable) -> None:
    require("ort")
    assert deploynorm("export", frn_pt, "-o", "named.onnx").code == 0
    entries = {entry.key: json.loads(entry.value) for entry in onnx.load("named.onnx").metadata_props}
    assert entries["deploynorm.labels"] == ["bag", "boot", "coat"]
    assert entries["deploynorm.image"] == {"shape": [1, 12, 12], "mean": [0.5], "std": [0.25]}


def test_options_reach_the_file(frn_pt: Path, deploynorm: Callable, require: Callable) -> None:
    require("ort")
    options = ("--opset", 23, "--lowering", "rmsnorm", "--dynamic", "batch", "--external-data")
    assert deploynorm("export", frn_pt, *options).code == 0
    model = onnx.load(frn_pt.with_suffix(".onnx"))
    assert [opset.version for opset in model.opset_import] == [23]
    assert "RMSNormalization" in {node.op_type for node in model.graph.node}
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["N", 1, 12, 12]
    assert frn_pt.with_name("frn.onnx.data").exists()


def test_file_without_body_is_checked_by_the_reference_evaluator(frn_pt: Path, deploynorm: Callable) -> None:
    result = deploynorm("export", frn_pt, "--no-function", "--backend", "reference", "--dynamic", "none")
    assert result.code == 0, result.err
    assert not onnx.load(frn_pt.with_suffix(".onnx")).functions


@pytest.mark.usefixtures("without_library")
def test_file_without_body_and_library_says_what_to_do(frn_pt: Path, deploynorm: Callable, require: Callable) -> None:
    require("ort")
    result = deploynorm("export", frn_pt, "--no-function")
    assert result.code == 2
    assert "deploynorm plugins build" in result.err
    assert "--no-function" in result.err
    assert not frn_pt.with_suffix(".onnx").exists()


def test_file_without_body_is_checked_with_the_library(frn_pt: Path, deploynorm: Callable, require: Callable) -> None:
    require("ort")
    require("native")
    result = deploynorm("export", frn_pt, "--no-function")
    assert result.code == 0, result.err
    checks = [line for line in result.out.splitlines() if line.startswith("onnxruntime")]
    assert checks
    assert all("deploynorm library" in line for line in checks)


def test_frn_file_is_checked_stock_and_with_the_library(frn_pt: Path, deploynorm: Callable, require: Callable) -> None:
    require("ort")
    require("native")
    result = deploynorm("export", frn_pt)
    assert result.code == 0, result.err
    candidates = {line.partition("  ")[0] for line in result.out.splitlines() if line.startswith("onnxruntime")}
    assert candidates == {"onnxruntime (cpu)", "onnxruntime (cpu), deploynorm library"}


def test_state_dict_with_a_typed_factory(deploynorm: Callable, tmp_path: Path, require: Callable) -> None:
    require("ort")
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), FRN2d(8)).state_dict(), "weights.pt")
    options = ("--factory", "factories:conv", "--factory-kwargs", '{"channels": 8}', "--input-shape", "1x3x9x9")
    result = deploynorm("export", "weights.pt", *options)
    assert result.code == 0, result.err
    assert "weights.onnx" in _written(tmp_path)


def test_network_that_takes_even_sizes_alone_is_checked_on_those(deploynorm: Callable, require: Callable) -> None:
    require("ort")
    torch.save(importlib.import_module("factories").unet().state_dict(), "unet.pt")
    result = deploynorm("export", "unet.pt", "--factory", "factories:unet", "--input-shape", "1x3x16x16", "-v")
    assert result.code == 0, result.err
    assert "x 1x3x48x48" in result.out


def test_timm_network_with_free_sizes(timm: ModuleType, deploynorm: Callable, require: Callable) -> None:
    require("ort")
    Path("timm_factories.py").write_text(
        "import timm\n"
        "from timm.layers.filter_response_norm import FilterResponseNormTlu2d\n\n"
        "def build(name):\n"
        "    return timm.create_model(name, norm_layer=FilterResponseNormTlu2d)\n"
    )
    for name, layers in (("test_resnet", 15), ("mobilenetv2_035", 52)):
        network = timm.create_model(name, norm_layer=timm.layers.filter_response_norm.FilterResponseNormTlu2d)
        torch.save(network.state_dict(), f"{name}.pt")
        kwargs = json.dumps({"name": name})
        result = deploynorm(
            "export", f"{name}.pt", "--factory", "timm_factories:build", "--factory-kwargs", kwargs,
            "--input-shape", "2x3x128x128",
        )  # fmt: skip
        assert result.code == 0, result.err
        nodes = json.loads(Path(f"{name}.deploynorm.json").read_text())["onnx"]
        assert nodes["nodes"]["deploynorm::FilterResponseNormalization"] == layers
        assert nodes["inputs"][0]["shape"] == ["N", 3, "H", "W"]


def test_broken_parity_exits_with_1_and_leaves_no_file(
    frn_pt: Path, deploynorm: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require: Callable
) -> None:
    """A fault planted between export and file: the classifier's weight is moved."""
    require("ort")
    from deploynorm._export import Exported

    save = Exported.save

    def save_broken(self: Exported, path: Path, **options: object) -> None:
        save(self, path, **options)
        model = onnx.load(path)
        weight = next(w for w in model.graph.initializer if len(w.dims) == 2)
        weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(1.05)).tobytes()
        onnx.save(model, path)

    monkeypatch.setattr(Exported, "save", save_broken)
    result = deploynorm("export", frn_pt)
    assert result.code == 1
    assert "BROKEN" in result.out
    assert "off by" in result.err
    assert _written(tmp_path) == {"frn.pt"}


def test_network_that_amplifies_rounding_is_told_apart(frn_pt: Path, deploynorm: Callable, require: Callable) -> None:
    """A tolerance that float32 cannot hold stands in for a network that is as far from float64 itself."""
    require("ort")
    result = deploynorm("export", frn_pt, "--rtol", 1e-12, "--atol", 0)
    assert result.code == 1
    assert "the network itself, float32" in result.out
    assert "it amplifies rounding" in result.out


def test_earlier_file_survives_a_failed_export(frn_pt: Path, deploynorm: Callable, require: Callable) -> None:
    require("ort")
    assert deploynorm("export", frn_pt).code == 0
    before = frn_pt.with_suffix(".onnx").read_bytes()
    assert deploynorm("export", frn_pt, "--rtol", 0, "--atol", 0).code == 1
    assert frn_pt.with_suffix(".onnx").read_bytes() == before


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _nan(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["state_dict"]["head.weight" if "head.weight" in content["state_dict"] else next(
        key for key in content["state_dict"] if key.endswith("weight"))][0] = float("nan")  # fmt: skip
    torch.save(content, path)


def _torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 5, 5)), path)


def _foreign_module(path: Path) -> None:
    torch.save(Foreign(), path)


class Hostile:
    """A pickle of it makes a folder where it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


def _hostile_pickle(path: Path) -> None:
    torch.save({"model": Hostile()}, path)


def _hostile_archive(path: Path) -> None:
    buffer, hostile = io.BytesIO(), io.BytesIO()
    torch.export.save(torch.export.export(nn.Conv2d(1, 2, 3), (torch.zeros(1, 1, 5, 5),)), buffer)
    torch.save(Hostile(), hostile)
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(path, "w") as bad:
        for member in good.namelist():
            bad.writestr(member, hostile.getvalue() if member.endswith("sample_inputs/model.pt") else good.read(member))


class Foreign(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(1, 2, 3)


# The arguments that the checkpoint names are another factory's.
FACTORY_OPTION = ("--factory-kwargs", "{}", "--factory")

REFUSED = {
    "no such file": ((lambda path: path.unlink()), (), 2, "no such file|cannot be read|does not exist"),
    "truncated": (_truncated, (), 2, "damaged|truncated"),
    "NaN in a weight": (_nan, (), 2, "NaN or infinity"),
    "TorchScript": (_torchscript, (), 2, "TorchScript"),
    "hostile pickle": (_hostile_pickle, (), 2, "mkdir"),
    "hostile .pt2 archive": (_hostile_archive, (), 2, "mkdir"),
    "pickled module of a foreign class": (_foreign_module, ("--input-shape", "1x1x9x9"), 2, "--trust-pickle"),
    "state dict that does not fit": (
        None,
        ("--factory", "factories:conv", "--factory-kwargs", "{}"),
        2,
        "does not fit",
    ),
    "factory that does not exist": (None, ("--factory", "factories:nothing"), 2, "nothing"),
    "factory in no module": (None, ("--factory", "no_such_module:fn"), 2, "no_such_module"),
    "factory that raises": (
        None,
        ("--factory", "factories:raises", "--factory-kwargs", "{}"),
        2,
        "no such architecture",
    ),
    "factory of something else": (None, (*FACTORY_OPTION, "factories:not_a_module"), 2, "int"),
    "factory arguments that are no JSON": (None, ("--factory-kwargs", "{"), 2, "not JSON"),
    "wrong rank": (None, ("--input-shape", "1x12x12"), 2, "channels"),
    "wrong channels": (None, ("--input-shape", "1x3x12x12"), 2, "channels"),
    "shape that is none": (None, ("--input-shape", "large"), 2, "not a shape"),
    "shape of an unknown input": (None, ("--input-shape", "y:1x1x12x12"), 2, "no input 'y'"),
    "unsupported opset": (None, ("--opset", "17"), 2, "unsupported opset"),
    "rmsnorm at an old opset": (None, ("--lowering", "rmsnorm", "--opset", "20"), 2, "needs a newer opset"),
    "negative tolerance": (None, ("--rtol", "-1"), 2, "not negative"),
    "folder that does not exist": (None, ("-o", "nowhere/out.onnx"), 2, "cannot write there"),
    "folder that cannot be written to": (None, ("-o", "/proc/out.onnx"), 2, "cannot write there"),
    "folder in the place of the file": (None, ("-o", "."), 2, "cannot write there"),
    "unknown option": (None, ("--nonsense",), 2, "unrecognized arguments"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name: str, frn_pt: Path, deploynorm: Callable, tmp_path: Path, require: Callable) -> None:
    require("ort")
    spoil, options, code, phrase = REFUSED[name]
    if spoil is not None:
        spoil(frn_pt)
    before = _written(tmp_path)
    result = deploynorm("export", frn_pt, *options)
    assert result.code == code, result.err
    assert any(part in result.err for part in phrase.split("|")), result.err
    assert "Traceback" not in result.err
    assert _written(tmp_path) == before


def test_network_with_control_flow_on_values_is_refused(deploynorm: Callable, tmp_path: Path) -> None:
    torch.save({}, "empty.pt")
    torch.save(nn.Conv2d(1, 1, 1).state_dict(), "weights.pt")
    result = deploynorm("export", "weights.pt", "--factory", "factories:branching", "--input-shape", "1x1x4x4")
    assert result.code == 2
    assert "Traceback" not in result.err


def test_fault_of_our_own_is_not_taken_for_broken_parity(
    frn_pt: Path, deploynorm: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **given: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(export_verb, "run", fail)
    result = deploynorm("export", frn_pt)
    assert result.code == 70
    assert "fault of deploynorm" in result.err
