"""`deploynorm rewrite`: what it writes and prints, and that nothing is left of what it refuses."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import loose_forms
import onnx
import onnx.helper
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from graphs import frn_model
from loose_forms import exported as exported_form
from torch import nn

from deploynorm._export import export
from deploynorm.contract import (
    ADD_OP_TYPE,
    METADATA_CPU,
    METADATA_IMAGE,
    METADATA_LABELS,
    METADATA_SIZES,
    OP_TYPE,
)
from deploynorm.files import sha256
from deploynorm.layers import FRN2d
from deploynorm.rewrite.cpu import optimize_for_cpu
from deploynorm.rewrite.result import RewriteResult

pytestmark = pytest.mark.usefixtures("ort", "native")


@pytest.fixture
def exported(frn_pt: Path, export: Callable) -> Path:
    """The file of the FRN network, without its manifest."""
    export(frn_pt)
    frn_pt.with_suffix(".deploynorm.json").unlink()
    return frn_pt.with_suffix(".onnx")


def _metadata(path: Path | str) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_model_alone_is_enough(exported: Path, frn_pt: Path, deploynorm: Callable, tmp_path: Path) -> None:
    before = exported.read_bytes()
    present = {path.name for path in tmp_path.iterdir()}
    result = deploynorm("rewrite", "frn.onnx", "--optimize-for-cpu", "--json", "record.json")
    assert {path.name for path in tmp_path.iterdir()} - present == {"frn.cpu.onnx", "record.json"}
    assert exported.read_bytes() == before
    for text in (
        ADD_OP_TYPE,
        "Unchanged, and why",
        "Nodes",
        "Parity with frn.onnx",
        "wrote frn.cpu",
    ):
        assert text in result.out
    assert "BROKEN" not in result.out
    record = json.loads(frn_pt.with_name("record.json").read_text())
    assert len(record["checks"][0]["comparisons"]) >= 5  # shapes that the dynamic axes allow
    deploynorm("check", frn_pt, "frn.cpu.onnx")


def test_file_tells_its_machine_and_keeps_what_it_told(exported: Path, deploynorm: Callable) -> None:
    deploynorm("rewrite", exported, "--optimize-for-cpu", "-o", "net.onnx", "--json", "record.json")
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


def test_shape_is_asked_for_where_the_file_does_not_tell_it(deploynorm: Callable, refused: Callable) -> None:
    network = nn.Sequential(nn.Conv2d(3, 20, 3), FRN2d(20), nn.Conv2d(20, 4, 3))
    exported = export(network, [torch.randn(2, 3, 9, 9)], dynamic="all")
    del exported.model.metadata_props[METADATA_SIZES]
    exported.save("net.onnx")
    refused(2, "give a shape (--input-shape)", "rewrite", "net.onnx", "--optimize-for-cpu")
    deploynorm("rewrite", "net.onnx", "--optimize-for-cpu", "--input-shape", "1x3x9x9", "-q")
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
    assert "BROKEN" in deploynorm("rewrite", exported, "--optimize-for-cpu", "--json", "record.json", code=1).out
    assert {path.name for path in tmp_path.iterdir()} - present == {"record.json"}
    assert not json.loads(Path("record.json").read_text())["checks"][0]["ok"]


def test_options_that_cannot_be_are_refused(exported: Path, refused: Callable) -> None:
    refused(2, "MODEL itself", "rewrite", exported, "--optimize-for-cpu", "-o", "./frn.onnx")
    refused(2, "name a rewrite: --optimize-for-cpu", "rewrite", exported)


def test_a_file_in_which_nothing_can_be_rewritten_is_refused_with_the_reasons(refused: Callable) -> None:
    """The tests of optimize_for_cpu have the other files that it refuses."""
    onnx.save(frn_model(), "net.onnx")
    options = ("--optimize-for-cpu", "--input-shape", "2x4x5x5")
    result = refused(2, "nothing in it can be rewritten", "rewrite", "net.onnx", *options)
    assert "it reads X, which is in the plain layout" in result.out
    refused(2, "no such file", "rewrite", "gone.onnx", *options)


def test_what_is_not_installed_is_named(exported: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploynorm.libraries.find.find_library", lambda name: None)
    refused(3, "deploynorm plugins build", "rewrite", exported, "--optimize-for-cpu")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(3, "pip install 'deploynorm[cpu]'", "rewrite", exported, "--optimize-for-cpu")


def test_file_of_another_machine_does_not_run(exported: Path, deploynorm: Callable, refused: Callable) -> None:
    deploynorm("rewrite", exported, "--optimize-for-cpu", "-q")
    model = onnx.load("frn.cpu.onnx")
    [entry] = [entry for entry in model.metadata_props if entry.key == METADATA_CPU]
    entry.value = json.dumps(json.loads(entry.value) | {"block": 64})
    onnx.save(model, "frn.cpu.onnx")
    refused(3, "rewrite ORIGINAL.onnx --optimize-for-cpu", "run", "frn.cpu.onnx", "x.npy")


def test_a_foreign_file_is_fused_expanded_and_written_as_it_is_where_nothing_is_to_be_done(
    deploynorm: Callable, refused: Callable
) -> None:
    Path("net.onnx").write_bytes(exported_form("paper", "TorchScript 17") or b"")
    shape = ("--input-shape", f"2x{loose_forms.CHANNELS}x9x7")
    result = deploynorm("rewrite", "net.onnx", "--fuse", *shape, "--json", "record.json")
    assert "in loose operators" not in result.err  # what to do about them is being done
    assert OP_TYPE in result.out
    assert "wrote net.fused.onnx" in result.out
    assert json.loads(Path("record.json").read_text())["checks"][0]["ok"]
    again = deploynorm("rewrite", "net.fused.onnx", "--fuse", "-o", "again.onnx")
    assert "wrote again.onnx, as MODEL is" in again.out
    assert Path("again.onnx").read_bytes() == Path("net.fused.onnx").read_bytes()
    deploynorm("rewrite", "net.fused.onnx", "--expand", "primitives", *shape, "-q")
    assert {node.domain for node in onnx.load("net.fused.expanded.onnx").graph.node} == {""}
    refused(2, "no choice of expand", "rewrite", "net.onnx", "--expand", "custom", *shape)


def test_the_reasons_of_a_mean_that_stays_are_listed(deploynorm: Callable) -> None:
    onnx.save(onnx.parser.parse_model(GRAPH.format(nodes=MEAN, more="")), "net.onnx")
    result = deploynorm("rewrite", "net.onnx", "--fuse", "--fold")
    assert "more than the axes of space" in result.out
    assert Path("net.folded.onnx").read_bytes() == Path("net.onnx").read_bytes()


GRAPH = """
<ir_version: 10, opset_import: ["": 20]>
net (float[N, 4, H, W] x) => (float[N, 4, H, W] y) <int64[3] axes = {{1, 2, 3}} {more}> {{ {nodes} }}"""
MEAN = "s = Mul (x, x) m = ReduceMean (s, axes) r = Sqrt (m) y = Div (x, r)"


def _sparse(model: onnx.ModelProto) -> None:
    values = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [2.0])
    indices = onnx.helper.make_tensor("w_indices", onnx.TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [1]))


def _outside(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.ClearField("int64_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")


HOSTILE = {
    "cycle": (lambda model: model.graph.node[0].input.__setitem__(0, "r"), "topologically sorted"),
    "missing": (lambda model: model.graph.initializer.pop(), "topologically sorted|not output of any previous"),
    "double": (lambda model: model.graph.node[1].output.__setitem__(0, "s"), "SSA"),
    "sparse": (_sparse, "a sparse weight"),
    "outside": (_outside, "not beside the model"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused_before_anything_is_touched(name: str, refused: Callable) -> None:
    change, reason = HOSTILE[name]
    model = onnx.parser.parse_model(GRAPH.format(nodes=MEAN, more=""))
    change(model)
    Path("net.onnx").write_bytes(model.SerializeToString())
    Path("edit.py").write_text("print('was run')\ndef edit(graph): pass\n")
    for passes in (("--fuse", "--fold"), ("--surgery", "edit.py:edit")):
        result = refused(2, "net.onnx", "rewrite", "net.onnx", *passes, "-o", "new.onnx")
        assert re.search(reason, result.err)
        assert "was run" not in result.out
    assert not Path("new.onnx").exists()


EDIT = """
import beside

