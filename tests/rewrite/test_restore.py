"""What other tools drop from our files: told, and put back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import onnx.numpy_helper
import onnx.version_converter
import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploynorm import export
from deploynorm.cli import main
from deploynorm.contract import DOMAIN, METADATA_SIZES, NODE_ATTRIBUTES, OPERATORS
from deploynorm.errors import InputError, ModelError
from deploynorm.layers import FRN2d
from deploynorm.losses import find_losses
from deploynorm.lowering import function_proto
from deploynorm.models.frn_resnet import BasicBlock
from deploynorm.onnx_file import OnnxFile
from deploynorm.rewrite import rewrite
from deploynorm.rewrite.restore import restore


@pytest.fixture(autouse=True)
def _needs(require: Callable[[str], None]) -> None:
    require("ort")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both operators, dynamic axes, metadata of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), FRN2d(8), BasicBlock(8, 8)).eval()
    path = tmp_path_factory.mktemp("restore") / "net.onnx"
    export(net, torch.randn(2, 3, 12, 12), input_names="x", metadata={"mine": "kept"}).save(path)
    return path


def converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    return onnx.version_converter.convert_version(model, opset)


def as_graphsurgeon_does(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    return bare


def surgeon(model: onnx.ModelProto) -> onnx.ModelProto:
    gs = pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is not installed")
    made: onnx.ModelProto = gs.export_onnx(gs.import_onnx(model))
    return made


def without_attributes(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for node in bare.graph.node:
        if node.domain == DOMAIN:
            del node.attribute[:]
    return bare


TOOLS: dict[str, tuple[Callable[[onnx.ModelProto], onnx.ModelProto], set[str]]] = {
    "version_converter, 18": (lambda model: converted(model, 18), {"function-missing"}),
    "version_converter, 21": (lambda model: converted(model, 21), {"function-missing"}),
    "compose": (lambda model: onnx.compose.add_prefix(model, "a_"), {"operator-renamed"}),
    "compose, twice": (
        lambda model: onnx.compose.add_prefix(onnx.compose.add_prefix(model, "a_"), "b_"),
        {"operator-renamed"},
    ),
    "graphsurgeon's loss": (as_graphsurgeon_does, {"metadata-missing"}),
    "graphsurgeon": (surgeon, {"metadata-missing"}),
    "attributes": (without_attributes, {"attributes-missing"}),
    "several": (
        lambda model: as_graphsurgeon_does(without_attributes(converted(model, 19))),
        {"function-missing", "attributes-missing", "metadata-missing"},
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_tool_drops_is_told_and_put_back(tool: str, original: Path, tmp_path: Path) -> None:
    change, lost = TOOLS[tool]
    source, path = onnx.load(original), tmp_path / "changed.onnx"
    changed = change(source)
    onnx.save(changed, path)
    assert {loss.name for loss in find_losses(OnnxFile.read(path))} == lost
    result = rewrite(path, [f"restore={original}"])
    assert result, result
    result.save(tmp_path / "again.onnx")
    again = OnnxFile.read(tmp_path / "again.onnx")
    assert not find_losses(again)
    assert {function.name for function in again.proto.functions} == set(OPERATORS)
    assert again.metadata["mine"] == "kept"
    assert [spec.sizes for spec in again.inputs] == [spec.sizes for spec in OnnxFile.read(original).inputs]
    assert again.inputs[0].sizes
    nodes = [node for node in again.proto.graph.node if node.domain == DOMAIN]
    assert all({part.name: part.s.decode() for part in node.attribute} == NODE_ATTRIBUTES for node in nodes)
    [opset] = {entry.version for entry in again.proto.opset_import if entry.domain == ""}
    for function in again.proto.functions:
        expected = function_proto(opset, function.name, maps=True)
        assert [node.op_type for node in function.node] == [node.op_type for node in expected.node]
    onnx.checker.check_model(again.proto, full_check=True)
    assert not rewrite(tmp_path / "again.onnx", [f"restore={original}"]).result.modified


def test_our_own_files_have_lost_nothing(original: Path) -> None:
    assert not find_losses(OnnxFile.read(original))
    plain = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    assert not find_losses(OnnxFile.read(plain))


def test_a_body_that_differs_does_not_pass_the_check(original: Path, tmp_path: Path) -> None:
    """The restored body is run, and not our kernel in its place."""
    false = onnx.load(original)
    for function in false.functions:
        for node in function.node:
            if node.op_type == "Sqrt":
                node.op_type = "Abs"
    onnx.save(false, tmp_path / "false.onnx")
    changed = tmp_path / "changed.onnx"
    onnx.save(converted(onnx.load(original), 20), changed)
    if OnnxFile.read(changed).has_body:  # a conversion to the opset that it has may leave it alone
        bare = onnx.load(changed)
        del bare.functions[:]
        onnx.save(bare, changed)
    assert rewrite(changed, [f"restore={original}"])
    assert not rewrite(changed, [f"restore={tmp_path / 'false.onnx'}"])


def test_what_cannot_be_restored_is_refused(original: Path, tmp_path: Path) -> None:
    onnx.save(onnx.compose.add_prefix(onnx.load(original), "a_"), tmp_path / "changed.onnx")
    foreign = onnx.load(original)
    del foreign.graph.node[:], foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(ModelError, match="holds nothing that deploynorm writes"):
        rewrite(tmp_path / "changed.onnx", [f"restore={tmp_path / 'foreign.onnx'}"])
    with pytest.raises(ModelError, match="no such file"):
        rewrite(tmp_path / "changed.onnx", ["restore=nowhere.onnx"])
    for name in ("restore", "restore="):
        with pytest.raises(InputError, match="restore needs an argument"):
            rewrite(tmp_path / "changed.onnx", [name])
    result = rewrite(tmp_path / "changed.onnx", [f"restore={original}"])
    with pytest.raises(InputError):
        result.save(original)


def _with_other_numbers(model: onnx.ModelProto, by: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    """With other parameters of the last node of ours."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    names = [node.input[1] for node in model.graph.node if node.domain == DOMAIN]
    for tensor in other.graph.initializer:
        if tensor.name == names[-1]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(by(onnx.numpy_helper.to_array(tensor)), tensor.name))
    return other


