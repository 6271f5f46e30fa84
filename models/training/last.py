"""last.pt: all that a stopped run needs to continue bit-exact."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deploynorm.checkpoint._zip import whole_members
from deploynorm.errors import InputError, ModelError
from deploynorm.files import staging

__all__ = ["load_last", "save_last"]

PARTS = {"recipe", "command", "history", "epoch", "model", "optimizer", "scaler", "averaged"}


def save_last(path: Path, parts: Mapping[str, Any]) -> None:
    """Writes last.pt whole or not at all."""
    assert set(parts) == PARTS
    archive = io.BytesIO()  # torch.save's own errors do not tell of a full disk
    torch.save(dict(parts), archive)
    with staging(path) as folder:
        (folder / path.name).write_bytes(archive.getbuffer())


def load_last(path: Path, recipe: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Reads last.pt.

    Raises:
        InputError: There is none, it is damaged or of another version of this recipe, or its run had another recipe.
    """
    if not path.is_file():
        raise InputError("--resume", f"no {path}", fix="give the -o/--output of the run to continue")
    try:
        data = path.read_bytes()
        whole_members(data, str(path))  # torch compares no checksums
        parts: Any = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except ModelError as error:
        problem = f"{path} is damaged ({error.problem})"
        raise InputError("--resume", problem, got=error.got, fix="leave out --resume") from error
    except Exception as error:  # damaged files make torch raise nearly anything
        raise InputError("--resume", f"{path} is damaged ({type(error).__name__})", fix="leave out --resume") from error
    ours = isinstance(parts, dict) and set(parts) == PARTS
    if not ours or not isinstance(parts["recipe"], dict) or set(parts["recipe"]) != set(recipe):
        raise InputError("--resume", f"{path} was not written by this version of the recipe", fix="leave out --resume")
    for name, value in parts["recipe"].items():
        if value != recipe[name]:
            raise InputError(
                "--resume", f"the run in {path} had another {name}", got=str(recipe[name]), expected=str(value)
            )
    return dict(parts)
