"""Export of timm's resnetv2_50d_frn: deploynorm against a plain torch.onnx.export, by time and nodes.

    python benchmarks/export.py --out benchmarks/results/export.json

Both start from the same network and write a file with dynamic batch, height and width; runs alternate. Needs timm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import machine
import onnx
import torch
from networks import timm_resnet

from deploynorm._export import export


def ours(network: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    export(network, (x,), dynamic="all").save(path)


def plain(network: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    free = torch.export.Dim.DYNAMIC
    torch.onnx.export(network, (x,), path, dynamic_shapes=({0: free, 2: free, 3: free},), verbose=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    about = machine.describe("torch", "onnx", "onnxscript", "timm")
    network, x = timm_resnet(), torch.randn(2, 3, 224, 224)
    ways: dict[str, Callable[..., None]] = {"deploynorm": ours, "torch.onnx.export": plain}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    nodes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, way in ways.items():
                path = Path(folder) / "model.onnx"
                start = time.perf_counter()
                way(network, x, path)
                seconds[name].append(time.perf_counter() - start)
                nodes[name] = len(onnx.load(path, load_external_data=False).graph.node)
    results = {
        name: {"seconds_median": statistics.median(times), "seconds": times, "nodes": nodes[name]}
        for name, times in seconds.items()
    }
    options.out.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")
    for name, result in results.items():
        print(f"{name:20} {result['seconds_median']:6.1f} s  {result['nodes']:4} nodes")


if __name__ == "__main__":
    main()
