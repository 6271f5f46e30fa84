"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from deploynorm import checkpoint
from deploynorm.cli import main
from deploynorm.image import ImageSpec
from deploynorm.models import frn_resnet, mabn_resnet

LABELS = ("bag", "boot", "coat")
IMAGE = ImageSpec((1, 12, 12), (0.5,), (0.25,))


class Outcome(NamedTuple):
    """Of one call of the command line."""

    code: int
    out: str
    err: str


@pytest.fixture
def deploynorm(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Calls the command line in this process."""

    def call(*arguments: object) -> Outcome:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own refusals
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def exports() -> dict[tuple[str, ...], dict[str, bytes]]:
    """What `export` wrote, by model and options."""
    return {}


@pytest.fixture
def exported(
    deploynorm: Callable[..., Outcome], exports: dict[tuple[str, ...], dict[str, bytes]]
) -> Callable[..., Path]:
    """exported(model, *options): the ONNX file of a model of this page, exported once and then put beside it."""

    def call(model: Path, *options: object) -> Path:
        key = (model.name, *map(str, options))
        if key not in exports:
            before = set(model.parent.iterdir())
            result = deploynorm("export", model, *options)
            assert result.code == 0, result.err
            exports[key] = {path.name: path.read_bytes() for path in set(model.parent.iterdir()) - before}
        for name, content in exports[key].items():
            model.with_name(name).write_bytes(content)
        return model.with_suffix(".onnx")

    return call


@pytest.fixture
def frn_pt(tmp_path: Path) -> Path:
    """A small FRN network in our own format, of random weights, that names its input and labels."""
    return _checkpoint(tmp_path / "frn.pt", "frn_resnet", frn_resnet.resnet20)


@pytest.fixture
def mabn_pt(tmp_path: Path) -> Path:
    """A small MABN network with CenConv, whose statistics are not the initial ones."""
    return _checkpoint(tmp_path / "mabn.pt", "mabn_resnet", mabn_resnet.resnet20)


def _checkpoint(path: Path, module: str, factory: Callable[..., torch.nn.Module]) -> Path:
    torch.manual_seed(0)
    kwargs = {"num_classes": len(LABELS), "in_channels": 1}
    network = factory(**kwargs)
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    checkpoint.save(
        path,
        factory=f"deploynorm.models.{module}:resnet20",
        kwargs=kwargs,
        model=network,
        image=IMAGE,
        labels=LABELS,
    )
    return path
