"""`deploynorm export`: what it writes and prints, and that nothing is left of what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploynorm._export import Exported
from deploynorm.cli import export as export_verb
from deploynorm.layers import FRN2d

pytestmark = pytest.mark.usefixtures("ort")


@pytest.mark.parametrize("model", ["frn_pt", pytest.param("mabn_pt", marks=pytest.mark.slow)])
def test_model_alone_is_enough(model: str, export: Callable, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path: Path = request.getfixturevalue(model)
    before = set(tmp_path.iterdir())
    shown = export(path).out
    assert {file.name for file in set(tmp_path.iterdir()) - before} == {
        f"{path.stem}.onnx",
        f"{path.stem}.deploynorm.json",
    }
    for heading in ("Layers", "Nodes", "Parity with the network in float64"):
        assert heading in shown
    assert "BROKEN" not in shown
    onnx.checker.check_model(str(path.with_suffix(".onnx")), full_check=True)


def test_manifest_and_file_tell_origin_versions_checks_labels_and_preprocessing(frn_pt: Path, export: Callable) -> None:
    export(frn_pt)
    record = json.loads(frn_pt.with_suffix(".deploynorm.json").read_text())
    assert record["source"]["factory"] == "deploynorm.models.frn_resnet:resnet20"
    assert record["onnx"]["inputs"] == [{"name": "x", "shape": ["N", 1, "H", "W"], "dtype": "float32"}]
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(check["ok"] and len(check["comparisons"]) >= 5 for check in record["checks"])
    entries = {entry.key: json.loads(entry.value) for entry in onnx.load("frn.onnx").metadata_props}
    assert entries["deploynorm.labels"] == ["bag", "boot", "coat"]
    assert entries["deploynorm.image"] == {"shape": [1, 12, 12], "mean": [0.5], "std": [0.25]}
    assert (record["image"], record["labels"]) == (entries["deploynorm.image"], entries["deploynorm.labels"])


def test_options_reach_the_file(small: Callable, deploynorm: Callable) -> None:
    model = small("conv", nn.Sequential(nn.Conv2d(3, 8, 3), FRN2d(8)))
    options = ("--factory-kwargs", '{"channels": 8}', "--opset", 23, "--lowering", "rmsnorm", "--dynamic", "batch")
    deploynorm("export", *model, *options, "--external-data", "-o", "named.onnx", "--json", "report.json")
    model = onnx.load("named.onnx")
    assert [opset.version for opset in model.opset_import] == [23]
    assert "RMSNormalization" in {node.op_type for node in model.graph.node}
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["N", 3, 12, 12]
    assert Path("named.onnx.data").exists()
    manifest = json.loads(Path("named.deploynorm.json").read_text())
    assert json.loads(Path("report.json").read_text())["onnx"] == manifest["onnx"]
    assert manifest["image"] is manifest["labels"] is None


def test_file_without_body_is_checked_by_the_reference_evaluator(small: Callable, deploynorm: Callable) -> None:
    deploynorm("export", *small("conv"), "--no-function", "--backend", "reference", "--dynamic", "none")
    assert not onnx.load("weights.onnx").functions


@pytest.mark.usefixtures("without_library")
def test_file_without_body_and_library_says_what_to_do(small: Callable, refused: Callable) -> None:
    result = refused(2, "deploynorm plugins build", "export", *small("conv"), "--no-function")
    assert "--no-function" in result.err


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("options", [(), ("--no-function",)], ids=["with body", "without body"])
def test_file_is_checked_with_the_library_and_stock_where_it_has_a_body(
    options: tuple[str, ...], small: Callable, deploynorm: Callable
) -> None:
    shown = deploynorm("export", *small("conv"), *options).out.splitlines()
    candidates = {line.partition("  ")[0] for line in shown if line.startswith("onnxruntime")}
    assert candidates == {"onnxruntime (cpu), deploynorm library", *(() if options else ("onnxruntime (cpu)",))}


def test_network_that_takes_even_sizes_alone_is_checked_on_those(small: Callable, deploynorm: Callable) -> None:
    assert "x 1x3x48x48" in deploynorm("export", *small("unet", shape="1x3x16x16"), "-v").out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("test_resnet", 15), ("mobilenetv2_035", 52)])
def test_timm_network_with_free_sizes(name: str, layers: int, timm: ModuleType, deploynorm: Callable) -> None:
    Path("timm_factories.py").write_text(
        "import timm\n"
        "from timm.layers.filter_response_norm import FilterResponseNormTlu2d\n\n"
        "def build(name):\n"
        "    return timm.create_model(name, norm_layer=FilterResponseNormTlu2d)\n"
    )
    network = timm.create_model(name, norm_layer=timm.layers.filter_response_norm.FilterResponseNormTlu2d)
    torch.save(network.state_dict(), "net.pt")
    factory = ("--factory", "timm_factories:build", "--factory-kwargs", json.dumps({"name": name}))
    deploynorm("export", "net.pt", *factory, "--input-shape", "2x3x128x128")
    facts = json.loads(Path("net.deploynorm.json").read_text())["onnx"]
    assert facts["nodes"]["deploynorm::FilterResponseNormalization"] == layers
    assert facts["inputs"][0]["shape"] == ["N", 3, "H", "W"]


def test_broken_parity_exits_with_1_and_leaves_no_file(
    small: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault planted between export and file: a weight is moved."""
    save = Exported.save

    def save_broken(self: Exported, path: Path, **options: object) -> None:
        save(self, path, **options)
        model = onnx.load(path)
        weight = next(w for w in model.graph.initializer if len(w.dims) == 4)
        weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) + np.float32(0.05)).tobytes()
        onnx.save(model, path)

    monkeypatch.setattr(Exported, "save", save_broken)
    assert "BROKEN" in refused(1, "off by", "export", *small("conv")).out


