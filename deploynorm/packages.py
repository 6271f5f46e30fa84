"""Importing what a slim installation may lack: a missing package is named with what to install."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Final

from deploynorm.errors import BackendError

__all__ = ["import_module", "missing_package"]

_PACKAGES: Final = {
    "google": "protobuf",
    "ml_dtypes": "ml_dtypes",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxscript": "onnxscript",
    "rich": "rich",
    "torch": "torch",
}
"""The packages that we import without being asked for their backend, by the names of their modules."""


def import_module(name: str) -> ModuleType:
    """A module of ours.

    Raises:
        BackendError: A package that it imports is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        raise missing from error


def missing_package(error: ModuleNotFoundError) -> BackendError | None:
    """What to install where a package that we need is not there; None where the error is another."""
    module = (error.name or "").partition(".")[0]
    if module not in _PACKAGES:
        return None
    return BackendError(
        module, "this package is needed here, and is not installed", fix=f"pip install {_PACKAGES[module]}"
    )
