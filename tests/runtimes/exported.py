"""The networks of the matrix: their ONNX files, what is fed to them, and what they compute in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deploynorm
from deploynorm._export import export
from deploynorm.contract import LOWERINGS
from deploynorm.image import ImageSpec
from deploynorm.layers import FRN2d
from deploynorm.trace import Sizes, find_sizes, inference_copy

__all__ = ["FILES", "NETS", "QUICK", "File", "UNet", "network", "truth", "write"]

ROOT = Path(__file__).resolve().parents[2]


class File(NamedTuple):
    """An ONNX file of the matrix. Its name is these four with dots between.

    Attributes:
        net: A name of `NETS`.
        lowering: How FRN is written. MABN is folded away, and has the default one alone.
        dtype: Of weights and activations; inputs and outputs are float32 always.
        size: "fixed" for one shape, "free" for a file whose session runs two.
    """

    net: str
    lowering: str
    dtype: str
    size: str

    def __str__(self) -> str:
        return ".".join(self)


class UNet(nn.Module):
    """Two levels down and up, once by a transposed convolution and once by interpolation: (N, 1, H, W) -> (N, 3, H, W),
    for H and W that are multiples of 4.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = _block(1, 8), _block(8, 16), _block(16, 24)
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.up2, self.up1 = _block(32, 16), _block(24, 8)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.bottom(F.max_pool2d(middle, 2))
        y = self.up2(torch.cat([self.up(coarse), middle], dim=1))
        y = self.up1(torch.cat([F.interpolate(y, scale_factor=2.0, mode="nearest"), fine], dim=1))
        z: Tensor = self.head(y)
        return z


def _block(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), FRN2d(out_channels))


def _unet() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    network = UNet()
    for name, parameter in network.named_parameters():  # a gamma of 1 and a threshold of 0 would hide a mistake in them
        if name.endswith(("gamma", "beta", "tau")):
            with torch.no_grad():
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
        else:
            nn.init.trunc_normal_(parameter, std=0.2, generator=generator)
    return network


def _checkpoint(norm: str) -> Callable[[], nn.Module]:
    return lambda: deploynorm.load(ROOT / "models" / f"{norm}_resnet20_fashion.pt").model


@dataclass(frozen=True)
class _Net:
    """A network of the matrix: what builds it, its title in the table, and whether it has FRN."""

    build: Callable[[], nn.Module]
    title: str
    frn: bool


NETS = {
    "frn": _Net(_checkpoint("frn"), "ResNet-20, FRN", frn=True),
    "unet": _Net(_unet, "U-Net, FRN", frn=True),
    "mabn": _Net(_checkpoint("mabn"), "ResNet-20, MABN", frn=False),
}

FILES = tuple(
    File(name, lowering, dtype, size)
    for name, net in NETS.items()
    for lowering in (LOWERINGS if net.frn else ["custom"])
    for dtype in ("float32", "float16")
    for size in ("fixed", "free")
)

QUICK = tuple(
    File(*each)
    for each in (
        ("frn", "custom", "float32", "free"),
        ("frn", "custom", "float16", "fixed"),
        ("unet", "primitives", "float32", "fixed"),
        ("unet", "custom", "float32", "free"),
        ("mabn", "custom", "float32", "free"),
    )
)
"""Those of CI."""


def network(name: str) -> nn.Module:
    return NETS[name].build().eval()


def samples() -> list[np.ndarray[Any, Any]]:
    """A test image, and two of another size, of noise. A file of fixed sizes is for the first."""
    spec = deploynorm.load(ROOT / "models" / "frn_resnet20_fashion.pt").image
    assert isinstance(spec, ImageSpec)
    image = spec.read(ROOT / "models" / "samples" / "ankle_boot.png")
    return [image, np.random.default_rng(0).normal(size=(2, 1, 32, 40)).astype(np.float32)]


def truth(name: str) -> list[np.ndarray[Any, Any]]:
    """What the network computes of each sample in float64, with nothing folded."""
    double = network(name).double()
    with torch.inference_mode():
        return [double(torch.from_numpy(x).double()).numpy() for x in samples()]


def write(files: Iterable[File], folder: Path) -> dict[File, dict[str, Any]]:
    """Exports these files into the folder, but for those that are there, and the samples; returns a job for each.

    A job says all that a runtime gets: its name, the path of the model, the path and shape of each sample, raw float32.
    """
    inputs = []
    for index, x in enumerate(samples()):
        path = folder / f"x{index}.bin"
        path.write_bytes(x.tobytes())
        inputs.append({"path": str(path), "shape": list(x.shape)})
    jobs = {}
    example = torch.from_numpy(samples()[0])
    folded: dict[str, tuple[nn.Module, Sizes]] = {}
    for file in files:
        path = folder / f"{file}.onnx"
        jobs[file] = {
            "name": str(file),
            "net": file.net,
            "model": str(path),
            "samples": inputs[:1] if file.size == "fixed" else inputs,
        }
        if path.exists():
            continue
        if file.net not in folded:
            twin, _ = deploynorm.fold(network(file.net), example)
            folded[file.net] = twin, find_sizes(inference_copy(twin), example)
        twin, sizes = folded[file.net]
        export(
            twin,
            example,
            lowering=file.lowering,
            dtype=file.dtype,
            keep_io_types=True,
            dynamic="none" if file.size == "fixed" else None,
            sizes=None if file.size == "fixed" else sizes,
            metadata={"deploynorm.labels": json.dumps(["what", "passes", "must", "keep"])},
        ).save(path)
    return jobs
