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

from deploynorm import checkpoint
from deploynorm.cli import main
from deploynorm.layers import MABN2d


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "shoe.png"
    pixels = np.random.default_rng(0).integers(0, 255, (20, 16), dtype=np.uint8)
    image.fromarray(pixels).save(path)
    return path


def test_fold_writes_an_archive_that_export_takes(
    mabn_pt: Path, deploynorm: Callable, tmp_path: Path, require: Callable
) -> None:
    require("ort")
    result = deploynorm("fold", mabn_pt)
    assert result.code == 0, result.err
    assert "MABN2d" in result.out
    folded = tmp_path / "mabn.folded.pt2"
    before, after = checkpoint.load(mabn_pt).model, checkpoint.load(folded).model
    x = torch.randn(3, 1, 17, 15)
    with torch.no_grad():
        torch.testing.assert_close(after(x), before(x), **FOLD_FLOAT32.kwargs())
    assert any(isinstance(module, MABN2d) for module in before.modules())
    exported = deploynorm("export", folded)
    assert exported.code == 0, exported.err
    assert deploynorm("check", mabn_pt, "mabn.folded.onnx").code == 0


def test_check_accepts_the_file_and_rejects_that_of_another_network(
    frn_pt: Path, mabn_pt: Path, deploynorm: Callable, require: Callable, exported: Callable
) -> None:
    require("ort")
    exported(frn_pt)
    accepted = deploynorm("check", frn_pt, "frn.onnx", "--seed", 7, "--json", "check.json")
    assert accepted.code == 0, accepted.err
    assert json.loads(Path("check.json").read_text())["ok"]
    rejected = deploynorm("check", mabn_pt, "frn.onnx")
    assert rejected.code == 1
    assert "BROKEN" in rejected.out


def test_check_in_onnx_reference_evaluator(
    frn_pt: Path, deploynorm: Callable, require: Callable, exported: Callable
) -> None:
    require("ort")
    exported(frn_pt, "--dynamic", "none")
    result = deploynorm("check", frn_pt, "frn.onnx", "--backend", "reference")
    assert result.code == 0, result.err
    assert "reference" in result.out


def test_run_prints_the_classes_of_an_image(
    frn_pt: Path, png: Path, deploynorm: Callable, require: Callable, exported: Callable
) -> None:
    require("ort")
    exported(frn_pt)
    by_file = deploynorm("run", "frn.onnx", png, "--json", "onnx.json")
    by_model = deploynorm("run", frn_pt, png, "--json", "eager.json")
    assert by_file.code == by_model.code == 0, by_file.err + by_model.err
    assert all(label in by_file.out for label in ("bag", "boot", "coat"))
    rankings = [
        next(iter(json.loads(Path(name).read_text())["results"][0]["outputs"].values()))[0]
        for name in ("onnx.json", "eager.json")
    ]
    assert [entry["label"] for entry in rankings[0]] == [entry["label"] for entry in rankings[1]]
    probabilities = [[entry["probability"] for entry in ranking] for ranking in rankings]
    np.testing.assert_allclose(*probabilities, **OP_FLOAT32.kwargs())
    assert sum(probabilities[0]) == pytest.approx(1)


def test_run_takes_arrays_and_writes_outputs(
    frn_pt: Path, deploynorm: Callable, require: Callable, exported: Callable
) -> None:
    require("ort")
    x = np.random.default_rng(0).normal(size=(2, 1, 15, 13)).astype(np.float32)
    np.save("x.npy", x)
    np.savez("x.npz", x=x)
    exported(frn_pt)
    for given in ("x.npy", "x=x.npy", "x.npz"):
        result = deploynorm("run", "frn.onnx", given, "-o", "y.npz")
        assert result.code == 0, result.err
        with torch.no_grad():
            want = checkpoint.load(frn_pt).model(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(np.load("y.npz")["output"], want, **OP_FLOAT32.kwargs())


RUN_REFUSED = {
    "array of the wrong rank": (["wrong.npy"], "wrong rank"),
    "file that is no array": (["frn.pt.npy"], "not an array file|No such file"),
    "file that is no image": (["frn.deploynorm.json"], "not an image"),
    "two files for one input": (["wrong.npy", "shoe.png"], "two files for input 'x'"),
    "eager on an ONNX file": (["shoe.png", "--backend", "eager"], "not an ONNX file"),
}


@pytest.mark.parametrize("name", RUN_REFUSED)
def test_run_refuses(
    name: str, frn_pt: Path, png: Path, deploynorm: Callable, require: Callable, exported: Callable
) -> None:
    require("ort")
    arguments, phrase = RUN_REFUSED[name]
    exported(frn_pt)
    np.save("wrong.npy", np.zeros((1, 12, 12), np.float32))
    result = deploynorm("run", "frn.onnx", *arguments)
    assert result.code == 2
    assert any(part in result.err for part in phrase.split("|")), result.err


def test_run_of_a_damaged_onnx_file(deploynorm: Callable) -> None:
    Path("bad.onnx").write_bytes(b"not protobuf at all")
    result = deploynorm("run", "bad.onnx", "x.npy")
    assert result.code == 2
    assert "not an ONNX file" in result.err


def test_inspect_tells_of_a_model_and_of_a_file(
    frn_pt: Path, deploynorm: Callable, require: Callable, exported: Callable
) -> None:
    require("ort")
    exported(frn_pt)
    model = deploynorm("inspect", frn_pt, "--json", "model.json")
    assert model.code == 0, model.err
    assert json.loads(Path("model.json").read_text())["layers"]["FRN2d"] == 21
    file = deploynorm("inspect", "frn.onnx", "--json", "file.json")
    assert file.code == 0, file.err
    facts = json.loads(Path("file.json").read_text())
    assert facts["functions"] == ["deploynorm::FilterResponseNormalization"]
    assert facts["nodes"]["deploynorm::FilterResponseNormalization"] == 21
    assert facts["inputs"] == {"x": "float (N, 1, H, W)"}


def test_quiet_prints_nothing_and_verbose_more(mabn_pt: Path, deploynorm: Callable, require: Callable) -> None:
    require("ort")
    quiet, plain, verbose = (deploynorm("export", mabn_pt, *option) for option in (["-q"], [], ["-v"]))
    assert quiet.out == quiet.err == ""
    assert "into stem.0" not in plain.out
    assert "into stem.0" in verbose.out


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
    for verb in ("fold", "export", "rewrite", "check", "run", "inspect"):
        assert f"\n    {verb} " in done.stdout


@pytest.mark.parametrize("verb", ["fold", "export", "rewrite", "check", "run", "inspect"])
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "exit codes: 0 done" in capsys.readouterr().out
