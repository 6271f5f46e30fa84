"""The error of networks in half precision against float64, every tensor rounded as on a GPU.

    python benchmarks/half.py --out benchmarks/results/half.json

The shipped networks, and networks of random weights over a few seeds. Each is folded, exported in the type and run by
the backend `half`; inputs are rounded to the type first. The figure is the largest error over all outputs, relative to
the largest output. Needs timm.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
import numpy as np
import torch
from networks import NETWORKS, timm_resnet
from torch import nn

from deploynorm import adopt, checkpoint
from deploynorm._check import DEFAULT_TOLERANCE, check
from deploynorm._export import export
from deploynorm._fold import fold
from deploynorm.inputs import TensorSpec
from deploynorm.run.eager import EagerRunner
from deploynorm.run.half import HalfRunner

MODELS = Path(__file__).parents[1] / "models"
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Case = tuple[str, Callable[[], nn.Module], tuple[int, int, int], bool]
"""Name, how to build it, the shape of an image, and whether its weights are random."""


def cases() -> Iterator[Case]:
    for path in sorted(MODELS.glob("*.pt")):
        yield path.stem, lambda path=path: checkpoint.load(path).model, (1, 28, 28), False  # type: ignore[misc]
    for name, (builds, size) in NETWORKS.items():
        for norm in (each for each in builds if each != "bn"):
            yield f"{name}, {norm}", builds[norm], (3, size, size), True
    yield "timm resnetv2_50d_frn", lambda: adopt(timm_resnet(), torch.randn(1, 3, 224, 224)).model, (3, 224, 224), True


def worst(build: Callable[[], nn.Module], shape: tuple[int, int, int], dtype: str, seed: int, batch: int) -> float:
    """The largest error relative to the largest output."""
    torch.manual_seed(seed)
    network = build().eval()
    x = torch.randn(batch, *shape).to(HALF[dtype])
    model = export(fold(network, (x.float(),)).model, (x.float(),), dtype=HALF[dtype], input_names=["x"]).to_proto()
    spec = TensorSpec("x", ("?", "?", "?", "?"), dtype)
    array = x.view(torch.int16).numpy().view("bfloat16") if dtype == "bfloat16" else x.numpy()
    with HalfRunner(model) as candidate, EagerRunner(network, [spec], ["output"], dtype=torch.float64) as truth:
        candidate.precision = dtype
        return check(candidate, truth, [("", {"x": np.asarray(array)})]).worst.max_rel


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="of the networks with random weights")
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    rows = []
    for name, build, shape, random in cases():
        for dtype in HALF:
            errors = [worst(build, shape, dtype, seed, options.batch) for seed in range(options.seeds if random else 1)]
            rows.append({"network": name, "dtype": dtype, "relative_errors": [float(f"{e:.3g}") for e in errors]})
            bound = DEFAULT_TOLERANCE[dtype].rtol
            print(f"{name:>32} {dtype:>8}  {min(errors):.1e} to {max(errors):.1e}  (bound {bound:.0e})", flush=True)
            content = {
                "machine": machine.describe("torch", "onnxruntime", "timm"),
                "batch": options.batch,
                "rows": rows,
            }
            options.out.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy

    main()
