"""Files that the checkpoint tests read, and places to put them."""

from __future__ import annotations

import io
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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory that is not on sys.path."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
