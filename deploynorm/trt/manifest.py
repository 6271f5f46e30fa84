"""model.engine.json beside model.engine: what an engine was built from, with what, and what is in it."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploynorm.errors import InputError, ModelError
from deploynorm.files import sha256
from deploynorm.image import ImageSpec

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


def read_manifest(engine: Path) -> dict[str, Any] | None:
    """What the manifest beside an engine says; None where there is none. ModelError if it is damaged."""
    path = manifest_path(engine)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(str(path), f"cannot be read: {error}", fix="remove it, or build the engine again") from error
    if not isinstance(content, dict) or not isinstance(content.get("engine"), dict):
        raise ModelError(str(path), "is not a manifest of an engine", fix="remove it, or build the engine again")
    return content


def image_and_labels(engine: Path) -> tuple[ImageSpec | None, tuple[str, ...] | None]:
    """How an image becomes the engine's input, and the class names; None for what the manifest does not say."""
    content = read_manifest(engine) or {}
    image, labels = content.get("image"), content.get("labels")
    try:
        names = None if labels is None else tuple(map(str, labels))
        return None if image is None else ImageSpec.from_dict(image), names
    except (InputError, TypeError) as error:
        where, fix = str(manifest_path(engine)), "build the engine again, or remove it"
        raise ModelError(where, f"is damaged: {error}", fix=fix) from error