def shorten(graph):
    root = next(node for node in graph.nodes if node.op == "Sqrt")
    x, end = root.i().i().inputs[0], root.o().outputs[0]
    graph.frn(x, 1, 0, float("-inf"), beside.EPS, output=end)
    return graph.cleanup()

def leave(graph):
    pass

def break_it(graph):
    graph.nodes[-1].op = "Mul"

def fail(graph):
    nodes = {node.name: node for node in graph.nodes}
    return nodes["gone"]

def leave_the_process(graph):
    raise SystemExit("that is all")

def count(graph):
    return len(graph.nodes)

class Own(BaseException):
    pass

def raise_its_own(graph):
    import os
    os.chdir("/")
    raise Own("a reason")

def add_nothing(graph):
    graph.nodes.append(None)
"""

EDIT_OF_PYTHON = """
import os, sys
del sys.modules[__name__]
sys.path.clear()
os.chdir("/")

def edit(graph):
    import onnx_graphsurgeon as gs
    end = graph.outputs[0]
    end.inputs[0].outputs[0] = before = gs.Variable("before", end.dtype)
    graph.nodes.append(gs.Node("Identity", inputs=[before], outputs=[end]))
"""


@pytest.fixture
def edited(require: Callable[[str], None]) -> None:
    """A network, and the user's functions for it."""
    require("graphsurgeon")
    nodes = "s = Mul (x, x) m = ReduceMean (s, space) r = Sqrt (m) y = Div (x, r)"
    onnx.save(onnx.parser.parse_model(GRAPH.format(nodes=nodes, more=", int64[2] space = {2, 3}")), "net.onnx")
    Path("edit.py").write_text(EDIT)
    Path("beside.py").write_text("EPS = 1e-8\n")


