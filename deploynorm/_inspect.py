"""What is in a model, an ONNX file or an engine, without running it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from deploynorm.errors import ModelError
from deploynorm.files import as_path
from deploynorm.onnx_file import OnnxFile
from deploynorm.run.backends import ENGINE_SUFFIXES
from deploynorm.tables import table
from deploynorm.trt.manifest import facts_of, manifest_path, read_manifest


@dataclass(frozen=True)
class Inspection:
    """Facts of a file by name, and how many layers of each class, or nodes of each operator; `print` shows them."""

    facts: Mapping[str, Any]
    counts: Mapping[str, int]

    @property
    def _kind(self) -> str:
        return "nodes" if "opsets" in self.facts else "layers"

    def to_dict(self) -> dict[str, Any]:
        return {**self.facts, self._kind: dict(self.counts)}

    def __str__(self) -> str:
        rows = []
        for name, value in self.facts.items():
            text = _text(value, whole=True)
            rows.append((name, text or "-"))
        columns = ("operator" if self._kind == "nodes" else "class", "count")
        counts = table(self._kind.capitalize(), columns, self.counts.items())
        return f"{table(str(self.facts['file']), ('', ''), rows[1:])}\n\n{counts}"


def inspect(
    path: str | Path,
    *,
    factory: str | None = None,
    factory_kwargs: Mapping[str, Any] | None = None,
    key: str | None = None,
    strip_prefix: str | None = None,
    trust_pickle: bool = False,
) -> Inspection:
    """What is in an ONNX file, an engine, or a file that `deploynorm.load` reads (with its options)."""
    path = as_path("inspect", path)
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix in ENGINE_SUFFIXES:
        return _engine(path)
    from deploynorm import checkpoint  # an ONNX file is shown where torch is not installed

    loaded = checkpoint.load(
        path,
        factory=factory,
        kwargs=factory_kwargs,
        key=key,
        strip_prefix=strip_prefix,
        trust_pickle=trust_pickle,
    )
    facts = {
        "file": str(loaded.path),
        "sha256": loaded.sha256,
        "kind": loaded.kind,
        "factory": loaded.factory,
        "network": type(loaded.model).__name__,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "input": None if loaded.image is None else loaded.image.to_dict(),
        "labels": None if loaded.labels is None else list(loaded.labels),
        "training": None if loaded.training is None else dict(loaded.training),
        "notes": list(loaded.notes),
    }
    leaves = (module for module in loaded.model.modules() if not any(module.children()))
    return Inspection(facts, dict(Counter(type(module).__name__ for module in leaves).most_common()))


def _text(value: object, *, whole: bool = False) -> str:
    """A fact as text, and what is inside another in brackets: "file: net.onnx, external_data: (file: net.data)"."""
    if isinstance(value, dict):
        inside = ", ".join(f"{key}: {_text(each)}" for key, each in value.items())
        return inside if whole else f"({inside})"
    if isinstance(value, list):
        inside = ", ".join(map(_text, value))
        return inside if whole else f"[{inside}]"
    return ("" if whole else "-") if value is None else str(value)


def _engine(path: Path) -> Inspection:
    """What the manifest beside an engine says: the engine itself is for its own TensorRT and GPU to read."""
    record = read_manifest(path)
    if record is None:
        raise ModelError(str(path), f"has no manifest {manifest_path(path).name} beside it", fix="build it again")
    facts = {"file": "", **facts_of(path, path.read_bytes())} | {"file": str(path)}  # which comes first
    layers = {f"{x['kind']} {x['dtypes']}": x["count"] for x in facts.pop("layers", [])}
    for key in ("inputs", "outputs"):
        facts[key] = {x["name"]: f"{x['dtype']} ({', '.join(map(str, x['shape']))})" for x in facts.get(key, [])}
    facts |= {key: value for key, value in record.items() if key != "engine"}
    return Inspection(facts, layers)


def _onnx(path: Path) -> Inspection:
    file = OnnxFile.read(path)
    model = file.proto
    weights: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        weights[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += math.prod(tensor.dims)
    facts = {
        "file": str(path),
        "producer": model.producer_name,
        "ir version": model.ir_version,
        "opsets": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "inputs": {value.name: _type(value) for value in model.graph.input},
        "outputs": {value.name: _type(value) for value in model.graph.output},
        "functions": [f"{function.domain}::{function.name}" for function in model.functions],
        "weights": dict(weights.most_common()),
        "external data": any(tensor.external_data for tensor in model.graph.initializer),
        "metadata": file.metadata,
        "notes": list(file.notes),
    }
    return Inspection(facts, dict(file.node_counts.most_common()))


def _type(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} ({', '.join(sizes)})"
