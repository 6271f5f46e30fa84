"""Which form of a normalization that cannot be folded is fastest in ONNX Runtime.

    python benchmarks/affine.py --out benchmarks/results/affine.json

A pre-activation network, x + conv(relu(affine(x))) eight times over, with the affine as BatchNormalization, as Mul
and Add, and as a depthwise 1x1 convolution; and the network without it, as the lower bound. Rounds are interleaved; the
table gives medians as ratios to BatchNormalization.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import machine
import numpy as np
import onnx
import onnx.helper as h
import onnxruntime

BLOCKS = 8
FORMS = ("BatchNormalization", "Mul + Add", "depthwise 1x1", "none")
SHAPES = ((1, 64, 56, 56), (8, 64, 56, 56), (1, 256, 14, 14), (8, 256, 14, 14))


def network(form: str, channels: int) -> bytes:
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {}
    x = "x"
    for block in range(BLOCKS):
        scale, shift = rng.uniform(0.5, 1.5, channels), rng.normal(size=channels)
        y = f"affine{block}"
        if form == "BatchNormalization":
            constants |= {f"s{block}": scale, f"b{block}": shift, f"m{block}": 0 * scale, f"v{block}": 0 * scale + 1}
            nodes.append(h.make_node(form, [x, *(f"{name}{block}" for name in "sbmv")], [y], epsilon=0.0))
        elif form == "Mul + Add":
            constants |= {f"s{block}": scale.reshape(1, -1, 1, 1), f"b{block}": shift.reshape(1, -1, 1, 1)}
            nodes.append(h.make_node("Mul", [x, f"s{block}"], [f"mul{block}"]))
            nodes.append(h.make_node("Add", [f"mul{block}", f"b{block}"], [y]))
        elif form == "depthwise 1x1":
            constants |= {f"s{block}": scale.reshape(-1, 1, 1, 1), f"b{block}": shift}
            nodes.append(h.make_node("Conv", [x, f"s{block}", f"b{block}"], [y], group=channels, kernel_shape=[1, 1]))
        else:
            y = x
        constants[f"w{block}"] = rng.normal(size=(channels, channels, 3, 3)) / np.sqrt(9 * channels)
        nodes.append(h.make_node("Relu", [y], [f"relu{block}"]))
        nodes.append(
            h.make_node("Conv", [f"relu{block}", f"w{block}"], [f"conv{block}"], kernel_shape=[3, 3], pads=[1] * 4)
        )
        nodes.append(h.make_node("Add", [x, f"conv{block}"], [f"sum{block}"]))
        x = f"sum{block}"
    shape = ["N", channels, "H", "W"]
    graph = h.make_graph(
        nodes,
        "affine",
        [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [h.make_tensor_value_info(x, onnx.TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def measure(shape: tuple[int, ...], threads: int, rounds: int) -> dict[str, float]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads of one session must not take the cores from the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = {
        form: onnxruntime.InferenceSession(network(form, shape[1]), options, providers=["CPUExecutionProvider"])
        for form in FORMS
    }
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    milliseconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(rounds + 2):
        for form, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"x": x})
            if turn >= 2:
                milliseconds[form].append(1e3 * (time.perf_counter() - start))
    return {form: statistics.median(times) for form, times in milliseconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    about = machine.describe("onnxruntime", "onnx")
    results = []
    print(f"{'shape':>18} threads  ms  " + "".join(f"{form:>20}" for form in FORMS))
    for threads in options.threads:
        for shape in SHAPES:
            times = measure(shape, threads, options.rounds)
            base = times[FORMS[0]]
            results.append({"shape": shape, "threads": threads, "milliseconds": times})
            ratios = "".join(f"{times[form] / base:20.2f}" for form in FORMS)
            print(f"{'x'.join(map(str, shape)):>18} {threads:7} {base:5.1f}{ratios}")
    options.out.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
