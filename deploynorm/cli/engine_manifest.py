"""model.engine.json: what an engine was built from, with what, and what is in it."""

from __future__ import annotations

import argparse
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import onnx

import deploynorm
from deploynorm.cli.onnx_file import image_and_labels
from deploynorm.errors import InputError, ModelError
from deploynorm.files import sha256
from deploynorm.image import ImageSpec
from deploynorm.trt.engine import Engine
from deploynorm.trt.manifest import manifest_path, read_manifest

__all__ = ["image_and_labels_of_engine", "manifest"]


def manifest(arguments: argparse.Namespace, engine: Engine, file: Path) -> dict[str, Any]:
    """The record of one build.

    Args:
        arguments: Of the command line.
        engine: What was built.
        file: The engine as written.
    """
    source: Path = arguments.model
    data = source.with_name(source.name + ".data")
    image, labels = image_and_labels(source)
    return {
        deploynorm.__name__: deploynorm.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "onnx": {
            "file": source.name,
            "sha256": sha256(source),
            "external_data": {"file": data.name, "sha256": sha256(data)} if data.exists() else None,
        },
        "image": None if image is None else image.to_dict(),
        "labels": labels,
        "engine": {"file": file.name, "sha256": sha256(file), **engine.to_dict()},
        "plugin_libraries": [{"file": path.name, "sha256": sha256(path)} for path in _libraries(arguments, engine)],
        "versions": {"python": platform.python_version(), "onnx": onnx.__version__, engine.backend: engine.version},
    }


def image_and_labels_of_engine(engine: Path) -> tuple[ImageSpec | None, tuple[str, ...] | None]:
    """How an image becomes the engine's input, and its class names, where the manifest beside it tells.

    Raises:
        ModelError: The manifest is damaged.
    """
    told = read_manifest(engine) or {}
    image, labels = told.get("image"), told.get("labels")
    try:
        return None if image is None else ImageSpec.from_dict(image), None if labels is None else tuple(
            map(str, labels)
        )
    except (InputError, TypeError) as error:
        raise ModelError(
            str(manifest_path(engine)), f"is damaged: {error}", fix="build the engine again, or remove it"
        ) from error


def _libraries(arguments: argparse.Namespace, engine: Engine) -> list[Path]:
    from deploynorm.libraries import TENSORRT_LIBRARY, find_library

    if arguments.plugins is not None:
        return list(arguments.plugins)
    library = find_library(TENSORRT_LIBRARY) if engine.frn.way == "plugin" else None
    return [] if library is None else [library]
