"""The verbs on half precision: export, check, run and inspect."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tolerances import EXACT, OP_FLOAT16
from torch import nn

from deploynorm import checkpoint
from deploynorm._check import DEFAULT_TOLERANCE
from deploynorm.layers import FRN2d, MABN2d

FACTORY = """
from torch import nn
from deploynorm.layers import CenConv2d, FRN2d, MABN2d

def folds():
    return nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), FRN2d(4))
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require: Callable[[str], None]) -> None:
    require("ort")
    (tmp_path / "half_factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "half_factories", raising=False)


def _candidates(out: str) -> set[str]:
    return {line.partition("  ")[0] for line in out.splitlines() if line.endswith("  ok") or "BROKEN" in line}


@pytest.mark.parametrize("model", ["frn_pt", "mabn_pt"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_file_is_judged_with_every_tensor_rounded(
    model: str, dtype: str, deploynorm: Callable, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(model)
    result = deploynorm("export", path, "--dtype", dtype)
    assert result.code == 0, result.err
    proto = onnx.load(path.with_suffix(".onnx"))
    onnx.checker.check_model(proto, full_check=True)
    assert onnx.TensorProto.DataType.Name(proto.graph.input[0].type.tensor_type.elem_type).lower() == dtype
    record = json.loads(path.with_suffix(".deploynorm.json").read_text())
    assert record["onnx"] | {"dtype": dtype, "kept_float32": [], "keep_io_types": False} == record["onnx"]
    by_name = {check["candidate"]: check for check in record["checks"]}
    judged = by_name[f"half ({dtype}, each tensor rounded)"]
    assert judged["precision"] == dtype
    assert len(judged["comparisons"]) >= 5
    stock = {name for name in by_name if name.startswith("onnxruntime")}
    if dtype == "float16":
        assert stock
        assert all(name.endswith("float16 as float32") for name in stock)
    else:
        assert not stock
        assert "note: onnxruntime cannot load it on the CPU: it holds an operator that" in result.out

    again = deploynorm("check", path, path.with_suffix(".onnx"))
    assert again.code == 0, again.err
    assert _candidates(again.out) == {name for name in by_name if not name.startswith("folded")}
    by_hand = deploynorm("check", path, path.with_suffix(".onnx"), "--backend", "half")
    assert _candidates(by_hand.out) == {f"half ({dtype}, each tensor rounded)"}


def test_inputs_and_outputs_and_named_layers_may_stay_in_float32(frn_pt: Path, deploynorm: Callable) -> None:
    names = [name for name, _ in checkpoint.load(frn_pt).model.named_children()]
    options = (
        "--dtype",
        "float16",
        "--keep-io-types",
        "--keep-float32",
        names[0],
        "--keep-float32",
        f"{names[-1][:2]}*",
    )
    result = deploynorm("export", frn_pt, *options)
    assert result.code == 0, result.err
    record = json.loads(frn_pt.with_suffix(".deploynorm.json").read_text())["onnx"]
    assert record["keep_io_types"]
    assert record["kept_float32"][0] == names[0]
    assert record["kept_float32"][-1] == names[-1]
    assert record["inputs"][0]["dtype"] == "float32"
    tolerances = {float(row.split()[-2]) for row in result.out.splitlines() if row.startswith("half (float16")}
    assert min(tolerances) > 1e-3, "judged as float16 although its outputs are float32"


def test_a_layer_that_is_not_there_is_told_with_near_names(frn_pt: Path, deploynorm: Callable) -> None:
    name = next(name for name, module in checkpoint.load(frn_pt).model.named_modules() if isinstance(module, FRN2d))
    result = deploynorm("export", frn_pt, "--dtype", "float16", "--keep-float32", name[:-1] + "_")
    assert result.code == 2
    assert f"Got '{name[:-1]}_'" in result.err
    assert name in result.err
    assert not frn_pt.with_suffix(".onnx").exists()


def test_a_half_file_without_body_is_judged_too(frn_pt: Path, deploynorm: Callable) -> None:
    result = deploynorm("export", frn_pt, "--dtype", "float16", "--no-function", "--backend", "half")
    assert result.code == 0, result.err
    assert not onnx.load(frn_pt.with_suffix(".onnx")).functions


def _checkpoint(model: nn.Module, path: str = "weights.pt") -> tuple[str, ...]:
    torch.save(model.state_dict(), path)
    return (path, "--factory", "half_factories:folds", "--input-shape", "1x3x12x12")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_half_network_is_folded_before_it_is_rounded_again(dtype: str, deploynorm: Callable) -> None:
    """Folding in float16 would cost more than float32 parity allows."""
    torch.manual_seed(0)
    network = importlib.import_module("half_factories").folds()
    network[1].running_var.uniform_(0.3, 3)
    Path("half_factories.py").write_text(FACTORY.replace("FRN2d(4))", "FRN2d(4)).half()"))
    importlib.reload(importlib.import_module("half_factories"))
    result = deploynorm("export", *_checkpoint(network.half()), "--dtype", dtype)
    assert result.code == 0, result.err + result.out
    graph = onnx.load("weights.onnx").graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    element = {"float32": 1, "float16": 10, "bfloat16": 16}[dtype]
    assert graph.input[0].type.tensor_type.elem_type == element


def test_an_overflow_is_broken_parity_and_names_the_layer(deploynorm: Callable) -> None:
    torch.manual_seed(0)
    network = importlib.import_module("half_factories").folds()
    with torch.no_grad():
        network[3].weight.fill_(6e4)
    options = _checkpoint(network)
    result = deploynorm("export", *options, "--dtype", "float16")
    assert result.code == 1
    assert "the candidate is not finite where the truth is" in result.err
    assert "In float16 the output of layer 3 is not finite" in result.out
    assert "amplifies rounding" not in result.out
    assert not Path("weights.onnx").exists()
    assert deploynorm("export", *options, "--dtype", "bfloat16").code == 0
    # Kept apart, the convolution's output is rounded to float16 again: what follows has to be kept with it.
    assert deploynorm("export", *options, "--dtype", "float16", "--keep-float32", "3").code == 1


@pytest.mark.filterwarnings("default:deploynorm:RuntimeWarning")  # the command line prints it
def test_weights_that_do_not_fit_are_refused_and_small_ones_told(deploynorm: Callable) -> None:
    network = importlib.import_module("half_factories").folds()
    with torch.no_grad():
        network[3].weight[0] *= 1e-9
    result = deploynorm("export", *_checkpoint(network), "--dtype", "float16", "--rtol", 1, "-q")
    assert result.code == 0
    assert "3.weight (1 of 4 channels)" in result.err
    with torch.no_grad():
        network[3].weight[0] = 1e6
    result = deploynorm("export", *_checkpoint(network), "--dtype", "float16")
    assert result.code == 2
    assert "layer 3: weight does not fit into float16. Got 1e+06" in result.err


def test_the_networks_own_half_error_is_shown_beside_a_broken_one(mabn_pt: Path, deploynorm: Callable) -> None:
    result = deploynorm("export", mabn_pt, "--dtype", "bfloat16", "--rtol", 1e-4, "--atol", 0)
    assert result.code == 1
    assert "the network itself, bfloat16" in result.out
    assert "it amplifies rounding" in result.out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_run_takes_float32_arrays_and_images_for_a_half_file(
    dtype: str, frn_pt: Path, deploynorm: Callable, exported: Callable
) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 16), dtype=np.uint8)).save("shoe.png")
    x = np.random.default_rng(0).normal(size=(2, 1, 15, 13)).astype(np.float32)
    np.save("x.npy", x)
    np.save("large.npy", x.astype(np.float64) * (1e6 if dtype == "float16" else 1e39))
    exported(frn_pt, "--dtype", dtype)
    result = deploynorm("run", "frn.onnx", "x.npy", "-o", "y.npz", "--json", "run.json")
    assert result.code == 0, result.err
    assert f"note: x is cast from float32 to {dtype}" in result.out
    assert json.loads(Path("run.json").read_text())["runner"] == f"half ({dtype}, each tensor rounded)"
    got = np.load("y.npz")["output"]
    assert got.dtype == (np.float32 if dtype == "bfloat16" else np.float16)
    assert ("written as float32" in result.out) == (dtype == "bfloat16")
    with torch.no_grad():
        want = checkpoint.load(frn_pt).model(torch.from_numpy(x)).numpy()
    assert np.abs(got - want).max() <= DEFAULT_TOLERANCE[dtype].rtol * np.abs(want).max()
    by_image = deploynorm("run", "frn.onnx", "shoe.png")
    assert by_image.code == 0, by_image.err
    assert all(label in by_image.out for label in ("bag", "boot", "coat"))
    too_large = deploynorm("run", "frn.onnx", "large.npy")
    assert too_large.code == 2
    assert f"input x: does not fit into {dtype}" in too_large.err


def test_run_of_a_half_file_in_another_backend(frn_pt: Path, deploynorm: Callable, exported: Callable) -> None:
    x = np.random.default_rng(0).normal(size=(2, 1, 15, 13)).astype(np.float32)
    np.save("x.npy", x)
    exported(frn_pt, "--dtype", "float16")
    outputs = {}
    for backend in ("half", "onnxruntime", "reference"):
        result = deploynorm("run", "frn.onnx", "x.npy", "-o", "y.npz", "--backend", backend)
        assert result.code == 0, result.err
        outputs[backend] = np.load("y.npz")["output"].astype(np.float64)
    scale = np.abs(outputs["reference"]).max()
    for backend in ("half", "onnxruntime"):
        np.testing.assert_allclose(outputs[backend] / scale, outputs["reference"] / scale, **OP_FLOAT16.kwargs())


def test_run_of_a_half_model(frn_pt: Path, deploynorm: Callable) -> None:
    content = torch.load(frn_pt, weights_only=True)
    network = checkpoint.load(frn_pt).model.half()
    checkpoint.save(
        "half.pt",
        factory=content["factory"],
        kwargs=content["kwargs"],
        model=network,
        image=checkpoint.load(frn_pt).image,
    )
    x = np.random.default_rng(0).normal(size=(2, 1, 15, 13)).astype(np.float32)
    np.save("x.npy", x)
    result = deploynorm("run", "half.pt", "x.npy", "-o", "y.npz")
    assert result.code == 0, result.err
    model = checkpoint.load("half.pt").model
    with torch.no_grad():
        want = model(torch.from_numpy(x).to(next(model.parameters()).dtype))
    np.testing.assert_allclose(np.load("y.npz")["output_0"], want.numpy(), **EXACT.kwargs())


def test_inspect_tells_the_types_of_weights(frn_pt: Path, deploynorm: Callable, exported: Callable) -> None:
    exported(frn_pt, "--dtype", "float16")
    result = deploynorm("inspect", "frn.onnx", "--json", "file.json")
    assert result.code == 0, result.err
    facts = json.loads(Path("file.json").read_text())
    assert facts["inputs"] == {"x": "float16 (N, 1, H, W)"}
    assert facts["weights"]["float16"] > 100 * facts["weights"]["float"] > 0
    assert re.search(r"weights +float16: \d+, float: \d+", result.out)


def test_folded_mabn_leaves_nothing_in_float32(mabn_pt: Path, exported: Callable) -> None:
    assert any(isinstance(module, MABN2d) for module in checkpoint.load(mabn_pt).model.modules())
    exported(mabn_pt, "--dtype", "float16")
    assert {tensor.data_type for tensor in onnx.load("mabn.onnx").graph.initializer} <= {
        onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}  # fmt: skip
