"""model.engine.json beside model.engine: what an engine was built from, with what, and what is in it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from deploynorm.errors import InputError, ModelError
from deploynorm.files import sha256
from deploynorm.image import ImageSpec, as_labels

if TYPE_CHECKING:
    from deploynorm.onnx_file import OnnxFile


def origin(source: OnnxFile, plugins: Sequence[Path]) -> dict[str, Any]:
    """What the manifest says of the model and of the plugin libraries that an engine is built with."""
    import onnx

    image, labels = source.image_and_labels
    return {
        "onnx": _onnx(*source.files) if source.files else None,
        "image": None if image is None else image.to_dict(),
        "labels": None if labels is None else list(labels),
        "plugin_libraries": [{"file": path.name, "sha256": sha256(path)} for path in plugins],
        "versions": {"python": platform.python_version(), "onnx": onnx.__version__},
    }


def _onnx(path: Path, *data: Path) -> dict[str, Any]:
    external = [{"file": part.name, "sha256": sha256(part)} for part in data]
    return {"file": path.name, "sha256": sha256(path), "external_data": external[0] if external else None}


def manifest_path(engine: Path) -> Path:
    return engine.with_name(engine.name + ".json")


_TEXT_OR_NONE: Final = (str, type(None))
_TENSOR: Final = {"name": str, "dtype": str, "shape": [(int, str)]}
_ENGINE: Final = {
    "file": str,
    "sha256": str,
    "backend": str,
    "version": str,
    "compute_capabilities": [str],
    "hardware_compatible": _TEXT_OR_NONE,
    "version_compatible": bool,
    "precision": _TEXT_OR_NONE,
    "embedded_plugins": [str],
    "inputs": [_TENSOR],
    "outputs": [_TENSOR],
    "frn": {"way": _TEXT_OR_NONE},
    "layers": [{"kind": str, "dtypes": str, "count": int}],
}
"""The form of what `Engine.to_dict` writes, as far as anything here reads it. At the top a key may be missing."""


def read_manifest(engine: Path) -> dict[str, Any] | None:
    """What the manifest beside an engine says; None where there is none. ModelError if it is damaged."""
    path = manifest_path(engine)
    where, fix = str(path), "remove it, or build the engine again"
    if path.exists() and not path.is_file():
        raise ModelError(where, "is not a regular file", fix=fix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(where, f"cannot be read: {error}", fix=fix) from error
    if not isinstance(content, dict) or not isinstance(content.get("engine"), dict):
        raise ModelError(where, "is not a manifest of an engine", fix=fix)
    for key, form in _ENGINE.items():
        if key in content["engine"] and (wrong := _misfit(content["engine"][key], form, key)) is not None:
            raise ModelError(where, f"is damaged: {wrong} of the engine is none", fix=fix)
    return content


def _misfit(value: object, form: Any, name: str) -> str | None:
    """Name of the first part of the value that has not its form; None where all have."""
    if isinstance(form, list) and isinstance(value, list):
        parts = [(item, form[0], f"{name}[{at}]") for at, item in enumerate(value)]
    elif isinstance(form, dict) and isinstance(value, dict):
        parts = [(value.get(key), each, f"{name}.{key}") for key, each in form.items()]
    else:
        fits = (
            not isinstance(form, list | dict) and isinstance(value, form) and isinstance(value, bool) == (form is bool)
        )
        return None if fits else name
    return next((wrong for part in parts if (wrong := _misfit(*part)) is not None), None)


def facts_of(engine: Path, plan: bytes) -> dict[str, Any]:
    """What the manifest beside an engine says of it, as `Engine.to_dict` wrote it; empty where there is no manifest.

    ModelError if it is damaged, or names another SHA-256 than the plan has: one of the two was replaced.
    """
    facts: dict[str, Any] = (read_manifest(engine) or {}).get("engine", {})
    expected, got = facts.get("sha256"), hashlib.sha256(plan).hexdigest()
    if expected not in (None, got):
        fix = "build the engine again, or remove the manifest if the file is the one that you mean"
        problem = f"is not the file that {manifest_path(engine).name} was written for"
        raise ModelError(str(engine), problem, got=f"SHA-256 {got}", expected=expected, fix=fix)
    return facts


def image_and_labels(engine: Path) -> tuple[ImageSpec | None, tuple[str, ...] | None]:
    """How an image becomes the engine's input, and the class names; None for what the manifest does not say."""
    content = read_manifest(engine) or {}
    image, labels = content.get("image"), content.get("labels")
    try:
        return None if image is None else ImageSpec.from_dict(image), as_labels(labels)
    except InputError as error:
        where, fix = str(manifest_path(engine)), "build the engine again, or remove it"
        raise ModelError(where, f"is damaged: {error}", fix=fix) from error
