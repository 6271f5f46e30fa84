"""`deploynorm rewrite`: what it writes and prints, and that nothing is left of what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from graphs import frn_model
from torch import nn

from deploynorm._export import export
from deploynorm.contract import METADATA_CPU, METADATA_IMAGE, METADATA_LABELS, METADATA_SIZES
from deploynorm.files import sha256
from deploynorm.layers import FRN2d
from deploynorm.onnx_file import save
from deploynorm.rewrite.cpu import optimize_for_cpu
from deploynorm.rewrite.result import RewriteResult


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require: Callable[[str], None]) -> None:
    require("ort")
    require("native")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def exported(frn_pt: Path, exported: Callable[..., Path]) -> Path:
    """The file of the FRN network, without its manifest."""
    path = exported(frn_pt)
    path.with_suffix(".deploynorm.json").unlink()
    return path


def _metadata(path: Path | str) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_model_alone_is_enough(exported: Path, frn_pt: Path, deploynorm: Callable, tmp_path: Path) -> None:
    before = exported.read_bytes()
    present = {path.name for path in tmp_path.iterdir()}
    result = deploynorm("rewrite", "frn.onnx", "--optimize-for-cpu", "--json", "record.json")
    assert result.code == 0, result.err
    assert {path.name for path in tmp_path.iterdir()} - present == {"frn.cpu.onnx", "record.json"}
    assert exported.read_bytes() == before
    for text in (
        "the residual of the FRN before it",
        "Unchanged, and why",
        "Nodes",
        "Parity with frn.onnx",
        "wrote frn.cpu",
    ):
        assert text in result.out
    assert "BROKEN" not in result.out
    record = json.loads(frn_pt.with_name("record.json").read_text())
    assert len(record["checks"][0]["comparisons"]) >= 5  # shapes that the dynamic axes allow
    checked = deploynorm("check", frn_pt, "frn.cpu.onnx")
    assert checked.code == 0, checked.err


def test_file_tells_its_machine_and_keeps_what_it_told(exported: Path, deploynorm: Callable) -> None:
    assert deploynorm("rewrite", exported, "--optimize-for-cpu", "-o", "net.onnx", "--json", "record.json").code == 0
    metadata = _metadata("net.onnx")
    note = json.loads(metadata[METADATA_CPU])
    assert note["source_sha256"] == sha256(exported)
    assert metadata | _metadata(exported) == metadata
    assert {METADATA_IMAGE, METADATA_LABELS, METADATA_SIZES} <= metadata.keys()
    record = json.loads(Path("record.json").read_text())
    assert record["machine"] == note
    assert record["checks"][0]["ok"]
    assert record["nodes"]["after"]["com.microsoft.nchwc::ReorderOutput"] == 1
    assert "com.microsoft.nchwc::ReorderInput" not in record["nodes"]["after"]


def test_shape_is_asked_for_where_the_file_does_not_tell_it(deploynorm: Callable) -> None:
    network = nn.Sequential(nn.Conv2d(3, 20, 3), FRN2d(20), nn.Conv2d(20, 4, 3))
    exported = export(network, [torch.randn(2, 3, 9, 9)], dynamic="all")
    del exported.model.metadata_props[METADATA_SIZES]
    exported.save("net.onnx")
    refused = deploynorm("rewrite", "net.onnx", "--optimize-for-cpu")
    assert refused.code == 2
    assert "give a shape" in refused.err
    assert not Path("net.cpu.onnx").exists()
    assert deploynorm("rewrite", "net.onnx", "--optimize-for-cpu", "--input-shape", "1x3x9x9", "-q").code == 0
    assert Path("net.cpu.onnx").exists()


def test_broken_parity_leaves_no_file(
    exported: Path, deploynorm: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(model: object, **keywords: object) -> RewriteResult:
        result = optimize_for_cpu(model, **keywords)
        bias = result.model.graph.initializers["fc.bias"]
        assert bias.const_value is not None
        bias.const_value = ir.tensor(bias.const_value.numpy() + 1, name=bias.name)
        return result

    monkeypatch.setattr("deploynorm.rewrite.cpu.optimize_for_cpu", wrong)
    present = {path.name for path in tmp_path.iterdir()}
    result = deploynorm("rewrite", exported, "--optimize-for-cpu", "--json", "record.json")
    assert result.code == 1
    assert "BROKEN" in result.out
    assert {path.name for path in tmp_path.iterdir()} - present == {"record.json"}
    assert not json.loads(Path("record.json").read_text())["checks"][0]["ok"]


def _write(model: onnx.ModelProto) -> str:
    onnx.save(model, "net.onnx")
    return "net.onnx"


def _without_frn() -> str:
    export(nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 8, 8)]).save("net.onnx")
    return "net.onnx"


def _rewritten() -> str:
    network = nn.Sequential(nn.Conv2d(3, 16, 3), FRN2d(16), nn.Conv2d(16, 4, 3))
    save(optimize_for_cpu(export(network, [torch.randn(2, 3, 9, 9)]).model).model, "net.onnx")
    return "net.onnx"


def _not_onnx() -> str:
    Path("net.onnx").write_bytes(b"not protobuf at all")
    return "net.onnx"


REFUSED = {
    "no such file": (lambda: "net.onnx", 2, "no such file"),
    "not an ONNX file": (_not_onnx, 2, "not an ONNX file"),
    "float16": (lambda: _write(frn_model("float16")), 2, "not float32"),
    "float64": (lambda: _write(frn_model("float64")), 2, "not float32"),
    "no FRN": (_without_frn, 2, "no node deploynorm::FilterResponseNormalization"),
    "rewritten already": (_rewritten, 2, "rewritten already"),
    "nothing to rewrite": (lambda: _write(frn_model()), 2, "nothing in it can be rewritten"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, deploynorm: Callable, tmp_path: Path) -> None:
    make, code, phrase = REFUSED[name]
    model = make()
    present = {path.name for path in tmp_path.iterdir()}
    result = deploynorm("rewrite", model, "--optimize-for-cpu", "--input-shape", "2x4x5x5")
    assert result.code == code, result.err
    assert phrase in result.err
    assert {path.name for path in tmp_path.iterdir()} == present


def test_reasons_are_told_when_nothing_can_be_rewritten(deploynorm: Callable) -> None:
    result = deploynorm("rewrite", _write(frn_model()), "--optimize-for-cpu")
    assert "it reads X, which is in the plain layout" in result.out


def test_model_itself_is_not_written_over(exported: Path, deploynorm: Callable) -> None:
    before = exported.read_bytes()
    result = deploynorm("rewrite", exported, "--optimize-for-cpu", "-o", f"./{exported.name}")
    assert result.code == 2
    assert "MODEL itself" in result.err
    assert exported.read_bytes() == before


def test_rewrite_must_be_named(exported: Path, deploynorm: Callable) -> None:
    result = deploynorm("rewrite", exported)
    assert result.code == 2
    assert "name a rewrite: --optimize-for-cpu" in result.err


def test_library_that_is_not_built(exported: Path, deploynorm: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploynorm.libraries.find.find_library", lambda name: None)
    result = deploynorm("rewrite", exported, "--optimize-for-cpu")
    assert result.code == 3
    assert "deploynorm plugins build" in result.err


def test_onnxruntime_that_is_not_installed(
    exported: Path, deploynorm: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = deploynorm("rewrite", exported, "--optimize-for-cpu")
    assert result.code == 3
    assert "pip install 'deploynorm[cpu]'" in result.err


def test_file_of_another_machine_does_not_run(exported: Path, deploynorm: Callable) -> None:
    assert deploynorm("rewrite", exported, "--optimize-for-cpu", "-q").code == 0
    model = onnx.load("frn.cpu.onnx")
    [entry] = [entry for entry in model.metadata_props if entry.key == METADATA_CPU]
    entry.value = json.dumps(json.loads(entry.value) | {"block": 64})
    onnx.save(model, "frn.cpu.onnx")
    result = deploynorm("run", "frn.cpu.onnx", "x.npy")
    assert result.code == 3
    assert "rewrite ORIGINAL.onnx --optimize-for-cpu" in result.err
