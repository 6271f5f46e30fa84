"""Short runs of the training recipe."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import EXACT
from torch import Tensor, nn

from deploynorm.layers import MABN2d
from deploynorm.models import data, frn_resnet, mabn_resnet, train

FILES = ["last.pt", "log.csv", "model.pt"]
"""The files that a run writes besides its curve and TensorBoard's folder."""


def run(norm: str, output: Path, *arguments: str) -> int:
    """Trains on the digits and returns the exit code."""
    common = ["--norm", norm, "--data", "digits", "--threads", "1", "--batch-size", "32", "--no-tensorboard"]
    return train.main([*common, "-o", str(output), *arguments])


def few_digits(patch: pytest.MonkeyPatch, train_images: int = 96, test_images: int = 20) -> None:
    """Reduces the digits to 3 steps of 32 images per epoch."""
    digits, load = data.load_digits(), data.load
    few = digits._replace(
        train_images=digits.train_images[:train_images],
        train_classes=digits.train_classes[:train_images],
        test_images=digits.test_images[:test_images],
        test_classes=digits.test_classes[:test_images],
    )
    patch.setattr(data, "load", lambda source: few if source == "digits" else load(source))


def short_runs(patch: pytest.MonkeyPatch) -> None:
    """Reduces runs to a few digits and steps, and networks to two stages of one block; leaves out the figure.

    In so few steps MABN's moving averages and its factor r would not be active yet, so they begin at once.
    """
    few_digits(patch)
    for module in (frn_resnet, mabn_resnet):

        class Shallow(module.ResNet):
            def __init__(self, block: type[nn.Module], depths: object, *rest: object) -> None:
                super().__init__(block, (1, 1), *rest)

        patch.setattr(module, "ResNet", Shallow)
    patch.setattr(mabn_resnet, "MABN2d", partial(MABN2d, warmup=1, renorm_start=3))
    patch.setattr(train, "draw_curve", lambda *_: None)  # takes as long as the rest of a run


@contextmanager
def in_float64() -> Iterator[None]:
    """For runs that are compared: at their learning rate a few steps amplify a difference in the last bit."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def during_step(patch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Calls action in the middle of that step of the run, counted from 1."""
    step, calls = train.Training.step, []

    def counted(self: train.Training, images: Tensor, classes: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == number:
            action()
        return step(self, images, classes)

    patch.setattr(train.Training, "step", counted)


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def timeless_log(folder: Path) -> list[dict[str, str]]:
    """The columns of the log that must be equal in every run."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in read_log(folder)]


def assert_same_run(got: Path, want: Path) -> None:
    """Compares weights and statistics, the averages of --ema, the states of optimiser and loss scaler, and the log."""
    for name in ("model.pt", "last.pt"):
        got_parts, want_parts = load(got / name), load(want / name)
        for part in ("state_dict", "model", "averaged", "scaler", "epoch"):
            torch.testing.assert_close(got_parts.get(part), want_parts.get(part), **EXACT.kwargs())
    momenta = [load(folder / "last.pt")["optimizer"]["state"] for folder in (got, want)]
    torch.testing.assert_close(*momenta, **EXACT.kwargs())
    assert load(got / "model.pt")["training"]["accuracy"] == load(want / "model.pt")["training"]["accuracy"]
    assert timeless_log(got) == timeless_log(want)