OTHERS: dict[str, tuple[Callable[[onnx.ModelProto], onnx.ModelProto], bool]] = {
    "numbers": (lambda model: _with_other_numbers(model, lambda gamma: gamma * np.float32(1.1)), False),
    "channels": (lambda model: _with_other_numbers(model, lambda gamma: gamma[:-1]), False),
    "half": (lambda model: _with_other_numbers(model, lambda gamma: gamma.astype(np.float16).astype(np.float32)), True),
    "the file itself": (lambda model: model, True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_network_is_no_original(name: str, original: Path) -> None:
    change, fits = OTHERS[name]
    source = onnx.load(original)
    for tensor in source.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            drawn = array + np.random.default_rng(0).uniform(0.1, 0.2, array.shape).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(drawn, tensor.name))
    changed = ir.from_proto(as_graphsurgeon_does(change(source)))
    if fits:
        assert restore(changed, source.SerializeToString()).modified
    else:
        with pytest.raises(ModelError, match="is another network than the file to restore"):
            restore(changed, source.SerializeToString())


def test_of_files_without_our_nodes_the_weights_tell(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.onnx" for name in "ab"]
    for path, layers in zip(paths, ((nn.Conv2d(3, 4, 3),), (nn.Conv2d(3, 5, 3), nn.ReLU())), strict=True):
        export(nn.Sequential(*layers).eval(), torch.randn(1, 3, 8, 8)).save(path)
    changed = ir.from_proto(as_graphsurgeon_does(onnx.load(paths[0])))
    assert restore(changed, paths[0]).modified
    with pytest.raises(ModelError, match="is another network"):
        restore(changed, paths[1])


def test_of_an_earlier_opset_the_body_stays_away(original: Path, tmp_path: Path) -> None:
    changed = onnx.load(original)
    del changed.functions[:]
    changed.opset_import[0].version = 17
    onnx.save(changed, tmp_path / "changed.onnx")
    result = rewrite(tmp_path / "changed.onnx", [f"restore={original}"]).result
    assert {change.detail for change in result.changes} == {"its function is of opset 20, and the file of 17"}


def test_the_commands_tell_and_restore(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = as_graphsurgeon_does(onnx.compose.add_prefix(onnx.load(original), "a_"))
    onnx.save(changed, "changed.onnx")
    assert main(["rewrite", "changed.onnx", "--restore", str(original)]) == 0
    assert METADATA_SIZES in OnnxFile.read("changed.restored.onnx").metadata
    capsys.readouterr()
    assert main(["doctor", "changed.onnx", "changed.restored.onnx"]) in (0, 3)  # as this machine is
    printed = capsys.readouterr().out
    assert f"{DOMAIN}::a_FilterResponseNormalization" in printed
    assert "its metadata is gone" in printed
    assert "deploynorm rewrite changed.onnx --restore ORIGINAL" in printed
    assert "changed.restored" not in printed
