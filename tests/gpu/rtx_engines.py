"""Engines of TensorRT-RTX with FRN in them, built and run on the GPU that is here: a step of tests/gpu/prove.

    PYTHONPATH=. python tests/gpu/rtx_engines.py --libraries FOLDER --out engines.json

FOLDER has our plugin library. For each type, with the plugin and with the operator's body in its place: whether an
engine is built for the device that is here, and one for no device in particular, whether TensorRT-RTX calls it valid,
whether it runs, what it computes, and how long it takes as a CUDA graph. TensorRT-RTX is called as it is, since what
deploynorm checks beforehand might refuse what is to be tried. Each engine is a process of its own, which TensorRT may
end. With --build-for 8.9 they are only built, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from graphs import OPSET, frn_model
from tolerances import OP_FLOAT16, OP_FLOAT32

from deploynorm.lowering import function_proto
from deploynorm.reference import filter_response_norm
from deploynorm.trt import import_tensorrt
from deploynorm.trt.model import TensorRTModel
from deploynorm.trt.plugins import load_library

SHAPE = (32, 256, 56, 56)
TOLERANCES = {"float32": OP_FLOAT32, "float16": OP_FLOAT16}
WAYS = ("plugin", "native")


def parameters() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    lowest = {"gamma": 0.5, "beta": -0.5, "tau": -1.0, "eps": 1e-3}
    return {name: (rng.random(SHAPE[1]) + low).astype(np.float32) for name, low in lowest.items()}


def build(trt: Any, said: list[str], dtype: str, way: str, target: str) -> bytes:
    """A plan, for the compute capability `target`: "here" for this GPU's, "any" for none in particular."""
    logger = _logger(trt, said)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    onnx_parser = trt.OnnxParser(network, logger)
    body = function_proto(OPSET, half=dtype != "float32")
    model = TensorRTModel.read(frn_model(dtype, body=body, parameters=parameters(), shape=SHAPE))
    if not onnx_parser.parse(model.prepared(way).SerializeToString()):
        sys.exit(f"not parsed: {[onnx_parser.get_error(i).desc() for i in range(onnx_parser.num_errors)]}")
    config = builder.create_builder_config()
    if target != "any":
        name = "CURRENT" if target == "here" else f"SM{target.replace('.', '')}"
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit(f"not built: {said[-1:]}")
    return bytes(plan)


def run(trt: Any, said: list[str], plan: bytes, dtype: str) -> dict[str, object]:
    """Runs a plan once, compares it with float64, and times it as a CUDA graph."""
    runtime = trt.Runtime(_logger(trt, said))
    validity = runtime.get_engine_validity(plan) if hasattr(runtime, "get_engine_validity") else "not asked"
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine and engine.create_execution_context()
    if context is None:
        sys.exit(f"not loaded: validity {validity}, {said[-1:]}")
    torch.manual_seed(0)
    x = torch.randn(SHAPE, device="cuda").to(getattr(torch, dtype))
    y = torch.full_like(x, float("nan"))
    context.set_tensor_address("X", x.data_ptr())
    context.set_tensor_address("Y", y.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if not context.execute_async_v3(stream.cuda_stream):
        sys.exit(f"not run: {said[-1:]}")
    stream.synchronize()
    want = filter_response_norm(x.double().cpu().numpy(), *parameters().values())
    np.testing.assert_allclose(y.double().cpu().numpy(), want, **TOLERANCES[dtype].kwargs())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        context.execute_async_v3(stream.cuda_stream)
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    np.testing.assert_allclose(y.double().cpu().numpy(), want, **TOLERANCES[dtype].kwargs())
    times = []
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(21):
        begin.record()
        for _ in range(20):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / 20)
    error = np.abs(y.double().cpu().numpy() - want).max() / np.abs(want).max()
    return {"validity": str(validity), "relative_error": float(error), "microseconds": round(sorted(times)[10], 2)}


def _logger(trt: Any, said: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR", "WARNING"):
                said.append(text)

    if not hasattr(trt, "deploynorm_logger"):
        trt.deploynorm_logger = Logger()  # TensorRT keeps the first that it is given
    return trt.deploynorm_logger


def one(options: argparse.Namespace) -> None:
    """Builds and runs one engine, and prints what came of it."""
    dtype, way, target = options.one
    found = import_tensorrt("tensorrt-rtx")
    said: list[str] = []
    if way == "plugin":
        load_library(found, options.libraries / "libdeploynorm_trt.so")
    plan = build(found.module, said, dtype, way, target)
    row = {"version": found.version, "bytes": len(plan)}
    if not options.build_for:
        row |= run(found.module, said, plan, dtype)
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--libraries", type=Path, help="with our plugin; without them native engines alone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--build-for", metavar="CAPABILITY", help="build only, for this one")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options)
        return
    if not options.build_for and not torch.cuda.is_available():
        sys.exit("rtx_engines.py: torch finds no CUDA device")
    rows: list[dict[str, object]] = []
    targets = [options.build_for] if options.build_for else ["here", "any"]
    ways = WAYS if options.libraries else WAYS[1:]
    for target, dtype, way in ((t, d, w) for t in targets for d in TOLERANCES for w in ways):
        words = [sys.executable, *sys.argv, "--one", dtype, way, target]
        done = subprocess.run(words, capture_output=True, text=True)
        said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        came = json.loads(said[0]) if done.returncode == 0 else {"failed": f"exit code {done.returncode}: {said}"}
        rows.append({"dtype": dtype, "way": way, "target": target, **came})
        print(rows[-1], flush=True)
        options.out.write_text(json.dumps(rows, indent=1))
    ran = [row for row in rows if "failed" not in row]
    plugins = sum(row["way"] == "plugin" for row in ran)
    verb = "were built" if options.build_for else "ran, right"
    print(f"{len(ran)} of {len(rows)} engines {verb}, {plugins} of them with our plugin")
    sys.exit(not ran or (bool(options.libraries) and not plugins))


if __name__ == "__main__":
    main()
