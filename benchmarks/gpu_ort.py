"""Whole networks in ONNX Runtime on a GPU: FRN on our operator and as its function body, against batch norm folded.

    PYTHONPATH=. python benchmarks/gpu_ort.py --libraries FOLDER --out benchmarks/results/gpu_ort.json

FOLDER has our libraries, built for the GPU that is here. Inputs and outputs are bound to tensors of PyTorch on the
device. Every way is run as it is and, on a GPU, replayed as a CUDA graph; all ways of a row take turns, and a figure is
the median time of a call, its end included. Each is first compared with the network in float64. A row is written as
soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from networks import NETWORKS, export_network, make_network
from torch import Tensor

from deploynorm import ort
from deploynorm.libraries import ORT_LIBRARY

DTYPES = {"float32": torch.float32, "float16": torch.float16}
TOLERANCES = {"float32": 1e-4, "float16": 1e-2}
"""Of the largest output, as `deploynorm check` has them."""

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}

WAYS = {
    "BN folded": ("bn", False, False),
    "FRN, function body": ("frn", False, False),
    "FRN, our operator": ("frn", True, False),
    "FRN, residual form": ("frn", True, True),
}
"""Way -> the normalization, whether our library is registered, and whether residuals are added inside the operator."""

CALLS = 5


class Bound:
    """A session whose input and output are tensors of PyTorch on the device."""

    def __init__(self, model: Path, x: Tensor, library: Path | None, provider: str, graph: bool) -> None:
        onnxruntime = ort.import_onnxruntime()
        options = ort.quiet_options()
        if library is not None:
            options.register_custom_ops_library(str(library))
        settings = {"use_tf32": "0", "enable_cuda_graph": str(int(graph))} if provider == "cuda" else {}
        self._session = onnxruntime.InferenceSession(
            str(model), options, providers=[(PROVIDERS[provider], settings)], enable_fallback=0
        )
        if self._session.get_providers()[0] != PROVIDERS[provider]:
            sys.exit(f"gpu_ort.py: {PROVIDERS[provider]} does not start here")
        (given,), (made,) = self._session.get_inputs(), self._session.get_outputs()
        self._x, self.y = x, torch.full((x.shape[0], made.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
        self._binding = self._session.io_binding()
        kind = np.dtype(str(x.dtype).removeprefix("torch."))
        self._binding.bind_input(given.name, provider, 0, kind, tuple(x.shape), x.data_ptr())
        self._binding.bind_output(made.name, provider, 0, kind, tuple(self.y.shape), self.y.data_ptr())

    def __call__(self) -> None:
        """One run, to its end."""
        self._session.run_with_iobinding(self._binding)


def measure(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of a call of each way, in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(rounds + 1):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            begin = time.perf_counter()
            for _ in range(CALLS):
                ways[name]()
            if turn > 0:  # the first warms up
                times[name].append(1e6 * (time.perf_counter() - begin) / CALLS)
    return {name: round(statistics.median(values), 1) for name, values in times.items()}


def truth(network: str, norm: str, x: Tensor) -> Tensor:
    model, _ = make_network(network, norm)
    with torch.no_grad():
        y: Tensor = model.to(x.device, torch.float64)(x.double())
    return y


def row(folder: Path, batch: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one batch and type."""
    device = "cuda" if options.provider == "cuda" else "cpu"
    _, example = make_network(options.network, "bn")
    x = torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(1)).to(device, DTYPES[dtype])
    library = options.libraries and options.libraries / ORT_LIBRARY
    wanted = {norm: truth(options.network, norm, x) for norm in {norm for norm, *_ in WAYS.values()}}
    ways: dict[str, Bound] = {}
    errors = {}
    for name, (norm, ours, residual) in WAYS.items():
        if ours and library is None:
            continue
        model = folder / f"{norm}_{dtype}{'_residual' * residual}.onnx"
        if not model.exists():
            kind = None if dtype == "float32" else DTYPES[dtype]
            export_network(options.network, norm, model, dtype=kind, residual=residual)
        for graph in (False, True) if options.provider == "cuda" else (False,):
            key = name + (", graph" if graph else "")
            ways[key] = Bound(model, x, library if ours else None, options.provider, graph)
            for _ in range(3):  # a graph is captured in the first
                ways[key]()
            want = wanted[norm]
            errors[key] = float((ways[key].y.double() - want).abs().max() / want.abs().max())
            if not errors[key] <= TOLERANCES[dtype]:
                sys.exit(f"gpu_ort.py: {key} is wrong for batch {batch} in {dtype}: {errors[key]:.3g}")
    times = measure(ways, options.rounds)
    return {"network": options.network, "batch": batch, "dtype": dtype, "microseconds": times, "errors": errors}


def show(result: Mapping[str, Any]) -> str:
    times = result["microseconds"]
    each = "  ".join(
        f"{name} {value / times['BN folded' + ', graph' * name.endswith('graph')]:.2f}" for name, value in times.items()
    )
    base = f"BN folded {times['BN folded']:.0f} us = 1"
    return f"{result['network']}, batch {result['batch']}, {result['dtype']}: {base}: {each}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--libraries", type=Path, help="without them our operator is left out")
    parser.add_argument("--provider", choices=PROVIDERS, default="cuda")
    parser.add_argument("--network", choices=NETWORKS, default="ResNet-50")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    if options.provider == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_ort.py: torch finds no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.cuda.get_device_name() if options.provider == "cuda" else "the processor"
    about = {"device": device, "onnxruntime": ort.import_onnxruntime().__version__}
    results: dict[str, Any] = {**about, "machine": machine.describe("torch"), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in options.dtypes:
            for batch in options.batches:
                results["rows"].append(row(Path(folder), batch, dtype, options))
                print(show(results["rows"][-1]), flush=True)
                options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
