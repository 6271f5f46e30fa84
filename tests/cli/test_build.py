"""`deploynorm build`: what it writes and prints, and that nothing is left of what it refuses."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from fake_tensorrt import fake_tensorrt, with_builder
from rtx_builds import Outcome, call, conv_frn_conv, plugin_library

from deploynorm import checkpoint
from deploynorm._export import export
from deploynorm.contract import METADATA_IMAGE
from deploynorm.files import sha256


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def rtx(require: Callable[[str], None]) -> Callable[..., Outcome]:
    """`deploynorm build` with TensorRT-RTX."""
    require("trt-rtx")
    return lambda *arguments: call("build", *arguments, "--backend", "tensorrt-rtx")


@pytest.fixture
def exported(frn_pt: Path) -> Path:
    """A small network that names the size of its images."""
    loaded = checkpoint.load(frn_pt)
    assert loaded.image is not None
    metadata = {METADATA_IMAGE: json.dumps(loaded.image.to_dict())}
    example = (torch.zeros(2, *loaded.image.shape),)
    export(loaded.model, example, dynamic="all", metadata=metadata).save("net.onnx")
    return Path("net.onnx")


def test_an_engine_and_its_manifest_are_written_without_a_gpu(
    exported: Path, rtx: Callable[..., Outcome], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    library = plugin_library(request)
    present = {path.name for path in tmp_path.iterdir()}
    result = rtx(
        exported, "--compute-capability", "8.9", "--compute-capability", "12.0", "--frn", "plugin",
        "--plugins", library,
        "--min-shapes", "x:1x1x12x12", "--max-shapes", "x:[8,1,24,24]", "--json", "record.json", "-v",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert {path.name for path in tmp_path.iterdir()} - present == {"net.engine", "net.engine.json", "record.json"}
    manifest = json.loads(Path("net.engine.json").read_text())
    assert manifest == json.loads(Path("record.json").read_text())
    engine = manifest["engine"]
    assert (engine["file"], engine["sha256"]) == ("net.engine", sha256(Path("net.engine")))
    assert (engine["backend"], engine["compute_capabilities"]) == ("tensorrt-rtx", ["8.9", "12.0"])
    assert (engine["precision"], engine["frn"]["way"], engine["frn"]["plugin_layers"]) == ("float32", "plugin", 21)
    x = engine["inputs"][0]
    assert (x["shape"], x["min"], x["max"]) == (["N", 1, "H", "W"], [1, 1, 12, 12], [8, 1, 24, 24])
    assert manifest["onnx"] == {"file": "net.onnx", "sha256": sha256(exported), "external_data": None}
    assert manifest["plugin_libraries"] == [{"file": library.name, "sha256": sha256(library)}]
    assert manifest["versions"]["tensorrt-rtx"] == engine["version"]
    for text in (
        "compute capability 8.9, 12.0",
        "float32 (22 of 22 products checked)",
        "21 layers, plugin",
        "1x1x12x12",
        "custom_layer",
        "Each layer",
        "wrote net.engine and net.engine.json",
    ):
        assert text in result.out


@pytest.mark.usefixtures("rtx")
def test_without_shapes_the_image_that_the_file_names_is_taken(exported: Path, deploynorm: Callable) -> None:
    # In a process of its own, to its very end, which TensorRT has aborted.
    words = ["build", exported, "--compute-capability", "8.6", "--frn", "native", "-o", "image.engine", "-q"]
    command = [sys.executable, "-m", "deploynorm", *map(str, words), "--backend", "tensorrt-rtx"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    x = json.loads(Path("image.engine.json").read_text())["engine"]["inputs"][0]
    assert x["min"] == x["opt"] == x["max"] == [1, 1, 12, 12]
    inspected = deploynorm("inspect", "image.engine")
    assert inspected.code == 0, inspected.err
    for text in ("tensorrt-rtx", "8.6", "x: float32 (N, 1, H, W)", "Layers"):
        assert text in inspected.out
    Path("image.engine.json").unlink()
    assert "has no manifest image.engine.json beside it" in deploynorm("inspect", "image.engine").err


def _half(dtype: str = "float16") -> str:
    onnx.save(conv_frn_conv(dtype, (2, 16, 8, 8)), "half.onnx")
    return "half.onnx"


def _bfloat16() -> str:
    return _half("bfloat16")


def _free() -> str:
    onnx.save(conv_frn_conv("float16", ("N", 16, "H", "W")), "free.onnx")
    return "free.onnx"


RTX_REFUSES: dict[str, tuple[Callable[[], str], list[str], int, str]] = {
    "no GPU and none named": (_half, [], 3, "Fix: name it: --compute-capability 8.9"),
    "a GPU that is not served": (_half, ["--compute-capability", "9.0"], 2, "does not build for this. Got 9.0"),
    "a type that the GPU lacks": (_bfloat16, ["--compute-capability", "7.5"], 2, "holds bfloat16, which GPUs"),
    "no range": (_free, ["--compute-capability", "8.9"], 2, "input x: some of its axes are dynamic"),
    "a cache": (_half, ["--compute-capability", "8.9", "--timing-cache", "c"], 2, "--timing-cache: TensorRT-RTX"),
}


@pytest.mark.parametrize("name", RTX_REFUSES)
def test_tensorrt_rtx_refuses_and_nothing_is_written(name: str, rtx: Callable[..., Outcome], tmp_path: Path) -> None:
    make, options, code, message = RTX_REFUSES[name]
    model = make()
    present = {path.name for path in tmp_path.iterdir()}
    result = rtx(model, "--frn", "native", *options)
    assert result.code == code, result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert {path.name for path in tmp_path.iterdir()} == present


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorRT 11 of Python, with a GPU that is not there."""
    module = with_builder(fake_tensorrt("11.4.0"))
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("deploynorm.trt.importing._LOGGERS", {})
    for name in ("deploynorm._build", "deploynorm.trt.builder"):
        monkeypatch.setattr(importlib.import_module(name), "gpu_here", lambda: "9.0")
    return module


