"""The other verbs, and the command line as a whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import FOLD_FLOAT32, OP_FLOAT32

from deploynorm import checkpoint, libraries
from deploynorm.contract import DOMAIN, OPERATORS


@pytest.fixture
def png(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "shoe.png"
    pixels = np.random.default_rng(0).integers(0, 255, (20, 16), dtype=np.uint8)
    image.fromarray(pixels).save(path)
    return path


@pytest.mark.usefixtures("ort")
def test_fold_writes_an_archive_that_export_takes(small: Callable, deploynorm: Callable) -> None:
    network = small("folds")
    assert "MABN2d" in deploynorm("fold", *network).out
    before = checkpoint.load("weights.pt", factory="factories:folds").model
    after = checkpoint.load("weights.folded.pt2").model
    x = torch.randn(3, 3, 17, 15)
    with torch.no_grad():
        torch.testing.assert_close(after(x), before(x), **FOLD_FLOAT32.kwargs())
    deploynorm("export", "weights.folded.pt2")
    deploynorm("check", *network, "weights.folded.onnx")


def test_check_accepts_the_file_and_rejects_that_of_another_network(
    frn_pt: Path, mabn_pt: Path, deploynorm: Callable, export: Callable
) -> None:
    export(frn_pt)
    deploynorm("check", frn_pt, "frn.onnx", "--seed", 7, "--json", "check.json")
    assert json.loads(Path("check.json").read_text())["ok"]
    assert "BROKEN" in deploynorm("check", mabn_pt, "frn.onnx", code=1).out


@pytest.mark.usefixtures("ort")
def test_check_in_onnx_reference_evaluator(small: Callable, deploynorm: Callable) -> None:
    network = small("conv")
    deploynorm("export", *network, "--dynamic", "none")
    assert "reference" in deploynorm("check", *network, "weights.onnx", "--backend", "reference").out


@pytest.mark.usefixtures("ort")
@pytest.mark.parametrize("backend", ["openvino", "ncnn", "mnn"])
def test_other_runtimes_check_and_run_a_file_with_our_nodes(
    backend: str, frn_pt: Path, png: Path, deploynorm: Callable, export: Callable, require: Callable[[str], None]
) -> None:
    require(backend)
    # Each size of an image is a conversion for ncnn, which takes seconds.
    export(frn_pt, *(("--dynamic", "batch") if backend == "ncnn" else ()))
    deploynorm("check", frn_pt, "frn.onnx", "--backend", backend, "--json", "check.json")
    assert {each["candidate"] for each in json.loads(Path("check.json").read_text())["checks"]} == {f"{backend} (cpu)"}
    for each in ("onnxruntime", backend):
        deploynorm("run", "frn.onnx", png, "--backend", each, "-o", f"{each}.npz")
    got, want = (np.load(f"{each}.npz") for each in (backend, "onnxruntime"))
    for name in want.files:
        np.testing.assert_allclose(got[name], want[name], **OP_FLOAT32.kwargs())


def test_run_prints_the_classes_of_an_image(frn_pt: Path, png: Path, deploynorm: Callable, export: Callable) -> None:
    export(frn_pt)
    shown = deploynorm("run", "frn.onnx", png, "--json", "onnx.json").out
    deploynorm("run", frn_pt, png, "--json", "eager.json")
    assert all(label in shown for label in ("bag", "boot", "coat"))
    rankings = [
        next(iter(json.loads(Path(name).read_text())["results"][0]["outputs"].values()))[0]
        for name in ("onnx.json", "eager.json")
    ]
    assert [entry["label"] for entry in rankings[0]] == [entry["label"] for entry in rankings[1]]
    probabilities = [[entry["probability"] for entry in ranking] for ranking in rankings]
    np.testing.assert_allclose(*probabilities, **OP_FLOAT32.kwargs())
    assert sum(probabilities[0]) == pytest.approx(1)


def test_run_takes_arrays_and_writes_outputs(frn_pt: Path, deploynorm: Callable, export: Callable) -> None:
    x = np.random.default_rng(0).normal(size=(2, 1, 15, 13)).astype(np.float32)
    np.save("x.npy", x)
    np.savez("x.npz", x=x)
    export(frn_pt)
    with torch.no_grad():
        want = checkpoint.load(frn_pt).model(torch.from_numpy(x)).numpy()
    for given in ("x.npy", "x=x.npy", "x.npz"):
        deploynorm("run", "frn.onnx", given, "-o", "y.npz")
        np.testing.assert_allclose(np.load("y.npz")["output"], want, **OP_FLOAT32.kwargs())


RUN_REFUSED = {
    "array of the wrong rank": (["wrong.npy"], "wrong rank"),
    "array file that is not there": (["none.npy"], "no such file"),
    "input of another name": (["other=none.npy"], "the model has no input 'other'"),
    "file that is no image": (["frn.deploynorm.json"], "not an image"),
    "two files for one input": (["wrong.npy", "shoe.png"], "two files for input 'x'"),
    "eager on an ONNX file": (["shoe.png", "--backend", "eager"], "not an ONNX file"),
}


@pytest.mark.usefixtures("png")
@pytest.mark.parametrize(("arguments", "phrase"), RUN_REFUSED.values(), ids=RUN_REFUSED)
def test_run_refuses(arguments: list[str], phrase: str, frn_pt: Path, refused: Callable, export: Callable) -> None:
    export(frn_pt)
    np.save("wrong.npy", np.zeros((1, 12, 12), np.float32))
    refused(2, phrase, "run", "frn.onnx", *arguments)


def test_run_of_a_damaged_onnx_file(refused: Callable) -> None:
    Path("bad.onnx").write_bytes(b"not protobuf at all")
    refused(2, "not an ONNX file", "run", "bad.onnx", "x.npy")


def test_inspect_tells_of_a_model_and_of_a_file(frn_pt: Path, deploynorm: Callable, export: Callable) -> None:
    export(frn_pt)
    deploynorm("inspect", frn_pt, "--json", "model.json")
    assert json.loads(Path("model.json").read_text())["layers"]["FRN2d"] == 21
    deploynorm("inspect", "frn.onnx", "--json", "file.json")
    facts = json.loads(Path("file.json").read_text())
    plain, residual = (f"{DOMAIN}::{op_type}" for op_type in OPERATORS)
    assert facts["functions"] == [plain, residual]
    assert (facts["nodes"][plain], facts["nodes"][residual]) == (12, 9)
    assert facts["inputs"] == {"x": "float (N, 1, H, W)"}


@pytest.mark.usefixtures("ort")
def test_quiet_prints_nothing_and_verbose_more(small: Callable, deploynorm: Callable) -> None:
    network = small("folds")
    quiet, plain, verbose = (deploynorm("export", *network, *option) for option in (["-q"], [], ["-v"]))
    assert quiet.out == quiet.err == ""
    assert "into 0" not in plain.out
    assert "into 0" in verbose.out


@pytest.mark.usefixtures("native")
def test_plugins_path_prints_the_path_alone(deploynorm: Callable) -> None:
    assert deploynorm("plugins", "path").out == f"{libraries.library_path()}\n"


@pytest.mark.slow
@pytest.mark.usefixtures("without_library")
def test_plugins_build_makes_what_path_prints(
    deploynorm: Callable, unoptimized_compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", unoptimized_compiler)
    deploynorm("plugins", "path", code=3)
    deploynorm("plugins", "build", "--json", "build.json")
    library = Path(json.loads(Path("build.json").read_text())["library"])
    assert library.is_file()
    assert deploynorm("plugins", "path").out == f"{library}\n"


@pytest.mark.usefixtures("native", "ort")
def test_plugins_info_tells_library_processor_compiler_and_runtime(deploynorm: Callable) -> None:
    deploynorm("plugins", "info", "--json", "info.json")
    facts = json.loads(Path("info.json").read_text())
    assert facts["library"] == str(libraries.library_path())
    assert "baseline" in facts["processor runs"]
    assert facts["onnxruntime"].endswith("takes the library")
    parts = "library, processor runs, CUDA kernels, for training, TensorRT plugin, compiler, cmake, CUDA compiler"
    assert set(facts) == {"onnxruntime", *parts.split(", ")}


@pytest.mark.usefixtures("without_library")
def test_plugins_info_without_a_library_says_how_to_get_one(deploynorm: Callable) -> None:
    assert "deploynorm plugins build" in deploynorm("plugins", "info").out


def test_help_imports_nothing_heavy() -> None:
    """--help must answer at once; importing torch alone takes seconds."""
    program = (
        "import sys\n"
        "from deploynorm.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'rich', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    for verb in ("import", "fold", "export", "rewrite", "check", "run", "inspect"):
        assert f"\n    {verb} " in done.stdout


@pytest.mark.parametrize("verb", ["import", "fold", "export", "rewrite", "check", "run", "inspect"])
def test_help_of_each_verb(verb: str, deploynorm: Callable) -> None:
    assert "exit codes: 0 done" in deploynorm(verb, "--help").out


def test_a_number_out_of_its_range_is_refused(frn_pt: Path, refused: Callable, export: Callable) -> None:
    export(frn_pt)
    np.save("x.npy", np.zeros((1, 3, 32, 32), np.float32))
    refused(2, "--top: not a number of classes. Got -1; expected 1 or more", "run", "frn.onnx", "x.npy", "--top", "-1")
    refused(2, "not a seed. Got -1; expected a whole number from 0", "check", frn_pt, "frn.onnx", "--seed", "-1")
    for text in ("-5", "2.5", "all"):
        refused(2, f"--workspace: must be a whole number from 0: {text}", "build", "frn.onnx", f"--workspace={text}")
    refused(2, "--optimization-level: invalid choice: 9", "build", "frn.onnx", "--optimization-level", "9")


def test_what_is_no_plugin_library_is_named(frn_pt: Path, refused: Callable, export: Callable) -> None:
    export(frn_pt)
    np.save("x.npy", np.zeros((1, 3, 32, 32), np.float32))
    os.mkfifo("fifo.so")
    Path("text.so").write_text("no library")
    for name, message in {
        "fifo.so": "no plugin library: not a regular file",
        ".": "no plugin library: not a regular file",
        "none.so": "no such plugin library",
        "text.so": "text.so: file too short",
    }.items():
        refused(3, message, "run", "frn.onnx", "x.npy", "--plugins", name)


def test_an_engine_is_not_checked_but_the_file_it_was_built_from(frn_pt: Path, refused: Callable) -> None:
    Path("net.engine").write_bytes(b"plan")
    message = "net.engine: a TensorRT engine, where an ONNX file is needed. Fix: name the file that it was built from"
    refused(2, message, "check", frn_pt, "net.engine")
