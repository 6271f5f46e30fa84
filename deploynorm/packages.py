"""Importing what a slim installation may lack: a missing package is named with what to install."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from deploynorm.errors import BackendError

_PACKAGES: Final = {
    **{name: name for name in ("ml_dtypes", "numpy", "onnx", "onnxscript", "rich", "torch")},
    "google": "protobuf",
    "onnx_ir": "onnx-ir",
}
"""The packages that we import without being asked for their backend, by the names of their modules."""


@contextmanager
def naming_missing_packages() -> Iterator[None]:
    """Raises BackendError, with what to install, for a package that an import inside the block does not find."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _PACKAGES:
            raise
        fix = f"pip install {_PACKAGES[module]}"
        raise BackendError(module, "this package is needed here, and is not installed", fix=fix) from error


def load(path: str) -> Any:
    """A function or class of ours, `module.name`; BackendError where a package that the module imports is missing."""
    module, _, name = path.rpartition(".")
    with naming_missing_packages():
        return getattr(importlib.import_module(module), name)
