"""What the tests of the command line share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rtx_builds import Outcome

from deploynorm import checkpoint
from deploynorm.cli import main
from deploynorm.image import ImageSpec
from deploynorm.models import frn_resnet, mabn_resnet

LABELS = ("bag", "boot", "coat")
IMAGE = ImageSpec((1, 12, 12), (0.5,), (0.25,))

Call = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ort(require: Callable[[str], None]) -> None:
    require("ort")


@pytest.fixture
def native(require: Callable[[str], None]) -> None:
    require("native")


@pytest.fixture
def deploynorm(capsys: pytest.CaptureFixture[str]) -> Call:
    """deploynorm(*arguments, code=0): calls the command line in this process, which must end with that exit code."""

    def call(*arguments: object, code: int = 0) -> Outcome:
        try:
            got = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own refusals
            got = int(stop.code or 0)
        outcome = Outcome(got, *capsys.readouterr())
        assert outcome.code == code, outcome.out + outcome.err
        assert ("Traceback" in outcome.err) == (code == 70)
        return outcome

    return call


@pytest.fixture
def refused(deploynorm: Call, tmp_path: Path) -> Call:
    """refused(code, phrase, *arguments): the command must end so, with that phrase, and leave every file as it was."""

    def contents() -> dict[Path, bytes]:
        files = (path for path in tmp_path.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path: path.read_bytes() for path in files}

    def call(code: int, phrase: str, *arguments: object, call: Call = deploynorm) -> Outcome:
        before = contents()
        result = call(*arguments, code=code)
        assert phrase in result.err
        assert contents() == before
        return result

    return call


@pytest.fixture(scope="session")
def exports() -> dict[tuple[str, ...], tuple[Outcome, dict[str, bytes]]]:
    """What `export` printed and wrote, by model and options."""
    return {}


@pytest.fixture
def export(ort: None, deploynorm: Call, exports: dict[tuple[str, ...], tuple[Outcome, dict[str, bytes]]]) -> Call:
    """export(model, *options): `deploynorm export` of a model of this page, run once and then put beside it."""

    def call(model: Path, *options: object) -> Outcome:
        key = (model.name, *map(str, options))
        if key not in exports:
            before = set(model.parent.iterdir())
            outcome = deploynorm("export", model, *options)
            exports[key] = outcome, {path.name: path.read_bytes() for path in set(model.parent.iterdir()) - before}
        outcome, files = exports[key]
        for name, content in files.items():
            model.with_name(name).write_bytes(content)
        return outcome

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
    name = f"deploynorm.models.{module}:resnet20"
    checkpoint.save(path, factory=name, kwargs=kwargs, model=network, image=IMAGE, labels=LABELS)
    return path


FACTORIES = """
import torch
from torch import nn
from deploynorm.layers import CenConv2d, FRN2d, MABN2d

def conv(channels=4):
    return nn.Sequential(nn.Conv2d(3, channels, 3), FRN2d(channels))

def folds():
    return nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), FRN2d(4))

def half_folds():
    return folds().half()

def unet():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.norm = nn.Conv2d(3, 4, 3, stride=2, padding=1), FRN2d(4)
            self.up, self.head = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.head(torch.cat([x, self.up(self.norm(self.down(x)))], 1))
    return UNet()

def branching():
    class Branching(nn.Conv2d):
        def forward(self, x):
            y = super().forward(x)
            return y if y.sum() > 0 else -y
    return Branching(1, 1, 1)
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of factories that the user would type, in the folder of the test."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "factories", raising=False)  # that of another test's folder
    return importlib.import_module("factories")


@pytest.fixture
def small(factories: ModuleType) -> Callable[..., tuple[str, ...]]:
    """small("conv"): weights of a network of that factory, by default a new one, and the arguments that read them."""

    def write(factory: str, network: torch.nn.Module | None = None, *, shape: str = "1x3x12x12") -> tuple[str, ...]:
        torch.manual_seed(0)
        torch.save((network or getattr(factories, factory)()).state_dict(), "weights.pt")
        return ("weights.pt", "--factory", f"factories:{factory}", "--input-shape", shape)

    return write
