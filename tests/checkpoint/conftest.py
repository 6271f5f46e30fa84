"""Files that the checkpoint tests read, and places to put them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from deploynorm.layers import FRN2d


@pytest.fixture(scope="session")
def traced() -> nn.Module:
    """The network in the archive of `pt2`."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), FRN2d(4, tlu=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    ).eval()


@pytest.fixture(scope="session")
def pt2(traced: nn.Module) -> bytes:
    """A torch.export archive with free batch and spatial sizes."""
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(traced, (torch.ones(2, 3, 16, 20),), dynamic_shapes=(free,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


Rewrite = Callable[[bytes, Callable[[str, bytes], bytes | None], dict[str, bytes]], bytes]


@pytest.fixture(scope="session")
def rewrite() -> Rewrite:
    """rewrite(archive, change, add): a zip archive with each member changed (None drops it), and some added."""

    def rewrite(archive: bytes, change: Callable[[str, bytes], bytes | None], add: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
            root = old.namelist()[0].partition("/")[0]
            for member in old.namelist():
                content = change(member.partition("/")[2], old.read(member))
                if content is not None:
                    new.writestr(member, content)
            for name, content in add.items():
                new.writestr(f"{root}/{name}", content)
        return buffer.getvalue()

    return rewrite


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory that is not on sys.path."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
