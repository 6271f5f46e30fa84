"""A built TensorRT engine as a value, and the manifest that stands beside its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploynorm.errors import ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.trt import Flavour
from deploynorm.trt.layers import Layer, table
from deploynorm.trt.model import Way
from deploynorm.trt.profile import Range

__all__ = ["Engine", "FrnRecord", "manifest_path", "read_manifest"]


@dataclass(frozen=True)
class FrnRecord:
    """How the FRN layers were built, and why so.

    Attributes:
        nodes: How many the graph has.
        way: Theirs; None where there are no FRN layers.
        plugin_layers: How many layers of the engine are our plugin.
        reason: Why this way.
        passes: Of each way that was built: how many layers of the engine write a tensor to memory.
        milliseconds: Of each way that was run: the median time of one inference of the opt shapes.
    """

    nodes: int
    way: Way | None
    plugin_layers: int
    reason: str
    passes: Mapping[Way, int] = field(default_factory=dict)
    milliseconds: Mapping[Way, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """An engine and what is known of it.

    Attributes:
        plan: What TensorRT reads.
        backend: Which TensorRT built it, and alone can run it.
        version: Of that.
        compute_capabilities: Of the GPUs that it runs on.
        inputs: Names, shapes (a free axis by its name) and dtypes.
        ranges: The shapes that each input may have.
        outputs: As inputs; TensorRT has no names for free axes.
        frn: See FrnRecord.
        layers: As TensorRT lists them.
        precision: Type of the convolutions and matrix products, as the engine's own layers tell it; "mixed" where it
            is not one; None where TensorRT did not tell.
        verified_products: How many of them told.
        products: How many the graph has.
        tf32: Whether float32 products may be rounded to TF32.
        hardware_compatible: The GPUs besides those that it runs on; see `build`.
        embedded: Names of the plugin libraries inside the plan.
        timing_cache: To be given to the next build; None for TensorRT-RTX, which times nothing.
    """

    plan: bytes = field(repr=False)
    backend: Flavour
    version: str
    compute_capabilities: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, Range]
    outputs: tuple[TensorSpec, ...]
    frn: FrnRecord
    layers: tuple[Layer, ...] = field(repr=False)
    precision: str | None
    verified_products: int
    products: int
    tf32: bool
    hardware_compatible: str | None = None
    embedded: tuple[str, ...] = ()
    timing_cache: bytes | None = field(default=None, repr=False)

    @property
    def passes(self) -> int:
        """How many layers write a tensor to memory: with memory-bound layers such as FRN, a measure of the work."""
        return sum(bool(layer.outputs) for layer in self.layers)

    @property
    def moves(self) -> int:
        """How many layers copy into another layout and compute nothing."""
        return sum(layer.moves_only for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All but the plan, in what JSON has."""
        return {
            "backend": self.backend,
            "version": self.version,
            "compute_capabilities": list(self.compute_capabilities),
            "hardware_compatible": self.hardware_compatible,
            "precision": self.precision,
            "verified_products": self.verified_products,
            "products": self.products,
            "tf32": self.tf32,
            "embedded_plugins": list(self.embedded),
            "inputs": [
                {"name": x.name, "dtype": x.dtype, "shape": list(x.shape)}
                | {key: list(shape) for key, shape in self.ranges[x.name]._asdict().items()}
                for x in self.inputs
            ],
            "outputs": [{"name": x.name, "dtype": x.dtype, "shape": list(x.shape)} for x in self.outputs],
            "frn": {
                "nodes": self.frn.nodes,
                "way": self.frn.way,
                "plugin_layers": self.frn.plugin_layers,
                "reason": self.frn.reason,
                "layers_that_write": dict(self.frn.passes),
                "milliseconds": dict(self.frn.milliseconds),
            },
            "layers": [{"kind": kind, "dtypes": dtypes, "count": count} for kind, dtypes, count in table(self.layers)],
        }


def manifest_path(engine: Path) -> Path:
    """model.engine.json beside model.engine."""
    return engine.with_name(engine.name + ".json")


def read_manifest(engine: Path) -> dict[str, Any] | None:
    """What the manifest beside an engine says; None where there is none.

    Raises:
        ModelError: It is not what `deploynorm build` writes.
    """
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
