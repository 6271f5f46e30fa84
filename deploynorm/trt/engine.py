"""A built TensorRT engine as a value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import deploynorm
from deploynorm.files import as_path, is_stream, sha256, staging
from deploynorm.inputs import TensorSpec, shape_text
from deploynorm.tables import table
from deploynorm.trt.importing import Flavour
from deploynorm.trt.layers import Layer, layer_counts
from deploynorm.trt.manifest import manifest_path
from deploynorm.trt.settings import Profile, Way


@dataclass(frozen=True)
class FrnRecord:
    """How the FRN layers were built, and why so."""

    nodes: int  # how many the graph has
    way: Way | None  # theirs; None where there are no FRN layers
    plugin_layers: int  # how many layers of each profile are our plugin
    reason: str  # why this way
    passes: Mapping[Way, int] = field(default_factory=dict)
    """Of each way that was built: how many layers of the engine write a tensor to memory."""
    milliseconds: Mapping[Way, float] = field(default_factory=dict)
    """Of each way that was run: the median time of one inference of the opt shapes."""


@dataclass(frozen=True)
class Engine:
    """An engine and what is known of it; `print` shows what `deploynorm build` shows.

    Attributes:
        plan: What TensorRT reads.
        backend: Which TensorRT built it, and can run it.
        version: Of that.
        compute_capabilities: Of the GPUs that it runs on.
        inputs: Names, shapes (a dynamic axis by its name) and dtypes.
        profiles: The shapes that each input may have, by optimization profile; all of one call are of one profile.
        outputs: As inputs; TensorRT has no names for dynamic axes.
        frn: See FrnRecord.
        layers: As TensorRT lists them, for one profile after the other.
        precision: Type of the convolutions and matrix products, as the engine's own layers say: int8 or float8 of
            quantized ones; "mixed" where it is not one; None where TensorRT did not say.
        verified_products: How many of them were found in the layers.
        products: How many the graph has.
        tf32: Whether float32 products may be rounded to TF32.
        hardware_compatible: The GPUs besides those that it runs on; see `build`.
        version_compatible: Whether later versions of TensorRT run it, and its lean and dispatch runtimes.
        embedded: Names of the plugin libraries inside the plan.
        timing_cache: To be given to the next build; None for TensorRT-RTX, which times nothing.
        notes: What the build had to say.
        origin: What it was built from; see deploynorm.trt.manifest.origin.
        sources: The files that it was built from, which no engine is to overwrite.
    """

    plan: bytes = field(repr=False)
    backend: Flavour
    version: str
    compute_capabilities: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    outputs: tuple[TensorSpec, ...]
    frn: FrnRecord
    layers: tuple[Layer, ...] = field(repr=False)
    precision: str | None
    verified_products: int
    products: int
    tf32: bool
    hardware_compatible: str | None = None
    version_compatible: bool = False
    embedded: tuple[str, ...] = ()
    timing_cache: bytes | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict, repr=False)
    sources: tuple[Path, ...] = ()

    @property
    def passes(self) -> int:
        """How many layers write a tensor to memory: with memory-bound layers such as FRN, a measure of the work."""
        return sum(bool(layer.outputs) for layer in self.layers)

    @property
    def moves(self) -> int:
        """How many layers copy into another layout and compute nothing."""
        return sum(layer.moves_only for layer in self.layers)

    def __str__(self) -> str:
        return self.tables()

    def tables(self, verbose: bool = False) -> str:
        """What the engine is for, its shapes, and its layers by kind; if verbose, each layer too."""
        shapes = [
            (str(number), x.name, x.dtype, *map(shape_text, (x.shape, *ranges[x.name])))
            for number, ranges in enumerate(self.profiles)
            for x in self.inputs
        ]
        parts = [
            table("Engine", ("", ""), self._facts()),
            table("Shapes", ("profile", "input", "type", "in the graph", "min", "opt", "max"), shapes),
            table("Layers", ("kind", "types", "count"), layer_counts(self.layers)),
        ]
        if verbose:
            columns = ("layer", "kind", "types", "computes")
            each = ((x.name, x.kind, ", ".join(x.dtypes) or "-", ", ".join(x.nodes) or "-") for x in self.layers)
            parts.append(table("Each layer", columns, each))
        return "\n\n".join(parts)

    def _facts(self) -> list[tuple[str, str]]:
        precision = self.precision or "not reported by TensorRT"
        if self.precision is not None:
            precision += f" ({self.verified_products} of {self.products} products checked)"
        later = " and later" if self.version_compatible else ""
        rows = [
            ("for", f"{self.backend} {self.version}{later}, compute capability {', '.join(self.compute_capabilities)}"),
            ("type", precision + (", with TF32" if self.tf32 and self.precision == "float32" else "")),
            ("size", f"{len(self.plan) / 2**20:.1f} MiB"),
        ]
        if self.frn.way is not None:
            rows += [("FRN", f"{self.frn.nodes} layers, {self.frn.way}"), ("why", self.frn.reason)]
        if self.embedded:
            rows.append(("plugins inside", ", ".join(self.embedded)))
        return [*rows, *(("note", note) for note in self.notes)]

    def save(self, path: Path | str, *, timing_cache: Path | str | None = None) -> dict[str, Any]:
        """Writes the engine and its manifest beside it, both or none; then the timing cache. Returns the manifest.

        Args:
            path: The engine's file; its manifest is `<path>.json`. A pipe or device gets the engine alone.
            timing_cache: The file of the cache. Nothing is written for an engine without one.

        Raises:
            InputError: The path is that of the ONNX file or its weights, or cannot be written to.
        """
        path = as_path("save", path)
        with staging(path, inputs=self.sources, companions=[manifest_path(path)]) as folder:
            written = folder / path.name
            written.write_bytes(self.plan)
            record = {
                deploynorm.__name__: deploynorm.__version__,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                **self.origin,
                "engine": {"file": path.name, "sha256": sha256(written), **self.to_dict()},
                "versions": {**self.origin.get("versions", {}), self.backend: self.version},
            }
            if not is_stream(path):
                manifest_path(written).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if timing_cache is not None and self.timing_cache is not None:
            with staging(Path(timing_cache), inputs=self.sources) as folder:
                (folder / Path(timing_cache).name).write_bytes(self.timing_cache)
        return record

    def to_dict(self) -> dict[str, Any]:
        """All but the plan, in what JSON has."""
        return {
            "backend": self.backend,
            "version": self.version,
            "compute_capabilities": list(self.compute_capabilities),
            "hardware_compatible": self.hardware_compatible,
            "version_compatible": self.version_compatible,
            "precision": self.precision,
            "verified_products": self.verified_products,
            "products": self.products,
            "tf32": self.tf32,
            "embedded_plugins": list(self.embedded),
            "notes": list(self.notes),
            "inputs": [{"name": x.name, "dtype": x.dtype, "shape": list(x.shape)} for x in self.inputs],
            "profiles": [
                {name: {key: list(shape) for key, shape in each._asdict().items()} for name, each in ranges.items()}
                for ranges in self.profiles
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
            "layers": [
                {"kind": kind, "dtypes": dtypes, "count": count} for kind, dtypes, count in layer_counts(self.layers)
            ],
        }