def test_a_timing_cache_is_begun_and_then_read(full: Any, deploynorm: Callable) -> None:
    for want in (b"and new", b"and newand new"):
        result = deploynorm("build", _half(), "--frn", "native", "--timing-cache", "cache", "--workspace", "3", "-q")
        assert result.code == 0, result.err
        assert Path("cache").read_bytes() == want
    assert full.seen["config"].pools == {"WORKSPACE": 3 * 2**20}


@pytest.mark.usefixtures("full")
def test_a_failed_build_leaves_the_earlier_engine(deploynorm: Callable) -> None:
    assert deploynorm("build", _half(), "--frn", "native", "-q").code == 0
    before = Path("half.engine").read_bytes(), Path("half.engine.json").read_bytes()
    assert deploynorm("build", _half(), "--frn", "native", "--optimization-level", "9").code == 2
    assert (Path("half.engine").read_bytes(), Path("half.engine.json").read_bytes()) == before


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "half.onnx"], "is MODEL itself"),
        (["-o", "none/half.engine"], "cannot write there"),
        (["--opt-shapes", "x:2xx8"], "not a shape"),
        (["--compute-capability", "8.9"], "for the GPU of this machine only"),
        (["--timing-cache", "."], "cannot be read"),
        (["--frn", "fast"], "invalid choice"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: list[str], message: str, deploynorm: Callable) -> None:
    before = Path(_half()).read_bytes()
    result = deploynorm("build", "half.onnx", *options)
    assert result.code == 2
    assert message in result.err
    assert Path("half.onnx").read_bytes() == before


def test_without_tensorrt_the_environment_is_at_fault(deploynorm: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    result = deploynorm("build", _half())
    assert result.code == 3
    assert "pip install tensorrt" in result.err
