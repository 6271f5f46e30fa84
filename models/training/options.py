"""The command line of the recipe, and the options that determine the weights."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from .precision import AMP

__all__ = ["RECIPE", "build_parser"]

RECIPE = [
    *("norm", "data", "epochs", "batch_size", "accumulate", "amp", "lr", "warmup_epochs", "weight_decay"),
    *("label_smoothing", "ema", "shift", "seed", "processes"),
]
"""The options that determine the weights; the others set output, speed and the order of sums."""


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type; nothing past 2^31 - 1, which is more than any of the options means."""

    def integer(text: str) -> int:
        if not minimum <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"got {text[:40]}, expected {minimum} or more, and less than 2^31")
        return int(text)

    return integer


def number(expected: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type."""

    def number(text: str) -> float:
        if not (math.isfinite(float(text)) and accepts(float(text))):
            raise argparse.ArgumentTypeError(f"got {text}, expected a number {expected}")
        return float(text)

    return number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deploynorm.models.train",
        description="Train a ResNet-20; under torchrun, with as many processes as it starts.",
        epilog="Ctrl-C and SIGTERM finish the step (or the evaluation) and save; Ctrl-C again ends at once.",
    )

    add = parser.add_argument_group("what is trained").add_argument
    add("--norm", choices=["frn", "mabn", "bn", "gn"], required=True, help="normalization layer of the network")
    add("--data", default="fashion-mnist", help="fashion-mnist, digits, or a folder with Fashion-MNIST")
    add("-o", "--output", type=Path, help="folder for what is written (default: runs/NORM_resnet20_DATA)")
    add("--resume", action="store_true", help="continue from last.pt in the output folder")

    add = parser.add_argument_group("the recipe").add_argument
    add("--epochs", type=at_least(1), default=10, help="passes over the training images (default: 10)")
    add("--batch-size", type=at_least(1), default=128, help="images of one step, all processes together (default: 128)")
    add("--accumulate", type=at_least(1), default=1, metavar="N", help="compute each step in N parts, to save memory")
    above_0, from_0 = number("above 0", lambda x: x > 0), number("from 0 on", lambda x: x >= 0)
    part, decay = number("from 0 to 1", lambda x: 0 <= x <= 1), number("between 0 and 1", lambda x: 0 < x < 1)
    add("--lr", type=above_0, default=0.1, help="peak learning rate (default: 0.1)")
    add("--warmup-epochs", type=from_0, default=1.0, help="epochs of warm-up (default: 1)")
    add("--weight-decay", type=from_0, default=5e-4, help="of convolutions and the classifier (default: 5e-4)")
    add("--label-smoothing", type=part, default=0.0, help="as in cross_entropy (default: 0)")
    add("--ema", type=decay, metavar="DECAY", help="evaluate and keep an average over about 1/(1 - DECAY) steps")
    add("--shift", type=at_least(0), help="pixels of random shift (default: an eighth of the height)")
    add("--seed", type=at_least(0), default=0, help="of weights, order and augmentation (default: 0)")

    add = parser.add_argument_group("how it is computed").add_argument
    add("--amp", choices=list(AMP), help="mixed precision; fp16 with loss scaling (default: float32)")
    add("--channels-last", action="store_true", help="images and weights in channels_last memory format")
    add("--compile", action="store_true", help="torch.compile the training step's network")
    add("--threads", type=at_least(1), help="CPU threads of each process")
    events = "write events to the output folder, if tensorboard is installed (default)"
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=True, help=events)
    return parser
