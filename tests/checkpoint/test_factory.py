"""Which factories a file may name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import own

from deploynorm.checkpoint import load
from deploynorm.errors import ModelError
from deploynorm.models import frn_resnet

MODULES = {
    "train": "main Training save os.system torch",
    "data": "load ImageData read_idx",
    "frn_resnet": "conv nn.Sequential Sequence FRN2d partial gone resnet20.__globals__ __loader__ __name__",
}
HOSTILE = [
    "os:system",
    "posix:system",
    "subprocess:run",
    "hostile_nets:build",
    "torch.hub:load",
    "deploynorm:fold",
    "deploynorm.checkpoint:load",
    "deploynorm.modelsx:resnet20",
    "deploynorm.models_evil:build",
    "deploynorm.models/../evil:build",
    *(f"deploynorm.models.{module}:{name}" for module, names in MODULES.items() for name in names.split()),
    "deploynorm.models.gone:resnet20",
    "deploynorm.models..frn_resnet:resnet20",
    "deploynorm.models._private:resnet20",
    "deploynorm.models:__import__",
    "deploynorm.models.frn_resnet",
    "deploynorm.models.frn_resnet:",
    "deploynorm.models.frn_resnet:resnet20:resnet20",
    "deploynorm.models.frn_resnet:resnet20\n",
    " deploynorm.models.frn_resnet:resnet20",
    "",
    None,
    ["deploynorm.models.frn_resnet:resnet20"],
]


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_a_file_cannot_name_other_code(here: Path, monkeypatch: pytest.MonkeyPatch, name: object) -> None:
    (here / "hostile_nets.py").write_text("import os\nos.mkdir('code_ran')\n")
    monkeypatch.syspath_prepend(here)
    torch.save(own(factory=name), here / "model.pt")
    inside = isinstance(name, str) and re.match(r"deploynorm\.models([.:]|$)", name)
    with pytest.raises(ModelError, match="has no such network" if inside else r"not one of deploynorm\.models"):
        load(here / "model.pt")
    assert not (here / "code_ran").exists()
    assert "hostile_nets" not in sys.modules


@pytest.mark.parametrize("name", sorted({"resnet20", "resnet50"} & set(frn_resnet.__all__)))
def test_a_file_may_name_a_network_of_deploynorm(tmp_path: Path, name: str) -> None:
    content = own(factory=f"deploynorm.models.frn_resnet:{name}", kwargs={"num_classes": 1})
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ModelError, match="does not fit ResNet"):
        load(tmp_path / "model.pt")
