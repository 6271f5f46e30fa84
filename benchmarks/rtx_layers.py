"""How many layers that write to memory TensorRT-RTX builds for an FRN layer, by map size, type and --frn.

    python benchmarks/rtx_layers.py --out benchmarks/results/rtx_layers.json

Needs tensorrt_rtx, and for the plugin `deploynorm plugins build --cuda`; no GPU, since it builds ahead of time and
times nothing. A figure is the layers of Conv, FRN, Conv that write to memory, less those of the same without FRN: what
FRN costs in passes over memory. Each build is a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import machine
import torch
from torch import nn

from deploynorm._export import export
from deploynorm.layers import FRN2d

SIZES = (7, 14, 28, 56, 112, 224)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHANNELS = 64

BUILD = """
import json, sys
from deploynorm._build import build
path, capability, way, size = sys.argv[1:]
shape = {"": (8, 64, int(size), int(size))}
engine = build(path, backend="tensorrt-rtx", compute_capabilities=[capability], frn=way, opt_shapes=shape)
print(json.dumps(engine.passes))
"""


def save(path: Path, frn: bool, dtype: str, size: int, free: bool) -> None:
    """Conv, FRN, Conv, or the convolutions alone."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False) for _ in range(2)]
    network = nn.Sequential(convolutions[0], *([FRN2d(CHANNELS)] if frn else []), convolutions[1]).eval()
    example = (torch.randn(8, CHANNELS, size, size),)
    export(network, example, dtype=DTYPES[dtype], dynamic="all" if free else "none").save(path)


def passes(path: Path, capability: str, way: str, size: int) -> int:
    done = subprocess.run([sys.executable, "-c", BUILD, str(path), capability, way, str(size)], capture_output=True)
    if done.returncode != 0:
        sys.exit(done.stderr.decode())
    return int(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compute-capability", default="8.9")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path, bare = Path(folder) / "frn.onnx", Path(folder) / "bare.onnx"
        for dtype, free in itertools.product(DTYPES, (False, True)):
            counts: dict[str, list[int]] = {"native": [], "plugin": []}
            for size in SIZES:
                save(path, True, dtype, size, free)
                save(bare, False, dtype, size, free)
                without = passes(bare, options.compute_capability, "native", size)
                for way, found in counts.items():
                    found.append(passes(path, options.compute_capability, way, size) - without)
            rows.append({"dtype": dtype, "axes": "free" if free else "fixed", "sizes": SIZES, **counts})
            print(f"{dtype:>8} {rows[-1]['axes']:>5}  native {counts['native']}  plugin {counts['plugin']}", flush=True)
    found = machine.describe("torch", "tensorrt_rtx_cu13")
    content = {"machine": found, "compute_capability": options.compute_capability, "rows": rows}
    options.out.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
