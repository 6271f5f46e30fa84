"""deploynorm import."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploynorm import checkpoint


@pytest.fixture
def theirs(factories: object) -> dict[str, Tensor]:
    """The network `conv` of factories.py, with its FRN as knjcode stores it."""
    torch.manual_seed(0)
    norm = {name: torch.randn(1, 4, 1, 1) for name in ("tau", "beta", "gamma")}
    state = {**nn.Conv2d(3, 4, 3).state_dict(prefix="0."), **{f"1.{name}": value for name, value in norm.items()}}
    state["1.eps"] = torch.tensor([2e-5])
    torch.save(state, "theirs.pth")
    return state


@pytest.mark.usefixtures("ort", "theirs")
def test_export_takes_what_import_writes(deploynorm: Callable) -> None:
    shown = deploynorm("import", "theirs.pth", "--factory", "factories:conv", "-o", "model.pt", "--json", "about.json")
    assert "1      FRN2d(4)  gamma -> weight, beta -> bias, tau, eps  2e-05" in shown.out
    assert shown.out.endswith("wrote model.pt\n")
    about = json.loads(Path("about.json").read_text())
    assert (about["source"], about["factory"], about["layers"][0]["name"]) == ("knjcode", "factories:conv", "1")
    exported = ("--factory", "factories:conv", "--input-shape", "1x3x12x12")
    deploynorm("export", "model.pt", *exported)
    deploynorm("import", "theirs.pth", "--from", "mindspore")
    deploynorm("check", "theirs.imported.pt", "model.onnx", *exported)


def test_import_of_arrays(theirs: dict[str, Tensor], deploynorm: Callable) -> None:
    np.savez("theirs.npz", **{name: tensor.numpy() for name, tensor in theirs.items()})
    shown = deploynorm("import", "theirs.npz")
    assert "deploynorm export theirs.imported.pt --factory PKG.MOD:FN" in shown.out
    got = checkpoint.load("theirs.imported.pt", factory="factories:conv").model
    assert torch.equal(got.get_parameter("1.weight"), theirs["1.gamma"].reshape(-1))


REFUSED = {
    "ambiguous": (["--from", "auto"], "Fix: name yours: --from gupta-abhay or --from tattaka"),
    "unknown": (["--from", "keras"], "argument --from: invalid choice: 'keras' (choose from 'auto', 'mabn'"),
    "no layer": (["--from", "mabn"], "no FRN and no MABN layer of megvii-model/MABN"),
    "no epsilon to give": (["--from", "gupta-abhay", "--eps", "1e-5"], "store every epsilon. Got eps=1e-05"),
    "no epsilon": (["--from", "tattaka", "--eps", "-1"], "eps must be positive. Got -1.0"),
    "over itself": (["--from", "tattaka", "-o", "theirs.pth"], "output theirs.pth: is MODEL itself"),
    "no such module": (["--from", "tattaka", "--factory", "none:none"], "the factory none:none cannot be imported"),
}


@pytest.mark.parametrize(("arguments", "phrase"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments: list[str], phrase: str, theirs: dict[str, Tensor], refused: Callable) -> None:
    torch.save({**theirs, "1.eps": theirs["1.eps"].expand(1, 4, 1, 1)}, "theirs.pth")
    refused(2, phrase, "import", "theirs.pth", *arguments)
