"""model.deploynorm.json: what a file was made from, with what, and how it was checked."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import deploynorm
from deploynorm._export import Exported
from deploynorm.files import sha256
from deploynorm.inputs import sizes_to_dict
from deploynorm.network import Network

__all__ = ["manifest"]

_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


def manifest(source: Network, exported: Exported, onnx_file: Path | None, function: bool, seed: int) -> dict[str, Any]:
    """The record of one export, less its fold and its checks; `onnx_file` is None for a model that was not written."""
    file = source.checkpoint
    installed = {package: list(distributions(name=package)) for package in _PACKAGES}
    return {
        "deploynorm": deploynorm.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": {"class": f"{type(source.model).__module__}.{type(source.model).__qualname__}"}
        if file is None
        else {"file": file.path.name, "sha256": file.sha256, "kind": file.kind, "factory": file.factory},
        "onnx": {
            **_files(onnx_file),
            "opset": exported.opset,
            "lowering": exported.lowering,
            "dtype": exported.dtype,
            "kept_float32": list(exported.kept_float32),
            "keep_io_types": exported.keep_io_types,
            "function": function,
            "inputs": [{"name": x.name, "shape": list(x.shape), "dtype": x.dtype} for x in exported.inputs],
            "outputs": list(exported.output_names),
            "nodes": dict(exported.node_counts()),
            "sizes": sizes_to_dict(exported.inputs, exported.notes),
            "notes": list(exported.notes),
        },
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            **{package: found[0].version for package, found in installed.items() if found},
        },
    }


def _files(onnx_file: Path | None) -> dict[str, Any]:
    if onnx_file is None:
        return {}
    data = onnx_file.with_name(onnx_file.name + ".data")
    return {
        "file": onnx_file.name,
        "sha256": sha256(onnx_file),
        "external_data": {"file": data.name, "sha256": sha256(data)} if data.exists() else None,
    }