def test_a_tolerance_that_does_not_hold_keeps_the_earlier_file(small: Callable, refused: Callable) -> None:
    """One that float32 cannot hold stands in for a network that is as far from float64 itself."""
    Path("weights.onnx").write_text("the earlier file")
    result = refused(1, "off by", "export", *small("conv"), "--rtol", 1e-12, "--atol", 0)
    assert "the network itself, float32" in result.out
    assert "it amplifies rounding" in result.out


class Hostile:
    """A pickle of it makes a folder where it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


REFUSED = {
    "factory in no module": (("--factory", "no_such_module:fn"), "no_such_module"),
    "factory arguments that are no JSON": (("--factory-kwargs", "{"), "not JSON"),
    "wrong rank": (("--input-shape", "1x12x12"), "channels"),
    "wrong channels": (("--input-shape", "1x3x12x12"), "channels"),
    "shape that is none": (("--input-shape", "large"), "not a shape"),
    "shape of an unknown input": (("--input-shape", "y:1x1x12x12"), "no input 'y'"),
    "unsupported opset": (("--opset", "17"), "unsupported opset"),
    "rmsnorm at an old opset": (("--lowering", "rmsnorm", "--opset", "20"), "needs a newer opset"),
    "negative tolerance": (("--rtol", "-1"), "not negative"),
    "folder that does not exist": (("-o", "nowhere/out.onnx"), "cannot write there"),
    "folder that cannot be written to": (("-o", "/proc/out.onnx"), "cannot write there"),
    "folder in the place of the file": (("-o", "."), "cannot write there"),
    "unknown option": (("--nonsense",), "unrecognized arguments"),
}


@pytest.mark.parametrize(("options", "phrase"), REFUSED.values(), ids=REFUSED)
def test_bad_options_are_refused(
    options: tuple[str, ...], phrase: str, small: Callable, frn_pt: Path, refused: Callable
) -> None:
    model = (frn_pt,) if "--input-shape" in options else small("conv")
    refused(2, phrase, "export", *model, *options)


def test_file_that_cannot_be_read_is_refused(refused: Callable) -> None:
    """The commands read files with checkpoint.load, whose tests have every kind of them."""
    refused(2, "no such file", "export", "gone.pt")
    torch.save({"model": Hostile()}, "hostile.pt")
    refused(2, "mkdir", "export", "hostile.pt")
    assert not Path("pwned").exists()


def test_network_with_control_flow_on_values_is_refused(small: Callable, refused: Callable) -> None:
    refused(2, "cannot trace the network", "export", *small("branching", shape="1x1x4x4"))


def test_fault_of_our_own_is_not_taken_for_broken_parity(
    frn_pt: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **given: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(export_verb, "run", fail)
    refused(70, "fault of deploynorm", "export", frn_pt)