SHAPE = ("--input-shape", "2x4x9x7")


@pytest.mark.usefixtures("edited")
def test_a_function_of_the_users_changes_the_graph(deploynorm: Callable) -> None:
    result = deploynorm("rewrite", "net.onnx", "--surgery", "edit.py:shorten", *SHAPE, "--json", "record.json")
    assert "Parity with net.onnx" in result.out
    assert "wrote net.surgery.onnx" in result.out
    assert [node.op_type for node in onnx.load("net.surgery.onnx").graph.node] == [OP_TYPE]
    assert json.loads(Path("record.json").read_text())["checks"][0]["ok"]
    assert "beside" not in sys.modules or "edit" not in sys.modules
    result = deploynorm("rewrite", "net.onnx", "--surgery", "edit.py:leave", *SHAPE, "-o", "equal.onnx")
    assert "the function changed nothing" in result.out
    assert Path("equal.onnx").read_bytes() == Path("net.onnx").read_bytes()


@pytest.mark.usefixtures("edited")
@pytest.mark.parametrize(
    ("named", "problem"),
    {
        "gone.py:shorten": "no such file. Got gone.py; expected FILE.py:FUNCTION",
        "edit.py": "no function is named. Got 'edit.py'; expected FILE.py:FUNCTION",
        "edit.py:shortens": "edit.py has no function shortens. Got functions shorten, leave,",
        "edit.py:fail": """edit.py, line 18: return nodes["gone"]: KeyError: 'gone'.""",
        "edit.py:leave_the_process": 'edit.py, line 21: raise SystemExit("that is all"): SystemExit: that is all.',
        "edit.py:raise_its_own": 'edit.py, line 32: raise Own("a reason"): Own: a reason',
        "edit.py:add_nothing": "surgery: onnx-graphsurgeon cannot write the graph: ",
        "edit.py:count": "edit.py:count: it returns another thing. Got int; expected None or the graph",
        "wrong.py:edit": "wrong.py, line 2: def edit(graph)",
    }.items(),
)
def test_what_a_users_file_lacks_is_said_with_its_line(named: str, problem: str, refused: Callable) -> None:
    Path("wrong.py").write_text("\ndef edit(graph)\n    pass\n")
    result = refused(2, problem, "rewrite", "net.onnx", "--surgery", named, *SHAPE)
    assert "deploynorm/rewrite" not in result.err


@pytest.mark.usefixtures("edited")
def test_what_a_users_file_does_to_python_is_undone(deploynorm: Callable) -> None:
    Path("wild.py").write_text(EDIT_OF_PYTHON)
    search, folder = [*sys.path], Path.cwd()
    try:
        result = deploynorm("rewrite", "net.onnx", "--surgery", "wild.py:edit", *SHAPE, "-o", "new.onnx")
        assert (sys.path, Path.cwd()) == (search, folder)
    finally:
        sys.path[:] = search
        os.chdir(folder)
    assert "wrote new.onnx" in result.out
    assert Path("new.onnx").exists()


@pytest.mark.usefixtures("edited")
def test_surgery_that_changes_the_numbers_is_not_written(deploynorm: Callable, refused: Callable) -> None:
    result = refused(1, "", "rewrite", "net.onnx", "--surgery", "edit.py:break_it", *SHAPE)
    assert "BROKEN" in result.out
    refused(2, "which is read", "rewrite", "net.onnx", "--surgery", "edit.py:leave", *SHAPE, "-o", "edit.py")
