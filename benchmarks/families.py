"""What `swap` makes of the families of timm and torchvision: benchmarks/results/families.md.

    python benchmarks/families.py --out benchmarks/results/families.md

Every network is built with random weights, swapped to FRN and to MABN, and run. At its start, with every tau at 0, the
FRN network must give what the same network gives with all its activations left in place: a ReLU taken in wrongly
would show. The MABN network must give what BatchNorm gives with mean 0 and variance 1 behind centred weights.
Needs timm and torchvision.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deploynorm._swap import SwapReport, SwapResult, swap
from deploynorm.errors import ModelError
from deploynorm.files import write_text
from deploynorm.layers import FRN1d, FRN2d, FRN3d

TIMM = (
    "resnet18",
    "resnet50",
    "seresnet50",
    "res2net50_26w_4s",
    "resnetv2_50",
    "regnetx_002",
    "regnety_002",
    "repvgg_a0",
    "vgg11_bn",
    "densenet121",
    "dla34",
    "hrnet_w18_small",
    "cspdarknet53",
    "inception_v3",
    "xception41",
    "mobilenetv2_050",
    "mobilenetv3_small_100",
    "mnasnet_small",
    "efficientnet_b0",
    "tf_efficientnet_b0",
    "ghostnet_050",
    "levit_128s",
    "convnext_atto",
)
TORCHVISION = (
    "resnet18",
    "resnet50",
    "vgg11_bn",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "regnet_x_400mf",
    "efficientnet_b0",
    "segmentation.fcn_resnet50",
    "segmentation.deeplabv3_resnet50",
    "segmentation.lraspp_mobilenet_v3_large",
    "convnext_tiny",
)
FAMILIES = (*(f"timm {name}" for name in TIMM), *(f"torchvision {name}" for name in TORCHVISION))

SIZES = {"timm inception_v3": 96, "torchvision inception_v3": 299, "timm levit_128s": 224}
"""Height and width where they are not 64."""

COLUMNS = (
    "network",
    "BatchNorm",
    "FRN with TLU",
    "FRN, its ReLU stays",
    "FRN, no ReLU behind it",
    "MABN",
    "of them off zero",
    "CenConv",
    "what stays, and why",
)

_STUBS: list[torch.library.Library] = []


class Row(NamedTuple):
    """A family of networks, as it stands in the table."""

    family: str
    cells: tuple[str, ...]

    def __str__(self) -> str:
        return f"| {' | '.join((self.family, *self.cells))} |"


def libraries() -> tuple[ModuleType, ModuleType]:
    """timm and torchvision."""
    try:
        return importlib.import_module("timm"), importlib.import_module("torchvision")
    except RuntimeError:  # PyPI's torchvision beside a CPU torch lacks two operators that it describes
        for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        _STUBS.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            definition = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _STUBS[-1].define(definition)  # type: ignore[no-untyped-call]
        return importlib.import_module("timm"), importlib.import_module("torchvision")


def build(family: str) -> tuple[nn.Module, Tensor]:
    """The network, with random weights, gamma and beta among them, and an input."""
    library, _, name = family.partition(" ")
    timm, torchvision = libraries()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            network = timm.create_model(name)
        else:
            kind, _, model = name.rpartition(".")
            builder = getattr(getattr(torchvision.models, kind) if kind else torchvision.models, model)
            network = builder(weights=None, **({"weights_backbone": None} if kind else {}))
    for module in network.modules():
        # Networks start with gammas of 0 here and there, which would hide what stands behind them.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    size = SIZES.get(family, 64)
    return network, torch.randn(2, 3, size, size)


def with_every_activation(network: nn.Module, swapped: nn.Module) -> nn.Module:
    """The network given, each of its BatchNorms replaced by an FRN without TLU, and nothing else."""
    memo: dict[int, object] = {}
    for path, norm in network.named_modules():
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        new = swapped.get_submodule(path)
        frn = copy.deepcopy(new.get_submodule("norm") if isinstance(new, nn.Sequential) else new)
        if isinstance(frn, FRN1d | FRN2d | FRN3d):
            frn.tau = None
            behind = [copy.deepcopy(getattr(norm, name)) for name in ("drop", "act") if hasattr(norm, name)]  # timm's
            memo[id(norm)] = nn.Sequential(frn, *behind)
    return copy.deepcopy(network, memo)


def with_centred_weights(network: nn.Module, swapped: nn.Module) -> nn.Module:
    """The network given, with BatchNorms of mean 0 and variance 1, and the weights centred where swap centres them."""
    network, became = copy.deepcopy(network), dict(swapped.named_modules())
    for path, layer in network.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
        elif type(became.get(path)).__name__.startswith("CenConv"):
            axes = (0, 2, 3) if isinstance(layer, nn.ConvTranspose2d) else tuple(range(1, layer.weight.dim()))
            layer.weight.data -= layer.weight.data.mean(axes, keepdim=True)
    return network


def outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """All that the network returns in evaluation mode."""
    with torch.no_grad():
        found = network.eval()(x)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def largest_difference(network: nn.Module, truth: nn.Module, x: Tensor) -> float:
    """Of all outputs, each as a part of its largest value."""
    pairs = zip(outputs(network, x), outputs(truth, x), strict=True)
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)


class Swaps(NamedTuple):
    """A network, an input, and what swap makes of it for either norm."""

    network: nn.Module
    x: Tensor
    frn: SwapResult
    mabn: SwapResult


@functools.lru_cache(maxsize=2)  # of the last families alone: networks are large
def swaps(family: str) -> Swaps:
    """Builds a network and swaps it both ways."""
    network, x = build(family)
    return Swaps(network, x, swap(network, x, norm="frn"), swap(network, x, norm="mabn"))


def row(family: str) -> Row:
    """Swaps a network both ways, checks it, and counts."""
    try:
        network, x, (frn, to_frn), (mabn, to_mabn) = swaps(family)
    except ModelError as error:
        return Row(family, (*["-"] * (len(COLUMNS) - 2), f"{error.problem}: {error.got}"))
    for swapped, truth in ((frn, with_every_activation(network, frn)), (mabn, with_centred_weights(network, mabn))):
        if not (difference := largest_difference(swapped, truth, x)) < 1e-4:
            raise RuntimeError(f"{family}: it does not compute what it should, and is off by {difference:.1e}")
    return Row(family, (*map(str, _counts(to_frn, to_mabn)), "; ".join(_reasons(network, to_frn, to_mabn)) or "-"))


def _counts(to_frn: SwapReport, to_mabn: SwapReport) -> list[int]:
    norms = [change for change in to_frn.changes if "BatchNorm" in change.kind]
    outcomes = Counter(change.outcome for change in norms)
    mabn = [change for change in to_mabn.changes if change.became.startswith("MABN")]
    off_zero = sum(change.outcome == "partly" for change in mabn)
    centred = sum(change.became.startswith("CenConv") for change in to_mabn.changes)
    frn = [outcomes["absorbed"], outcomes["partly"], outcomes["swapped"]]
    return [len(norms), *frn, len(mabn), off_zero, centred]


def _reasons(network: nn.Module, to_frn: SwapReport, to_mabn: SwapReport) -> list[str]:
    """Why layers stay, with classes in the place of names; layers far from a normalization are not of interest."""
    kinds = {path: type(layer).__name__ for path, layer in network.named_modules()}
    reasons: Counter[str] = Counter()
    for change in to_frn.with_outcome("partly"):
        reasons[change.detail.replace("the ReLU behind it stays", "ReLU").partition("; maps of one value")[0]] += 1
    for change in to_mabn.changes:
        if change.became.startswith("MABN") and change.outcome == "partly":
            sources = change.detail.partition(": it ")[2].partition(", which")[0]
            reasons["MABN " + " ".join(kinds.get(word, word) for word in sources.split(" "))] += 1
    for change in to_mabn.with_outcome("unchanged"):
        if not change.detail.startswith("it goes to"):
            reasons[f"{change.kind}: {change.detail}"] += 1
    return [f"{reason} ({count})" for reason, count in reasons.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=FAMILIES, metavar="FAMILY")
    options = parser.parse_args()
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for family in options.only:
        lines.append(str(row(family)))
        print(lines[-1], flush=True)
    write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
