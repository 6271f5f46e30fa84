"""NVIDIA's polygraphy shows our files, runs them, and builds engines of them with the plugin inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from rtx_builds import conv_frn_conv, plugin_library

from deploynorm import libraries
from deploynorm.contract import NODE_ATTRIBUTES, OP_TYPE


@pytest.fixture
def polygraphy(require: Callable[[str], None]) -> Callable[..., str]:
    """polygraphy("inspect", ...) runs it and returns what it printed."""
    require("polygraphy")
    require("trt-rtx")
    program = shutil.which("polygraphy") or shutil.which("polygraphy", path=str(Path(sys.executable).parent))
    assert program is not None

    def call(*arguments: object) -> str:
        done = subprocess.run(
            [program, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two convolutions around an FRN with dynamic N, H and W, with its body and the attributes of the plugin."""
    proto = conv_frn_conv("float32", ("N", 16, "H", "W"))
    proto.graph.node[1].attribute.extend(onnx.helper.make_attribute(*item) for item in NODE_ATTRIBUTES.items())
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_it_shows_our_operator(polygraphy: Callable[..., str], model: Path) -> None:
    assert OP_TYPE in polygraphy("inspect", "model", model, "--show", "layers")


def test_it_runs_our_file_in_stock_onnx_runtime(
    polygraphy: Callable[..., str], model: Path, require: Callable[[str], None]
) -> None:
    require("ort")
    printed = polygraphy("run", model, "--onnxrt", "--input-shapes", "x:[2,16,9,7]")
    assert "onnxrt-runner" in printed
    assert "PASSED" in printed


LEAST_BYTES = 18 * 16 * 16 * 4
"""The weights of the two convolutions, which are part of an engine."""

SHAPES = "--trt-min-shapes x:[1,16,8,8] --trt-opt-shapes x:[2,16,16,16] --trt-max-shapes x:[4,16,32,32]"
CONVERT = ("--convert-to", "trt", "--compute-capabilities", "8.9", *SHAPES.split())


def test_it_builds_an_engine_from_the_body(polygraphy: Callable[..., str], model: Path, tmp_path: Path) -> None:
    engine = tmp_path / "native.engine"
    polygraphy("convert", model, *CONVERT, "-o", engine)
    assert engine.stat().st_size > LEAST_BYTES


def test_it_builds_an_engine_with_our_plugin(
    polygraphy: Callable[..., str],
    model: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """polygraphy only opens a plugin library, so it gets the one that registers the plugin on load."""
    register = plugin_library(request).with_name(libraries.TENSORRT_REGISTER_LIBRARY)
    bare = onnx.load(model)
    del bare.functions[:]  # nothing but the plugin can then compute it
    onnx.save(bare, model)
    # Without a file of this name TensorRT-RTX ends the process at the first plugin: see deploynorm.trt.soname.
    import tensorrt_rtx_libs

    (tmp_path / "libtensorrt_rtx.so").symlink_to(
        next(Path(tensorrt_rtx_libs.__file__).parent.glob("libtensorrt_rtx.so.*"))
    )
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path), prepend=os.pathsep)
    engine = tmp_path / "plugin.engine"
    polygraphy("convert", model, *CONVERT, "--plugins", register, "-o", engine)
    assert engine.stat().st_size > LEAST_BYTES
