"""The verbs on half precision: export, check, run and inspect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from tolerances import EXACT

from deploynorm import checkpoint
from deploynorm._check import DEFAULT_TOLERANCE
from deploynorm.layers import FRN2d

pytestmark = pytest.mark.usefixtures("ort")

HALF = ("--dtype", "float16")
X = np.random.default_rng(0).normal(size=(2, 1, 15, 13)).astype(np.float32)


def _candidates(out: str) -> set[str]:
    return {line.partition("  ")[0] for line in out.splitlines() if line.endswith("  ok") or "BROKEN" in line}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_file_is_judged_with_every_tensor_rounded(dtype: str, deploynorm: Callable, small: Callable) -> None:
    model = small("folds")
    shown = deploynorm("export", *model, "--dtype", dtype).out
    proto = onnx.load("weights.onnx")
    onnx.checker.check_model(proto, full_check=True)
    name = onnx.TensorProto.DataType.Name
    assert name(proto.graph.input[0].type.tensor_type.elem_type).lower() == dtype
    types = {tensor.name: name(tensor.data_type).lower() for tensor in proto.graph.initializer}
    assert types["0.weight"] == types["0.bias"] == types["3.weight"] == dtype, "with what MABN was folded into"
    record = json.loads(Path("weights.deploynorm.json").read_text())
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
        assert "note: onnxruntime cannot load it on the CPU: it holds an operator that" in shown

    again = deploynorm("check", *model, "weights.onnx").out
    assert _candidates(again) == {name for name in by_name if not name.startswith("folded")}
    by_hand = deploynorm("check", *model, "weights.onnx", "--backend", "half").out
    assert _candidates(by_hand) == {f"half ({dtype}, each tensor rounded)"}


def test_inputs_and_outputs_and_named_layers_may_stay_in_float32(small: Callable, deploynorm: Callable) -> None:
    kept = ("--keep-float32", "0", "--keep-float32", "[45]")
    shown = deploynorm("export", *small("folds"), *HALF, "--keep-io-types", *kept).out
    record = json.loads(Path("weights.deploynorm.json").read_text())["onnx"]
    assert record["keep_io_types"]
    assert record["kept_float32"] == ["0", "4"]
    assert record["inputs"][0]["dtype"] == "float32"
    tolerances = {float(row.split()[-2]) for row in shown.splitlines() if row.startswith("half (float16")}
    assert min(tolerances) > 1e-3, "judged as float16 although its outputs are float32"


def test_a_layer_that_is_not_there_is_told_with_near_names(frn_pt: Path, refused: Callable) -> None:
    name = next(name for name, module in checkpoint.load(frn_pt).model.named_modules() if isinstance(module, FRN2d))
    wrong = name[:-1] + "_"
    assert name in refused(2, f"Got '{wrong}'", "export", frn_pt, *HALF, "--keep-float32", wrong).err


def test_a_half_file_without_body_is_judged_too(small: Callable, deploynorm: Callable) -> None:
    deploynorm("export", *small("folds"), *HALF, "--no-function", "--backend", "half")
    assert not onnx.load("weights.onnx").functions


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_half_network_is_folded_before_it_is_rounded_again(
    dtype: str, deploynorm: Callable, small: Callable, factories: ModuleType
) -> None:
    """Folding in float16 would cost more than float32 parity allows."""
    torch.manual_seed(0)
    network = factories.folds()
    network[1].running_var.uniform_(0.3, 3)
    deploynorm("export", *small("half_folds", network.half()), "--dtype", dtype)
    graph = onnx.load("weights.onnx").graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    element = {"float32": 1, "float16": 10, "bfloat16": 16}[dtype]
    assert graph.input[0].type.tensor_type.elem_type == element


def test_an_overflow_is_broken_parity_and_names_the_layer(
    deploynorm: Callable, refused: Callable, small: Callable, factories: ModuleType
) -> None:
    network = factories.folds()
    with torch.no_grad():
        network[3].weight.fill_(6e4)
    options = small("folds", network)
    result = refused(1, "the candidate is not finite where the truth is", "export", *options, *HALF)
    assert "In float16 the output of layer 3 is not finite" in result.out
    assert "amplifies rounding" not in result.out
    # Kept apart, the convolution's output is rounded to float16 again: what follows has to be kept with it.
    refused(1, "is not finite", "export", *options, *HALF, "--keep-float32", "3")
    deploynorm("export", *options, "--dtype", "bfloat16")


@pytest.mark.filterwarnings("default:deploynorm:RuntimeWarning")  # the command line prints it
def test_weights_that_do_not_fit_are_refused_and_small_ones_told(
    deploynorm: Callable, refused: Callable, small: Callable, factories: ModuleType
) -> None:
    network = factories.folds()
    with torch.no_grad():
        network[3].weight[0] *= 1e-9
    told = deploynorm("export", *small("folds", network), *HALF, "--rtol", 1, "-q").err
    assert "3.weight (1 of 4 channels)" in told
    with torch.no_grad():
        network[3].weight[0] = 1e6
    wrong = "layer 3: weight does not fit into float16. Got 1e+06"
    refused(2, wrong, "export", *small("folds", network), *HALF)


def test_the_networks_own_half_error_is_shown_beside_a_broken_one(small: Callable, deploynorm: Callable) -> None:
    shown = deploynorm("export", *small("folds"), "--dtype", "bfloat16", "--rtol", 1e-4, "--atol", 0, code=1).out
    assert "the network itself, bfloat16" in shown
    assert "it amplifies rounding" in shown


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_run_takes_float32_arrays_and_images_for_a_half_file(
    dtype: str, frn_pt: Path, deploynorm: Callable, refused: Callable, export: Callable
) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 16), dtype=np.uint8)).save("shoe.png")
    np.save("x.npy", X)
    np.save("large.npy", X.astype(np.float64) * (1e6 if dtype == "float16" else 1e39))
    export(frn_pt, "--dtype", dtype)
    shown = deploynorm("run", "frn.onnx", "x.npy", "-o", "y.npz", "--json", "run.json").out
    assert f"note: x is cast from float32 to {dtype}" in shown
    assert json.loads(Path("run.json").read_text())["runner"] == f"half ({dtype}, each tensor rounded)"
    got = np.load("y.npz")["output"]
    assert got.dtype == (np.float32 if dtype == "bfloat16" else np.float16)
    assert ("written as float32" in shown) == (dtype == "bfloat16")
    with torch.no_grad():
        want = checkpoint.load(frn_pt).model(torch.from_numpy(X)).numpy()
    assert np.abs(got - want).max() <= DEFAULT_TOLERANCE[dtype].rtol * np.abs(want).max()
    by_image = deploynorm("run", "frn.onnx", "shoe.png").out
    assert all(label in by_image for label in ("bag", "boot", "coat"))
    refused(2, f"input x: does not fit into {dtype}", "run", "frn.onnx", "large.npy")


def test_run_of_a_half_file_in_another_backend(frn_pt: Path, deploynorm: Callable, export: Callable) -> None:
    np.save("x.npy", X)
    export(frn_pt, *HALF)
    outputs = {}
    for backend in ("half", "onnxruntime", "reference"):
        deploynorm("run", "frn.onnx", "x.npy", "-o", "y.npz", "--backend", backend)
        outputs[backend] = np.load("y.npz")["output"].astype(np.float64)
    allowed = DEFAULT_TOLERANCE["float16"].rtol * np.abs(outputs["reference"]).max()  # a network's: each rounds it all
    for backend in ("half", "onnxruntime"):
        assert np.abs(outputs[backend] - outputs["reference"]).max() <= allowed


def test_run_of_a_half_model(frn_pt: Path, deploynorm: Callable) -> None:
    loaded = checkpoint.load(frn_pt)
    kwargs = torch.load(frn_pt, weights_only=True)["kwargs"]
    checkpoint.save("half.pt", factory=loaded.factory, kwargs=kwargs, model=loaded.model.half(), image=loaded.image)
    np.save("x.npy", X)
    deploynorm("run", "half.pt", "x.npy", "-o", "y.npz")
    model = checkpoint.load("half.pt").model
    with torch.no_grad():
        want = model(torch.from_numpy(X).to(next(model.parameters()).dtype))
    np.testing.assert_allclose(np.load("y.npz")["output_0"], want.numpy(), **EXACT.kwargs())


def test_inspect_tells_the_types_of_weights(frn_pt: Path, deploynorm: Callable, export: Callable) -> None:
    export(frn_pt, *HALF)
    shown = deploynorm("inspect", "frn.onnx", "--json", "file.json").out
    facts = json.loads(Path("file.json").read_text())
    assert facts["inputs"] == {"x": "float16 (N, 1, H, W)"}
    assert facts["weights"]["float16"] > 100 * facts["weights"]["float"] > 0
    assert re.search(r"weights +float16: \d+, float: \d+", shown)
