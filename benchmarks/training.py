"""A training step of FRN and MABN compared with batch normalization: time, and bytes saved for the backward pass.

    python benchmarks/training.py --out benchmarks/results/training.json

One layer, forward and backward, and whole steps of ResNet-20 (forward, backward, SGD), float32 on the CPU. In each
round all variants take turns, so that other load affects all alike; the tables give medians as ratios to batch
normalization. FRN, which includes its threshold, is compared with BN and an in-place ReLU; MABN, after its warm-up,
with BN alone; the end of a residual block, in one layer and in three, with BN, an addition and a ReLU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import machine
import torch
from torch import Tensor, nn

from deploynorm.layers import TLU, FRN2d, MABN2d, _native
from deploynorm.layers._composed import composed
from deploynorm.models import frn_resnet, mabn_resnet

SHAPES = ((2, 64, 56, 56), (32, 64, 56, 56), (8, 256, 14, 14), (32, 512, 7, 7), (128, 16, 32, 32))
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


class Composed(FRN2d):
    """FRN in PyTorch's own operators, with their autograd."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        assert residual is None
        return composed(x, self.weight, self.bias, self.tau, self.eps)


class EndOfBlock(nn.Module):
    """relu(norm(x) + x), or with TLU: the end of a residual block in three layers."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y += x
        z: Tensor = self.activation(y)
        return z


class WithResidual(FRN2d):
    """The end of a residual block in one layer: FRN that adds its own input before the threshold."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x, residual=x)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "BN + ReLU": lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
    "GN + ReLU": lambda channels: nn.Sequential(nn.GroupNorm(8, channels), nn.ReLU(inplace=True)),
    "FRN": FRN2d,
    "FRN, composed": Composed,
    "BN": nn.BatchNorm2d,
    "MABN": partial(MABN2d, warmup=0, renorm_start=0),
    "BN, residual, ReLU": lambda channels: EndOfBlock(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
    "FRN, residual, TLU": lambda channels: EndOfBlock(FRN2d(channels, tlu=False), TLU(channels)),
    "FRN with residual": WithResidual,
}
AGAINST = {"GN + ReLU": "BN + ReLU", "FRN": "BN + ReLU", "FRN, composed": "BN + ReLU", "MABN": "BN"}
AGAINST |= dict.fromkeys(("FRN, residual, TLU", "FRN with residual"), "BN, residual, ReLU")
"""Variant -> the variant that it is compared with."""

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "BN": lambda: mabn_resnet.resnet20(norm="bn"),
    "GN": lambda: mabn_resnet.resnet20(norm="gn"),
    "FRN": frn_resnet.resnet20,
    "MABN": mabn_resnet.resnet20,
}


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that one forward pass saves for the backward pass, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(kept.values())


def layer_step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    x.grad = None
    layer.zero_grad()
    layer(x).backward(dy)


def network_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, classes: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), classes).backward()
    optimizer.step()


def keep_freed_memory() -> None:
    """Keeps glibc from returning memory after a step, which would slow down a random variant."""
    trim_threshold, mmap_threshold = -1, -3
    for option in (trim_threshold, mmap_threshold):
        ctypes.CDLL(None).mallopt(option, 1 << 30)


def milliseconds(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Medians over the rounds that fit into about `seconds` for all variants together; at least 9."""
    for step in steps.values():
        step()
    start = time.perf_counter()
    for step in steps.values():
        step()
    rounds = max(9, int(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure_layers(shape: Sequence[int], layout: str, seconds: float) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    x, dy = (torch.randn(*shape).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    x.requires_grad_()
    layers = {name: make(shape[1]) for name, make in LAYERS.items()}
    # x * 1 is an intermediate result, as in a network, which an in-place layer may overwrite.
    kept = {name: kept_bytes(layer, x * 1) for name, layer in layers.items()}
    times = milliseconds({name: partial(layer_step, layer, x, dy) for name, layer in layers.items()}, seconds)
    return {name: {"milliseconds": times[name], "kept_bytes": kept[name]} for name in layers}


def measure_networks(batch: int, layout: str, compiled: bool, seconds: float) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    torch._dynamo.reset()  # earlier networks count towards its limit of compilations
    x, classes = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    x = x.contiguous(memory_format=LAYOUTS[layout])
    steps: dict[str, Callable[[], None]] = {}
    kept: dict[str, int] = {}
    for name, make in NETWORKS.items():
        model = make().to(memory_format=LAYOUTS[layout])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        kept[name] = kept_bytes(model, x)
        steps[name] = partial(network_step, torch.compile(model) if compiled else model, optimizer, x, classes)
    times = milliseconds(steps, seconds)
    return {name: {"milliseconds": times[name], "kept_bytes": kept[name]} for name in steps}


def ratios(figures: dict[str, dict[str, float]], against: dict[str, str]) -> str:
    words = []
    for name, base in against.items():
        time_ratio = figures[name]["milliseconds"] / figures[base]["milliseconds"]
        bytes_ratio = figures[name]["kept_bytes"] / figures[base]["kept_bytes"]
        words.append(f"{name} / {base}: {time_ratio:.2f} ({bytes_ratio:.2f})")
    return "   ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=12, help="for each line, about")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compile", action="store_true", help="compiled networks too")
    options = parser.parse_args()
    if not _native.available(torch.device("cpu")):
        parser.error("the kernels are not built: deploynorm plugins build")
    keep_freed_memory()
    about = machine.describe("torch")
    layers, networks = [], []
    print("ratios of time, and of bytes kept in brackets")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for layout in LAYOUTS:
            for shape in SHAPES:
                figures = measure_layers(shape, layout, options.seconds)
                layers.append({"shape": shape, "layout": layout, "threads": threads, "ways": figures})
                print(
                    f"{'x'.join(map(str, shape))} {layout}, {threads} threads: {ratios(figures, AGAINST)}", flush=True
                )
        for compiled in (False, True) if options.compile else (False,):
            for batch in (128, 2):
                for layout in LAYOUTS:
                    figures = measure_networks(batch, layout, compiled, options.seconds)
                    about_it = {"batch": batch, "layout": layout, "threads": threads, "compiled": compiled}
                    networks.append(about_it | {"ways": figures})
                    against = {name: "BN" for name in NETWORKS if name != "BN"}
                    word = "compiled ResNet-20" if compiled else "ResNet-20"
                    print(f"{word} {batch} {layout}, {threads} threads: {ratios(figures, against)}", flush=True)
    options.out.write_text(json.dumps({"machine": about, "layers": layers, "networks": networks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
