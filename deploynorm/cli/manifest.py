"""model.deploynorm.json: what a file was made from, with what, and how it was checked."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import deploynorm
from deploynorm._export import Exported
from deploynorm.checkpoint import Checkpoint
from deploynorm.files import sha256

__all__ = ["manifest"]

_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


def manifest(arguments: argparse.Namespace, source: Checkpoint, exported: Exported, onnx_file: Path) -> dict[str, Any]:
    """The record of one export, less its fold and its checks.

    Args:
        arguments: Of the command line.
        source: What was exported.
        exported: The model as exported.
        onnx_file: The file as written, with its external data beside it.
    """
    data = onnx_file.with_name(onnx_file.name + ".data")
    return {
        "deploynorm": deploynorm.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": {
            "file": source.path.name,
            "sha256": source.sha256,
            "kind": source.kind,
            "factory": source.factory,
        },
        "onnx": {
            "file": onnx_file.name,
            "sha256": sha256(onnx_file),
            "external_data": {"file": data.name, "sha256": sha256(data)} if data.exists() else None,
            "opset": exported.opset,
            "lowering": exported.lowering,
            "dtype": exported.dtype,
            "kept_float32": list(exported.kept_float32),
            "keep_io_types": exported.keep_io_types,
            "function": not arguments.no_function,
            "inputs": [{"name": x.name, "shape": list(x.shape), "dtype": x.dtype} for x in exported.inputs],
            "outputs": list(exported.output_names),
            "nodes": dict(exported.node_counts()),
            "notes": list(exported.notes),
        },
        "seed": arguments.seed,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
