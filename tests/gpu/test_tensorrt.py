"""Engines on a GPU that TensorRT or TensorRT-RTX builds for: the numbers, the streams, the graphs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import CHANNELS, OPSET, frn_model, frn_parameters
from tolerances import EXACT, OP_BFLOAT16, OP_FLOAT16, OP_FLOAT32

from deploynorm._build import build
from deploynorm.errors import BackendError, DeployNormError
from deploynorm.lowering import function_proto
from deploynorm.reference import filter_response_norm
from deploynorm.run import available
from deploynorm.run.tensorrt import TensorRTRunner
from deploynorm.run.timing import milliseconds
from deploynorm.trt.engine import Engine
from deploynorm.trt.gpu import Gpu

TOLERANCE = {"float32": OP_FLOAT32, "float16": OP_FLOAT16, "bfloat16": OP_BFLOAT16}
SHAPES = [(1, CHANNELS, 1, 1), (2, CHANNELS, 7, 7), (3, CHANNELS, 33, 65), (8, CHANNELS, 64, 64)]


@pytest.fixture(scope="module")
def engine(require: Callable[[str], None], request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """engine("float16", "plugin") is one FRN layer of free shape, built once; the plugin is "embedded" in it or not."""
    require("gpu")
    if (reason := available()["tensorrt"]) is not None:
        pytest.skip(reason)
    built: dict[tuple[str, str], Engine] = {}

    def get(dtype: str, way: Any) -> Engine:
        if (dtype, way) not in built:
            model = frn_model(dtype, body=function_proto(OPSET, half=dtype != "float32"))
            built[dtype, way] = build(
                model,
                frn="native" if way == "native" else "plugin",
                plugins=None if way == "native" else [request.getfixturevalue("plugin")],
                embed_plugin=way == "embedded",
                min_shapes={"X": SHAPES[0]},
                opt_shapes={"X": SHAPES[2]},
                max_shapes={"X": SHAPES[3]},
            )
        return built[dtype, way]

    return get


def sample(dtype: str, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(shape, generator=generator)).to(getattr(torch, dtype)).cuda()


def want(x: torch.Tensor) -> np.ndarray[Any, Any]:
    return filter_response_norm(x.double().cpu().numpy(), *frn_parameters("float64").values())


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("way", ["plugin", "native"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_an_engine_computes_the_definition(
    dtype: str, way: str, cuda_graphs: bool, engine: Callable[..., Engine]
) -> None:
    with TensorRTRunner(engine(dtype, way), cuda_graphs=cuda_graphs) as runner:
        for shape in (*SHAPES, *SHAPES[::-1]):
            for scale in (1.0, 1e3):  # whose square float16 does not have
                x = sample(dtype, shape, scale)
                got = runner.run({"X": x})["Y"]
                assert got.dtype == x.dtype
                np.testing.assert_allclose(got.double().cpu().numpy(), want(x), **TOLERANCE[dtype].kwargs())


def test_arrays_give_what_tensors_give(engine: Callable[..., Engine]) -> None:
    x = sample("float32", SHAPES[1])
    with TensorRTRunner(engine("float32", "plugin")) as runner:
        array = runner.infer({"X": x.cpu().numpy()})["Y"]
        np.testing.assert_allclose(array, runner.run({"X": x})["Y"].cpu().numpy(), **EXACT.kwargs())


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
def test_work_is_done_in_the_order_of_the_callers_stream(cuda_graphs: bool, engine: Callable[..., Engine]) -> None:
    """The input is written late on the stream, and read and overwritten right after the call."""
    x = sample("float32", SHAPES[3])
    with TensorRTRunner(engine("float32", "native"), cuda_graphs=cuda_graphs) as runner:
        runner.run({"X": x})
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                late = torch.zeros_like(x)
                torch.cuda._sleep(50_000_000)
                late.copy_(x)
                got = runner.run({"X": late})["Y"].clone()
                late.fill_(float("nan"))
            stream.synchronize()
            np.testing.assert_allclose(got.double().cpu().numpy(), want(x), **OP_FLOAT32.kwargs())


LOADS = """
import sys, torch
from deploynorm.errors import InputError
from deploynorm.run.tensorrt import TensorRTRunner
engine, x, y = sys.argv[1:]
try:
    TensorRTRunner(engine, plugins=[])
except InputError as error:
    assert "holds code for the processor" in str(error), error
else:
    raise AssertionError("an engine with a library in it was loaded unasked")
with TensorRTRunner(engine, plugins=[], trust_engine=True) as runner:
    torch.save(runner.run({"X": torch.load(x).cuda()})["Y"].cpu(), y)
"""


def test_a_plugin_in_the_engine_runs_where_no_library_is_installed(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    """In a process of its own, since a registry keeps what it was given."""
    x, paths = sample("float32", SHAPES[2]), [tmp_path / name for name in ("frn.engine", "x.pt", "y.pt")]
    engine("float32", "embedded").save(paths[0])
    torch.save(x.cpu(), paths[1])
    done = subprocess.run([sys.executable, "-c", LOADS, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(torch.load(paths[2]).double().numpy(), want(x), **OP_FLOAT32.kwargs())


def test_both_ways_are_timed(engine: Callable[..., Engine]) -> None:
    times = milliseconds({way: engine("float16", way) for way in ("plugin", "native")})
    assert all(0 < time < 100 for time in times.values())


def test_an_engine_that_is_cut_short_is_refused(engine: Callable[..., Engine], tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(engine("float32", "native").plan[:1000])
    with pytest.raises(DeployNormError, match=r"model\.engine: .*engine"):
        TensorRTRunner(path)


def test_a_device_that_is_not_there_is_reported(require: Callable[[str], None]) -> None:
    require("gpu")
    with pytest.raises(BackendError, match="no such CUDA device"):
        Gpu(torch.cuda.device_count())
