"""torchvision's detectors and DeepLabV3 with FRN and MABN, converted and checked: benchmarks/results/detection.md.

    python benchmarks/detection.py --out benchmarks/results/detection.md

Each network has random weights, its normalizations swapped (`deploynorm.swap`), those of the heads too, and MABN some
random statistics; the last layers are drawn anew, so that scores differ and many boxes are found. `deploynorm.convert`
then folds it, exports it and compares the file in ONNX Runtime with PyTorch in float64.
Needs a torchvision whose operators load: beside a CPU build of torch, that of PyTorch's own package index.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from deploynorm import Conversion, convert, swap
from deploynorm.contract import DOMAIN, OPERATORS
from deploynorm.files import write_text
from deploynorm.layers import MABN2d
from deploynorm.layers.cenconv import CenConv2d

COLUMNS = (
    "network",
    "norm",
    "layers swapped",
    "folded into a convolution",
    "one FRN node",
    "norms left in the file",
    "nodes",
    "found in the first sample",
    "worst error, of what is allowed",
    "sizes that may change",
)
CLASSES = 5


class Case(NamedTuple):
    """A network and its example inputs, as `convert` takes them."""

    network: nn.Module
    example: Any


def retinanet(norm: str) -> Case:
    detection = importlib.import_module("torchvision.models.detection")
    return _one_stage(detection.RetinaNet, norm, score_thresh=0.05)


def fcos(norm: str) -> Case:
    detection = importlib.import_module("torchvision.models.detection")
    return _one_stage(detection.FCOS, norm, score_thresh=0.2)


def ssdlite(norm: str) -> Case:
    detection = importlib.import_module("torchvision.models.detection")
    network = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES).eval()
    x = torch.rand(2, 3, 320, 320)
    network.backbone = swap(network.backbone, x, norm=norm).model.eval()
    with torch.no_grad():
        maps = list(network.backbone(x).values())
    network.head = swap(network.head, (maps,), norm=norm).model
    return Case(network, ([torch.rand(3, 320, 320)],))  # ONNX Runtime resizes inexactly


def deeplabv3(norm: str) -> Case:
    segmentation = importlib.import_module("torchvision.models.segmentation")
    options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES, "aux_loss": True}
    x = torch.randn(2, 3, 64, 96)
    return Case(swap(segmentation.deeplabv3_mobilenet_v3_large(**options).eval(), x, norm=norm).model, x)


NETWORKS: dict[str, Callable[[str], Case]] = {
    "RetinaNet, ResNet-18": retinanet,
    "FCOS, ResNet-18": fcos,
    "SSDlite320, MobileNetV3": ssdlite,
    "DeepLabV3, MobileNetV3": deeplabv3,
}


def _one_stage(kind: Callable[..., nn.Module], norm: str, **options: Any) -> Case:
    backbones = importlib.import_module("torchvision.models.detection.backbone_utils")
    anchors = importlib.import_module("torchvision.models.detection.anchor_utils")
    backbone = backbones.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    generator = anchors.AnchorGenerator(tuple((size,) for size in (16, 32, 64, 96, 128)), ((1.0,),) * 5)
    sizes = {"min_size": 64, "max_size": 96}
    network: Any = kind(backbone, CLASSES, anchor_generator=generator, **sizes, **options)
    network.backbone = swap(network.backbone.eval(), torch.randn(2, 3, 64, 96), norm=norm).model
    return Case(network, ([torch.rand(3, 60, 80)],))


def build(name: str, norm: str) -> Case:
    """The network, with random weights and statistics."""
    torch.manual_seed(0)
    case = NETWORKS[name](norm)
    for path, layer in case.network.named_modules():
        if isinstance(layer, MABN2d):
            layer.running_var.uniform_(0.5, 1.5)
        last = path.rpartition(".")[2] in ("cls_logits", "bbox_reg", "bbox_ctrness")
        if last and isinstance(layer, nn.Conv2d) and not isinstance(layer, CenConv2d):
            nn.init.normal_(layer.weight, std=0.1)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, -1.0 if path.endswith("cls_logits") else 0.0)
    return Case(case.network.eval(), case.example)


def row(name: str, norm: str) -> str:
    """Converts a network and counts."""
    network, example = build(name, norm)
    result = convert(network, example)
    itself = result.parity.itself
    if not result and (itself is None or itself):  # else PyTorch in float32 is as far off
        raise RuntimeError(f"{name}, {norm}: it does not compute what it should\n{result}")
    return f"| {' | '.join((name, norm, *map(str, _cells(network, result))))} |"


def _cells(network: nn.Module, result: Conversion) -> list[object]:
    counts = result.exported.node_counts()
    frn = sum(counts[f"{DOMAIN}::{operator}"] for operator in OPERATORS)
    left = sum(count for name, count in counts.items() if "Normalization" in name) - frn
    kinds = ("FRN", "MABN")
    swapped = sum(type(layer).__name__.startswith(kinds) for layer in network.modules())
    changes = [] if result.fold is None else result.fold.changes
    folded = sum(change.outcome == "folded" and change.kind.startswith("MABN") for change in changes)
    first = [each for each in result.parity.reports[-1].comparisons if each.shape]
    shapes = {each.output: each.shape for each in reversed(first)}
    found = ", ".join(f"{output} {'x'.join(map(str, shapes[output]))}" for output in dict.fromkeys(shapes))
    worst = f"{max(report.worst.severity for report in result.parity.reports):.3f}"
    if not result:
        worst = "other boxes, and in PyTorch in float32 too"
    free = {str(size) for spec in result.exported.inputs for size in spec.shape if isinstance(size, str)}
    return [swapped, folded, frn, left, counts.total(), found, worst, ", ".join(sorted(free)) or "-"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for name in options.only:
        for norm in ("frn", "mabn"):
            lines.append(row(name, norm))
            print(lines[-1], flush=True)
            write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
