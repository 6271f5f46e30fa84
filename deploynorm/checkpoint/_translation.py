"""What became of a state dict of another project."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from deploynorm.checkpoint._foreign_layers import TranslatedLayer, joined
from deploynorm.layers.frn import _FRN
from deploynorm.sources import SOURCES
from deploynorm.tables import table


@dataclass(frozen=True, eq=False)
class Translation:
    """A state dict for our layers, and what was done; `print` shows it.

    Attributes:
        source: Whose layers they were, by their name in `deploynorm.sources.SOURCES`.
        state_dict: For the network with our layers.
        layers: The norm layers, in the order of the file.
        dropped: The keys that were dropped: only training needs them.
        notes: What to know besides.
    """

    source: str
    state_dict: Mapping[str, Any]
    layers: tuple[TranslatedLayer, ...]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def norms(self) -> int:
        """How many of the layers are no mere thresholds."""
        return sum(layer.eps is not None for layer in self.layers)

    @property
    def epsilons(self) -> str:
        """The range of the effective epsilons, as text."""
        ranges = [layer.eps for layer in self.layers if layer.eps is not None]
        return _range(min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else ""

    def noting(self, *notes: str) -> Translation:
        return replace(self, notes=(*notes, *self.notes))

    def with_thresholds_of(self, network: nn.Module) -> Translation:
        """With each threshold that is a layer of its own inside the FRN before it, where the network has it there.

        That is, where the FRN layer of that name has a tau, and the network has none under the threshold's own name.
        """
        wanted, modules = network.state_dict().keys(), dict(network.named_modules())
        state: dict[str, Any] = dict(self.state_dict)
        layers, merged = list(self.layers), set[str]()
        for index, (frn, tlu) in enumerate(zip(self.layers, self.layers[1:], strict=False)):
            module, tau, own = modules.get(frn.name), joined(frn.name, "tau"), joined(tlu.name, "tau")
            asked = isinstance(module, _FRN) and module.tau is not None and own not in wanted
            if asked and tlu.kind == "TLU" and not frn.has_tau and frn.eps is not None and frn.channels == tlu.channels:
                state[tau] = state.pop(own)
                layers[index] = frn._replace(tensors={**frn.tensors, "tau": own})
                merged.add(tlu.name)
        if not merged:
            return self
        kept = tuple(layer for layer in layers if not (layer.kind == "TLU" and layer.name in merged))
        note = f"{len(merged)} thresholds went into the FRN before them, where the network has them"
        return replace(self, state_dict=OrderedDict(state), layers=kept, notes=(*self.notes, note))

    def __str__(self) -> str:
        rows = [
            (layer.name or "(itself)", f"{layer.kind}({layer.channels})", _moved(layer), _range(*layer.eps or (0, 0)))
            for layer in self.layers
        ]
        title = f"Layers of {SOURCES[self.source].project}"
        lines = [table(title, ("layer", "is for", "tensors", "epsilon"), rows)]
        if self.dropped:
            kinds = dict.fromkeys(key.replace("/", ".").rpartition(".")[2] for key in self.dropped)
            lines.append(f"dropped: {', '.join(kinds)} of {self.norms} layers, which only training needs")
        if any(layer.kind == "TLU" for layer in self.layers):
            lines.append("note: thresholds are layers of their own, TLU; FRN is built with tlu=False")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """What was done, for JSON."""
        layers = [{**layer._asdict(), "tensors": dict(layer.tensors)} for layer in self.layers]
        return {"source": self.source, "layers": layers, "dropped": list(self.dropped), "notes": list(self.notes)}


def _moved(layer: TranslatedLayer) -> str:
    """As in "gamma -> weight, beta -> bias, tau"."""
    named = [(theirs, ours) for ours, theirs in layer.tensors.items() if theirs]
    return ", ".join(ours if theirs == ours else f"{theirs} -> {ours}" for theirs, ours in named)


def _range(low: float, high: float) -> str:
    if not high:
        return "-"
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
