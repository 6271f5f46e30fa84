"""The networks of the benchmarks, each with FRN, MABN or BN, as ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from deploynorm._export import export
from deploynorm._fold import fold
from deploynorm.contract import Lowering
from deploynorm.layers import FRN2d
from deploynorm.models import frn_resnet, mabn_resnet

__all__ = ["NETWORKS", "export_network", "make_network", "timm_network", "timm_resnet"]


def _conv_norm(
    in_channels: int, out_channels: int, kernel: int, stride: int, groups: int, act: bool, norm: str
) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    if norm == "frn":
        return nn.Sequential(conv, FRN2d(out_channels, tlu=act))
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([nn.ReLU()] if act else []))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection, and a shortcut where input and output have one shape."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, norm: str) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers = [] if expansion == 1 else [_conv_norm(in_channels, hidden, 1, 1, 1, True, norm)]
        layers.append(_conv_norm(hidden, hidden, 3, stride, hidden, True, norm))
        layers.append(_conv_norm(hidden, out_channels, 1, 1, 1, False, norm))
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


def mobilenet_v2(norm: str) -> nn.Module:
    """MobileNetV2 (arXiv:1801.04381, table 2), with ReLU instead of ReLU6."""
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    layers: list[nn.Module] = [_conv_norm(3, 32, 3, 2, 1, True, norm)]
    channels = 32
    for expansion, out_channels, repeats, stride in stages:
        for index in range(repeats):
            layers.append(InvertedResidual(channels, out_channels, stride if index == 0 else 1, expansion, norm))
            channels = out_channels
    layers += [_conv_norm(channels, 1280, 1, 1, 1, True, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, 1000))


NETWORKS: dict[str, tuple[dict[str, Callable[[], nn.Module]], int]] = {
    "ResNet-20": (
        {
            "frn": partial(frn_resnet.resnet20, 10),
            "bn": partial(mabn_resnet.resnet20, 10, norm="bn"),
            "mabn": partial(mabn_resnet.resnet20, 10, norm="mabn"),
        },
        32,
    ),
    "ResNet-50": (
        {
            "frn": frn_resnet.resnet50,
            "bn": partial(mabn_resnet.resnet50, norm="bn"),
            "mabn": partial(mabn_resnet.resnet50, norm="mabn"),
        },
        224,
    ),
    "MobileNetV2": ({"frn": partial(mobilenet_v2, "frn"), "bn": partial(mobilenet_v2, "bn")}, 224),
}
"""Name -> the network by normalization, and the height and width of its images."""


def timm_resnet() -> nn.Module:
    """timm's resnetv2_50d_frn, with random weights."""
    return timm_network("resnetv2_50d_frn")


def timm_network(name: str, norm: str | None = None) -> nn.Module:
    """A network of timm with random weights, its norm layers perhaps of another class of timm.layers."""
    try:
        import timm
    except RuntimeError:  # PyPI's torchvision with a CPU torch lacks two operators that it registers shapes for
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm
    chosen = {} if norm is None else {"norm_layer": getattr(timm.layers, norm)}
    network: nn.Module = timm.create_model(name, **chosen).eval()
    return network


def make_network(network: str, norm: str) -> tuple[nn.Module, Tensor]:
    """A network of random weights, always the same ones, and a batch of two images."""
    torch.manual_seed(0)
    builds, size = NETWORKS[network]
    model = builds[norm]().eval()
    return model, torch.randn(2, 3, size, size)


def export_network(
    network: str,
    norm: str,
    path: Path,
    lowering: Lowering = "custom",
    dtype: torch.dtype | None = None,
    *,
    residual: bool = True,
) -> None:
    """Folds and exports a network of random weights with dynamic batch and static height and width."""
    model, x = make_network(network, norm)
    folded, _ = fold(model, (x,), dynamic="batch")
    export(folded, (x,), dynamic="batch", lowering=lowering, dtype=dtype, residual=residual).save(path)
