"""FRN on ONNX Runtime's CPU provider: our operator library compared with the alternatives.

    python benchmarks/ort_cpu.py --out benchmarks/results/ort_cpu.json

Two tables and one picture. The operator: our kernel, and stock ONNX Runtime on the exported file (the function body),
on RMSNormalization (opset 23) and on Pow and Div as in the paper. They are compared with a Relu, which is what remains
of folded BatchNorm and ReLU; with an Identity, a memcpy on one thread plus the cost of a call of a session; and with
memcpy of as many bytes on as many threads, which do not wait for each other. The networks: FRN as exported, stock and
with the library (with and without the residual form), and as `deploynorm.ort.session` opens it; MABN folded; all
compared with folded BatchNorm and ReLU.

All variants of a row take turns in every round, in another order each time; figures are medians of the rounds. Buffers
are aligned as ONNX Runtime aligns its own. Sessions do not spin between runs, so that no session uses another's core.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import machine
import numpy as np
import onnx
import onnx.helper as h
import onnx_ir as ir
from networks import NETWORKS, export_network

from deploynorm import ort
from deploynorm.contract import DOMAIN, INPUTS, OP_TYPE, OUTPUT, PARAMETERS, VERSION
from deploynorm.lowering import function_proto, lower

SHAPES = (
    (1, 64, 112, 112),
    (8, 64, 56, 56),
    (1, 256, 56, 56),
    (1, 128, 28, 28),
    (32, 256, 14, 14),
    (1, 1024, 14, 14),
    (1, 512, 7, 7),
    (8, 2048, 7, 7),
)
BATCHES = {"ResNet-20": (1, 32), "ResNet-50": (1, 8), "MobileNetV2": (1,)}
STOCK_OPERATORS = ("stock body", "stock RMSNormalization", "stock Pow, Div")

Way = Callable[[], object]


def measure(ways: Mapping[str, Way], rounds: int, seconds: float) -> dict[str, float]:
    """The median time of a call of each variant, in microseconds; a round takes about `seconds`."""
    calls = {}
    for name, way in ways.items():
        way()
        start = time.perf_counter()
        way()
        calls[name] = max(1, int(seconds / len(ways) / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            way, count = ways[name], calls[name]
            start = time.perf_counter()
            for _ in range(count):
                way()
            times[name].append(1e6 * (time.perf_counter() - start) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def aligned(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A float32 array at the start of a page."""
    size = int(np.prod(shape))
    memory = np.empty(size + 1024, np.float32)
    start = -memory.ctypes.data % 4096 // 4
    return memory[start : start + size].reshape(shape)


def open_session(model: bytes | Path, threads: int, library: bool, optimize: bool = False) -> Any:
    options = ort.quiet_options()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.session(model, options=options, plugins=None if library else [], optimize=optimize)


def run_bound(session: Any, x: np.ndarray[Any, Any], out: np.ndarray[Any, Any] | None = None) -> Way:
    """A call of the session, which has one input and one output, on preallocated memory."""
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, x)
    name = session.get_outputs()[0].name
    if out is None:
        binding.bind_output(name, "cpu")
    else:
        binding.bind_output(name, "cpu", 0, np.float32, out.shape, out.ctypes.data)
    return lambda: session.run_with_iobinding(binding)


