"""`deploynorm build`: what it writes and prints, and that nothing is left of what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from machines import install_builder
from rtx_builds import Outcome, call, conv_frn_conv, plugin_library

from deploynorm.contract import METADATA_IMAGE
from deploynorm.files import sha256
from deploynorm.image import ImageSpec


@pytest.fixture
def rtx(require: Callable[[str], None]) -> Callable[..., Outcome]:
    """rtx(*arguments, code=0): `deploynorm build` with TensorRT-RTX."""
    require("trt-rtx")

    def build(*arguments: object, code: int = 0) -> Outcome:
        outcome = call("build", *arguments, "--backend", "tensorrt-rtx")
        assert outcome.code == code, outcome.err
        return outcome

    return build


@pytest.fixture
def exported() -> Path:
    """A small network that names the size of its images."""
    model = conv_frn_conv("float32", ("N", 16, "H", "W"))
    image = ImageSpec((16, 12, 12), (0.5,) * 16, (0.25,) * 16)
    onnx.helper.set_model_props(model, {METADATA_IMAGE: json.dumps(image.to_dict())})
    onnx.save(model, "net.onnx")
    return Path("net.onnx")


def test_an_engine_and_its_manifest_are_written_without_a_gpu(
    exported: Path, rtx: Callable[..., Outcome], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    library = plugin_library(request)
    present = {path.name for path in tmp_path.iterdir()}
    result = rtx(
        exported, "--compute-capability", "8.9", "--compute-capability", "12.0", "--frn", "plugin",
        "--plugins", library,
        "--min-shapes", "x:1x16x12x12", "--max-shapes", "x:[8,16,24,24]",
        "--min-shapes", "x:9x16x12x12", "--max-shapes", "x:[32,16,12,12]", "--json", "record.json", "-v",
    )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} - present == {"net.engine", "net.engine.json", "record.json"}
    manifest = json.loads(Path("net.engine.json").read_text())
    assert manifest == json.loads(Path("record.json").read_text())
    engine = manifest["engine"]
    assert (engine["file"], engine["sha256"]) == ("net.engine", sha256(Path("net.engine")))
    assert (engine["backend"], engine["compute_capabilities"]) == ("tensorrt-rtx", ["8.9", "12.0"])
    assert (engine["precision"], engine["frn"]["way"], engine["frn"]["plugin_layers"]) == ("float32", "plugin", 1)
    assert engine["inputs"][0]["shape"] == ["N", 16, "H", "W"]
    shapes = [(profile["x"]["min"], profile["x"]["max"]) for profile in engine["profiles"]]
    assert shapes == [([1, 16, 12, 12], [8, 16, 24, 24]), ([9, 16, 12, 12], [32, 16, 12, 12])]
    assert manifest["onnx"] == {"file": "net.onnx", "sha256": sha256(exported), "external_data": None}
    assert manifest["plugin_libraries"] == [{"file": library.name, "sha256": sha256(library)}]
    assert manifest["versions"]["tensorrt-rtx"] == engine["version"]
    for text in (
        "compute capability 8.9, 12.0",
        "float32 (2 of 2 products checked)",
        "1 layers, plugin",
        "1x16x12x12",
        "custom_layer",
        "Each layer",
        "wrote net.engine and net.engine.json",
    ):
        assert text in result.out


@pytest.mark.usefixtures("rtx")
def test_without_shapes_the_image_that_the_file_names_is_taken(
    exported: Path, deploynorm: Callable, refused: Callable
) -> None:
    # In a process of its own, to its very end, which TensorRT has aborted.
    words = ["build", exported, "--compute-capability", "8.6", "--frn", "native", "-o", "image.engine", "-q"]
    command = [sys.executable, "-m", "deploynorm", *map(str, words), "--backend", "tensorrt-rtx"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    x = json.loads(Path("image.engine.json").read_text())["engine"]["profiles"][0]["x"]
    assert x["min"] == x["opt"] == x["max"] == [1, 16, 12, 12]
    inspected = deploynorm("inspect", "image.engine").out
    for text in ("tensorrt-rtx", "8.6", "x: float32 (N, 16, H, W)", "Layers"):
        assert text in inspected
    Path("image.engine.json").unlink()
    refused(2, "has no manifest image.engine.json beside it", "inspect", "image.engine")


def _half(dtype: str = "float16", shape: tuple[int | str, ...] = (2, 16, 8, 8)) -> str:
    onnx.save(conv_frn_conv(dtype, shape), "half.onnx")
    return "half.onnx"


RTX_REFUSES: dict[str, tuple[Callable[[], str], list[str], int, str]] = {
    "no GPU and none named": (_half, [], 3, "Fix: name it with --compute-capability: 12.0 for an RTX 50"),
    "a GPU that is not served": (_half, ["--compute-capability", "9.0"], 2, "does not build for this. Got '9.0'"),
    "a type that the GPU lacks": (
        lambda: _half("bfloat16"),
        ["--compute-capability", "7.5"],
        2,
        "holds bfloat16, which GPUs",
    ),
    "no range": (
        lambda: _half(shape=("N", 16, "H", "W")),
        ["--compute-capability", "8.9"],
        2,
        "input x: some of its axes are dynamic",
    ),
    "a cache": (_half, ["--compute-capability", "8.9", "--timing-cache", "c"], 2, "--timing-cache: TensorRT-RTX"),
}


@pytest.mark.parametrize(("make", "options", "code", "message"), RTX_REFUSES.values(), ids=RTX_REFUSES)
def test_tensorrt_rtx_refuses_and_nothing_is_written(
    make: Callable[[], str], options: list[str], code: int, message: str, rtx: Callable[..., Outcome], refused: Callable
) -> None:
    refused(code, message, make(), "--frn", "native", *options, call=rtx)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorRT 11 of Python, with a GPU that is not there."""
    return install_builder(monkeypatch)


def test_a_timing_cache_is_begun_and_then_read(full: Any, deploynorm: Callable) -> None:
    for want in (b"and new", b"and newand new"):
        deploynorm("build", _half(), "--frn", "native", "--timing-cache", "cache", "--workspace", "3", "-q")
        assert Path("cache").read_bytes() == want
    assert full.seen["config"].pools == {"WORKSPACE": 3 * 2**20}


@pytest.mark.usefixtures("full")
def test_a_failed_build_leaves_the_earlier_engine(deploynorm: Callable, refused: Callable) -> None:
    deploynorm("build", _half(), "--frn", "native", "-q")
    refused(2, "--optimization-level", "build", "half.onnx", "--frn", "native", "--optimization-level", "9")


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
def test_options_that_cannot_be_are_refused(options: list[str], message: str, refused: Callable) -> None:
    refused(2, message, "build", _half(), *options)


def test_without_tensorrt_the_environment_is_at_fault(refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    refused(3, "pip install tensorrt", "build", _half())
