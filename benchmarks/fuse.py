"""What `rewrite --fuse` finds in the files of other exporters, how exactly, how fast, and what it wins.

    python benchmarks/fuse.py --out benchmarks/results/fuse.json

1. Each form of `loose_forms.py` by each exporter: how many become one node, and the worst error of ONNX Runtime on the
   fused file against the file as exported, relative to the largest value.
2. Random graphs of `random_frn.py`, half of them changed in one place: how many are fused, how many of them wrongly,
   and the worst error.
3. Nine networks of timm with its FRN layers, by two exporters: how many of their layers are fused, the worst error, and
   seconds of this process for the pass, of five runs the median. ONNX Runtime's time on one thread as exported, fused
   (stock and with our library), and rewritten for this machine, of the file that TorchScript wrote.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loose_forms
import machine
import numpy as np
import onnx
import onnx_ir as ir
import torch
from loose_forms import EXPORTERS, FORMS
from networks import timm_network
from ort_cpu import measure
from random_frn import random_graph

from deploynorm import onnx_file
from deploynorm.contract import OPERATORS
from deploynorm.errors import ModelError
from deploynorm.rewrite.cpu import optimize_for_cpu
from deploynorm.rewrite.fuse import fuse
from deploynorm.run.onnxruntime import OnnxRuntimeRunner

_Feeds = Mapping[str, np.ndarray[Any, Any]]
_WRONG = 1e-5


def results(model: onnx.ModelProto | ir.Model, feeds: _Feeds) -> dict[str, np.ndarray[Any, Any]]:
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    with OnnxRuntimeRunner(proto.SerializeToString(), plugins=[]) as runner:
        return runner.infer(feeds)


def error(want: _Feeds, got: _Feeds) -> float:
    """The largest difference, relative to the largest value of its output; infinite for another shape."""
    worst = 0.0
    for name, array in want.items():
        wide = array.astype(np.float64)
        if got[name].shape != array.shape:
            return float("inf")
        if wide.size and np.isfinite(wide).all() and (scale := np.abs(wide).max()):
            worst = max(worst, float(np.abs(got[name] - wide).max() / scale))
    return worst


def forms() -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for exporter in EXPORTERS:
        fused, worst, left = 0, 0.0, []
        for form in FORMS:
            data = loose_forms.exported(form, exporter)
            if data is None:
                continue
            proto = onnx.load_model_from_string(data)
            result = fuse(ir.from_proto(proto))
            count = sum(node.op_type in OPERATORS for node in result.model.graph)
            fused += count
            if count != 1:
                left.append(form)
                continue
            half = np.float16 if form.startswith("float16") else np.float32
            feeds = {"x": np.random.default_rng(0).normal(size=(2, loose_forms.CHANNELS, 9, 7)).astype(half)}
            worst = max(worst, error(results(proto, feeds), results(result.model, feeds)))
        rows[exporter] = {"fused": fused, "left": left, "worst_error": worst}
        print(exporter, rows[exporter], flush=True)
    return rows


def fuzz(seeds: range) -> dict[str, Any]:
    invalid, fused, wrong, worst, again = 0, 0, list[int](), 0.0, 0
    for seed in seeds:
        proto, feeds = random_graph(seed)
        try:
            want = results(proto, feeds)
        except ModelError:  # changed into what is no graph
            invalid += 1
            continue
        result = fuse(ir.from_proto(proto))
        if not result.modified:
            continue
        fused += 1
        again += fuse(result.model).modified
        found = error(want, results(result.model, feeds))
        worst = max(worst, found)
        wrong += [seed] if found > _WRONG else []
    row = {
        "graphs": len(seeds),
        "invalid": invalid,
        "fused": fused,
        "wrong": wrong,
        "worst_error": worst,
        "fused_again": again,
    }
    print(row, flush=True)
    return row


NETWORKS = {
    "resnetv2_50d_frn": None,
    "resnet18": "FilterResponseNormTlu2d",
    "resnet26d": "FilterResponseNormAct2d",
    "mobilenetv2_050": "FilterResponseNormTlu2d",
    "semnasnet_075": "FilterResponseNormAct2d",
    "efficientnet_lite0": "FilterResponseNormAct2d",
    "regnety_002": "FilterResponseNormTlu2d",
    "densenet121": "FilterResponseNormTlu2d",
    "ese_vovnet19b_dw": "FilterResponseNormAct2d",
}
"""By timm's name, the class of its norm layers where it is not FRN by itself."""


def networks(rounds: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, norm in NETWORKS.items():
        torch.manual_seed(0)
        net = timm_network(name, norm)
        layers = sum(type(layer).__name__.startswith("FilterResponseNorm") for layer in net.modules())
        rows[name] = {"layers": layers}
        for exporter in ("TorchScript 13", "dynamo 20"):
            data = loose_forms.export(net, torch.randn(2, 3, 224, 224), exporter, dynamic="dynamo" in exporter)
            rows[name][exporter] = network(data, rounds if exporter.startswith("TorchScript") else 0)
        print(name, rows[name], flush=True)
    return rows


def network(data: bytes, rounds: int) -> dict[str, Any]:
    """What the pass does to a file; with rounds, how long ONNX Runtime takes for it."""
    proto = onnx.load_model_from_string(data)
    seconds = []
    for _ in range(5):
        model = ir.from_proto(proto)
        start = time.process_time()
        result = fuse(model)
        seconds.append(time.process_time() - start)
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, f"{name}.onnx") for name in ("exported", "fused", "rewritten")}
        paths["exported"].write_bytes(data)
        onnx_file.save(result.model, paths["fused"])
        runners = {
            "as exported": OnnxRuntimeRunner(paths["exported"], plugins=[], threads=1),
            "fused, stock": OnnxRuntimeRunner(paths["fused"], plugins=[], threads=1),
        }
        if rounds:
            onnx_file.save(optimize_for_cpu(result.model).model, paths["rewritten"])
            runners["fused, our library"] = OnnxRuntimeRunner(paths["fused"], threads=1)
            runners["fused and rewritten"] = OnnxRuntimeRunner(paths["rewritten"], threads=1)
        truth = runners["as exported"].infer(feeds)
        errors = {name: error(truth, runner.infer(feeds)) for name, runner in runners.items()}
        ways = {name: lambda each=each: each.infer(feeds) for name, each in runners.items()} if rounds else {}
        times = measure(ways, rounds, 1.0)
    return {
        "fused": sum(node.op_type in OPERATORS for node in result.model.graph),
        "seconds_of_the_pass": statistics.median(seconds),
        "milliseconds": {name: value / 1e3 for name, value in times.items()},
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--graphs", type=int, default=10_000, help="random graphs (default 10000)")
    parser.add_argument("--rounds", type=int, default=15, help="of the times on the networks (default 15)")
    args = parser.parse_args()
    found = {
        "machine": machine.describe("onnx", "onnx-ir", "onnxruntime", "torch", "timm"),
        "networks": networks(args.rounds),
        "forms": forms(),
        "fuzz": fuzz(range(args.graphs)),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
