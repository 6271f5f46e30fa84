"""Files that earlier versions wrote (tests/versions/write.py) are read, run and checked by this one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import FLOAT64, OP_BFLOAT16, OP_FLOAT16, OP_FLOAT32

import deploynorm
from deploynorm._check.parity import check_file
from deploynorm._inspect import inspect
from deploynorm.contract import METADATA_CPU
from deploynorm.errors import BackendError
from deploynorm.files import sha256
from deploynorm.image import ImageSpec
from deploynorm.inference import run_on_files
from deploynorm.onnx_file import OnnxFile
from deploynorm.ort import import_onnxruntime, machine

VERSIONS = sorted(path.name for path in (Path(__file__).parent / "versions").iterdir() if path.is_dir())
ONNX_FILES = {
    "net.onnx": OP_FLOAT32,
    "weights_beside.onnx": OP_FLOAT32,
    "half.onnx": OP_FLOAT16,
    "bfloat16.onnx": OP_BFLOAT16,
}
READ_BY = {"factory": "version_nets:net"}


@pytest.fixture(params=VERSIONS)
def written(request: pytest.FixtureRequest) -> Path:
    """The folder of the files of a version."""
    return Path(__file__).parent / "versions" / str(request.param)


@pytest.fixture
def expected(written: Path, tmp_path: Path) -> tuple[str, np.ndarray]:
    """A file with an input, and the output for it, in float64."""
    values = np.load(written / "expected.npz")
    np.save(tmp_path / "x.npy", values["x"])
    return str(tmp_path / "x.npy"), values["y"]


def test_there_are_files_of_a_version() -> None:
    assert "0.1.0" in VERSIONS


def test_the_checkpoint_is_read_whole(written: Path, expected: tuple[str, np.ndarray]) -> None:
    got = deploynorm.load(written / "net.pt", **READ_BY)
    x, y = expected
    with torch.no_grad():
        computed = got.model.double()(torch.from_numpy(np.load(x)).double()).numpy()
    np.testing.assert_allclose(computed, y, **FLOAT64.kwargs())
    assert (got.image, got.labels) == (
        ImageSpec((3, 8, 8), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)),
        ("cat", "dog", "eel"),
    )
    assert got.training == {"accuracy": 0.5, "epochs": 3, "command": "none"}


def test_its_training_goes_on(written: Path) -> None:
    model = deploynorm.load(written / "net.pt", **READ_BY).model.train()
    steps = int(model[3].num_batches_tracked)
    loss = model(torch.randn(4, 3, 6, 6)).square().sum()
    loss.backward()
    assert int(model[3].num_batches_tracked) == steps + 1 > 3


@pytest.mark.parametrize("name", ONNX_FILES)
def test_each_onnx_file_runs_and_is_checked(
    written: Path, expected: tuple[str, np.ndarray], name: str, require: Callable[[str], None]
) -> None:
    require("ort")
    x, y = expected
    assert check_file(written / "net.pt", written / name, **READ_BY)
    (result,) = run_on_files(written / name, [x]).results
    np.testing.assert_allclose(result.outputs["output"].astype(np.float64), y, **ONNX_FILES[name].kwargs())
    assert set(result.classes["output"][0][0]) == {"label", "probability"}
    facts = inspect(written / name)
    assert facts.facts["functions"] == ["deploynorm::FilterResponseNormalization"]
    assert facts.counts["deploynorm::FilterResponseNormalization"] == 2


@pytest.mark.parametrize("name", ONNX_FILES)
def test_each_manifest_says_what_the_file_was_made_from(written: Path, name: str) -> None:
    record = json.loads((written / name.replace(".onnx", ".deploynorm.json")).read_text())
    assert record["deploynorm"] == written.name
    assert record["source"]["sha256"] == sha256(written / "net.pt")
    assert (record["onnx"]["sha256"], record["ok"]) == (sha256(written / name), True)


def test_the_rewritten_file_runs_on_such_a_machine_and_is_refused_elsewhere(
    written: Path, expected: tuple[str, np.ndarray], require: Callable[[str], None]
) -> None:
    require("ort")
    require("native")
    x, y = expected
    note = json.loads(OnnxFile.read(written / "net.cpu.onnx").metadata[METADATA_CPU])
    assert note["source_sha256"] == sha256(written / "net.onnx")
    here = machine.describe(import_onnxruntime())
    if any(note[key] != here[key] for key in ("onnxruntime", "machine", "block")):
        with pytest.raises(BackendError, match="was rewritten for another machine or another onnxruntime"):
            run_on_files(written / "net.cpu.onnx", [x])
        return
    (result,) = run_on_files(written / "net.cpu.onnx", [x]).results
    np.testing.assert_allclose(result.outputs["output"], y, **OP_FLOAT32.kwargs())