def memcpy_time(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], threads: int, count: int) -> float:
    """Microseconds of one copy; each thread copies its part `count` times and does not wait for the others."""
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    part = x.nbytes // threads

    def work(index: int) -> None:
        to, source = y.ctypes.data + index * part, x.ctypes.data + index * part
        for _ in range(count):
            memcpy(to, source, part)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(1, threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    work(0)
    for worker in workers:
        worker.join()
    return 1e6 * (time.perf_counter() - start) / count


def operator_models(channels: int) -> dict[str, tuple[bytes, bool]]:
    """The variants of FRN + TLU over (N, channels, H, W): the model, and whether our library runs it."""
    rng = np.random.default_rng(0)
    uniform = rng.uniform(0.5, 1.5, channels)
    values = {"gamma": uniform, "beta": rng.normal(size=channels), "tau": 0 * uniform, "eps": 0 * uniform + 1e-6}
    parameters = {name: values[name].astype(np.float32) for name in PARAMETERS}
    custom = _model([h.make_node(OP_TYPE, INPUTS, [OUTPUT], domain=DOMAIN)], channels, parameters, 23)
    with_body = onnx.ModelProto.FromString(custom.SerializeToString())
    with_body.functions.append(function_proto(23))
    lowered = ir.serde.deserialize_model(custom)
    lower(lowered, "rmsnorm")
    column = (1, channels, 1, 1)
    textbook = [
        h.make_node("Pow", ["X", "two"], ["square"]),
        h.make_node("ReduceMean", ["square", "axes"], ["mean"]),
        h.make_node("Add", ["mean", "eps"], ["positive"]),
        h.make_node("Sqrt", ["positive"], ["root"]),
        h.make_node("Div", ["X", "root"], ["unit"]),
        h.make_node("Mul", ["unit", "gamma"], ["scaled"]),
        h.make_node("Add", ["scaled", "beta"], ["shifted"]),
        h.make_node("Max", ["shifted", "tau"], ["Y"]),
    ]
    constants: dict[str, Any] = {name: value.reshape(column) for name, value in parameters.items()}
    constants |= {"two": np.float32(2), "axes": np.array([2, 3])}
    return {
        "deploynorm": (custom.SerializeToString(), True),
        "stock body": (with_body.SerializeToString(), False),
        "stock RMSNormalization": (ir.serde.serialize_model(lowered).SerializeToString(), False),
        "stock Pow, Div": (_model(textbook, channels, constants, 23).SerializeToString(), False),
        "Relu": (_model([h.make_node("Relu", ["X"], ["Y"])], channels, {}, 23).SerializeToString(), False),
        "Identity": (_model([h.make_node("Identity", ["X"], ["Y"])], channels, {}, 23).SerializeToString(), False),
    }


def _model(nodes: list[onnx.NodeProto], channels: int, constants: Mapping[str, Any], opset: int) -> onnx.ModelProto:
    value = [h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", channels, "H", "W"]) for name in "XY"]
    tensors = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = h.make_graph(nodes, "operator", value[:1], value[1:], tensors)
    imports = [h.make_opsetid("", opset), h.make_opsetid(DOMAIN, VERSION)]
    return h.make_model(graph, opset_imports=imports, ir_version=10)


def measure_operator(shape: tuple[int, ...], threads: int, rounds: int) -> dict[str, float]:
    x, y = aligned(shape), aligned(shape)
    x[...] = np.random.default_rng(1).normal(size=shape)
    ways: dict[str, Way] = {}
    for name, (model, library) in operator_models(shape[1]).items():
        ways[name] = run_bound(open_session(model, threads, library), x, y)
    times = measure(ways, rounds, seconds=0.05)
    # Timed separately: memcpy has no session, and its threads do not wait for each other.
    count = max(3, int(0.01 / (1e-6 * times["Relu"])))
    copies = [memcpy_time(x, y, threads, count) for _ in range(rounds)]
    return times | {"memcpy": statistics.median(copies)}


def measure_network(network: str, batch: int, threads: int, rounds: int, folder: Path) -> dict[str, float]:
    builds, size = NETWORKS[network]
    files = {norm: folder / f"{network}-{norm}.onnx" for norm in builds}
    files |= {way: folder / f"{network}-{way}.onnx" for way in ("rmsnorm", "apart")}
    if not files["apart"].exists():
        for norm in builds:
            export_network(network, norm, files[norm])
        export_network(network, "frn", files["rmsnorm"], lowering="rmsnorm")
        export_network(network, "frn", files["apart"], residual=False)
    sessions = {
        "BN folded": open_session(files["bn"], threads, library=False),
        "FRN, stock": open_session(files["frn"], threads, library=False),
        "FRN, stock RMSNormalization": open_session(files["rmsnorm"], threads, library=False),
        "FRN, deploynorm": open_session(files["frn"], threads, library=True),
        "FRN, deploynorm, no residual": open_session(files["apart"], threads, library=True),
        "FRN, session": open_session(files["frn"], threads, library=True, optimize=True),
    }
    if "mabn" in files:
        sessions["MABN folded"] = open_session(files["mabn"], threads, library=False)
    x = aligned((batch, 3, size, size))
    x[...] = np.random.default_rng(1).normal(size=x.shape)
    return measure({name: run_bound(session, x) for name, session in sessions.items()}, rounds, seconds=0.5)


def tell_operator(shape: tuple[int, ...], threads: int, times: Mapping[str, float]) -> str:
    best = min(times[name] for name in STOCK_OPERATORS)
    return (
        f"{'x'.join(map(str, shape)):>14} {threads:7} {times['deploynorm']:9.1f} "
        f"{100 * times['memcpy'] / times['deploynorm']:8.0f} % {100 * times['Identity'] / times['deploynorm']:9.0f} % "
        f"{times['deploynorm'] / times['Relu']:8.2f} "
        f"{best / times['deploynorm']:11.2f} {times['stock body'] / times['deploynorm']:9.2f} "
        f"{times['stock Pow, Div'] / times['deploynorm']:9.2f}"
    )


def tell_network(network: str, batch: int, threads: int, times: Mapping[str, float]) -> str:
    base = times["BN folded"]
    columns = ("FRN, stock", "FRN, stock RMSNormalization", "FRN, deploynorm", "FRN, deploynorm, no residual")
    columns += ("FRN, session", "MABN folded")
    ratios = "".join(f"{times[name] / base:12.3f}" if name in times else f"{'-':>12}" for name in columns)
    return f"{network:>12} {batch:5} {threads:7} {base / 1e3:9.2f}{ratios}"


def draw(path: Path, operators: list[dict[str, Any]], networks: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    rows = [row for row in operators if row["threads"] == 1]
    labels = ["x".join(map(str, row["shape"])) for row in rows]
    at = np.arange(len(rows))
    for offset, (name, colour) in enumerate({"deploynorm": "C0", "Relu": "C7", "stock body": "C1"}.items()):
        share = [100 * row["microseconds"]["memcpy"] / row["microseconds"][name] for row in rows]
        left.bar(at + 0.27 * (offset - 1), share, 0.25, label=name, color=colour)
    left.axhline(100, color="black", linewidth=0.8)
    left.set_xticks(at, labels, rotation=30, ha="right")
    left.set_ylabel("speed, % of memcpy of the same bytes")
    left.set_title("FRN + TLU, one operator, 1 thread")
    left.set_ylim(0, 120)
    left.legend(ncols=3, loc="upper center")
    ways = {"FRN, stock": "C1", "FRN, deploynorm": "C0", "FRN, session": "C2", "MABN folded": "C4"}
    labels = [f"{row['network']}\nbatch {row['batch']}, {row['threads']} thr." for row in networks]
    at = np.arange(len(networks))
    for offset, (name, colour) in enumerate(ways.items()):
        ratio = [row["microseconds"].get(name, np.nan) / row["microseconds"]["BN folded"] for row in networks]
        right.bar(at + 0.21 * (offset - 1.5), ratio, 0.19, label=name, color=colour)
    right.axhline(1, color="black", linewidth=0.8)
    right.set_xticks(at, labels, rotation=45, ha="right", fontsize=8)
    right.set_ylabel("time, BatchNorm folded = 1")
    right.set_title("Networks on ONNX Runtime, CPU")
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON; the picture goes beside it")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    options = parser.parse_args()
    about = machine.describe("onnxruntime", "onnx", "torch", "numpy")
    operators, networks = [], []
    print("Our operator: microseconds; speed in % of memcpy and of Identity; time in Relus; the others' times in ours")
    print(f"{'shape':>14} threads        us    memcpy    Identity     Relu  best stock      body  Pow, Div")
    for threads in options.threads:
        for shape in SHAPES:
            times = measure_operator(shape, threads, options.rounds)
            operators.append({"shape": shape, "threads": threads, "microseconds": times})
            print(tell_operator(shape, threads, times), flush=True)
    print("Networks: milliseconds with BatchNorm folded; the others' times in that")
    columns = "".join(f"{name:>12}" for name in ("stock", "RMSNorm", "deploynorm", "no residual", "session", "MABN"))
    print(f"{'network':>12} batch threads     BN ms{columns}")
    with tempfile.TemporaryDirectory() as folder:
        for network in options.networks:
            for batch in BATCHES[network]:
                for threads in options.threads:
                    times = measure_network(network, batch, threads, options.rounds, Path(folder))
                    networks.append({"network": network, "batch": batch, "threads": threads, "microseconds": times})
                    print(tell_network(network, batch, threads, times), flush=True)
    content = {"machine": about, "operators": operators, "networks": networks}
    options.out.write_text(json.dumps(content, indent=2) + "\n")
    draw(options.out.with_suffix(".png"), operators, networks)


if __name__ == "__main__":
    main()
