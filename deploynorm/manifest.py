"""The manifest beside an ONNX file, model.deploynorm.json: whether it was written for the file as it is now."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from deploynorm.errors import ModelError
from deploynorm.files import onnx_companions, sha256


def check_unchanged(path: Path, *, accept: bool = False) -> None:
    """Compares an ONNX file, and its external data, with the SHA-256 in the manifest, where one lies beside.

    Args:
        path: The file.
        accept: Warn of a difference, and go on.

    Raises:
        ModelError: They differ, or the manifest cannot be read.
    """
    _, manifest = onnx_companions(path)
    if not os.path.lexists(manifest):
        return
    try:
        for file, expected in _hashes(manifest, path).items():
            got = sha256(file) if file.is_file() else "no such file"
            if got != expected:
                problem = f"is not the file that {manifest.name} was written for"
                fix = "export it again, or pass --accept-changed if it was changed on purpose, as by another tool"
                raise ModelError(str(file), problem, got=f"SHA-256 {got}", expected=expected, fix=fix)
    except ModelError as error:
        if not accept:
            raise
        found = "" if error.got is None else f": {error.got}, not {error.expected}"
        warnings.warn(f"{error.where} {error.problem}{found}; taken as it is", stacklevel=3)


def _hashes(manifest: Path, path: Path) -> dict[Path, str]:
    """The files that the manifest has hashes of; the ONNX file may have another name now."""
    try:
        if not manifest.is_file():
            raise OSError("it is no file")
        content: Any = json.loads(manifest.read_text(encoding="utf-8"))
        onnx = content["onnx"]
        hashes, data = {path: onnx["sha256"]}, onnx["external_data"]
        weights, _ = onnx_companions(path)
        if data is None and weights.exists():
            raise ValueError(f"it has no hash of {weights.name}")
        if data is not None:
            hashes[path.with_name(data["file"])] = data["sha256"]  # with_name refuses what is not beside it
        if all(isinstance(value, str) for value in hashes.values()):
            return hashes
        raise TypeError("a hash that is no text")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"cannot be read as a manifest: {type(error).__name__}: {error}"
        fix = "export the network again, or remove it if you know that the file beside it is whole"
        raise ModelError(str(manifest), problem, fix=fix) from error
