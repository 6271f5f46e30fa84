"""What a fold found and did, for reading and for programs."""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

from torch import nn

from deploynorm.changes import LayerReport
from deploynorm.tables import table

Outcome = Literal["folded", "affine", "not foldable", "adopted"]

_COLUMNS: dict[Outcome, str] = {
    "folded": "folded",
    "affine": "kept as affine",
    "not foldable": "not foldable",
    "adopted": "ours now",
}


class FoldReport(LayerReport):
    """What a fold found and did; `print(report)` shows it as tables.

    Layers that are found without an entry in `changes` have nothing to fold: FRN with a constant epsilon, and TLU.
    Outcomes: "folded" (gone, or with its constants computed), "affine" (kept as a per-channel affine, in the form of a
    BatchNorm layer of mean zero), "not foldable" (unchanged, for the reason in `detail`) and "adopted" (a layer of
    another project that is one of ours now, with nothing to fold).
    """

    @property
    def modified(self) -> bool:
        """Whether the folded network differs from the one given."""
        return any(change.outcome != "not foldable" for change in self.changes)

    @property
    def left(self) -> bool:
        """Whether a layer did not fold."""
        return any(change.outcome != "folded" for change in self.changes)

    def tables(self, verbose: bool = False) -> str:
        """Layers by class and outcome; then each layer that did not fold, with the reason; with `verbose` every one."""
        rows = []
        outcome_of = [x for x in _COLUMNS if x != "adopted" or self.with_outcome(x)]
        for kind, found in sorted(self.found.items()):
            outcomes = Counter(change.outcome for change in self.changes if change.kind == kind)
            counts = (*(outcomes[outcome] for outcome in outcome_of), found - outcomes.total())
            rows.append((kind, found, *(count or "-" for count in counts)))
        if not rows:
            archive = "an archive (.pt2) has none, and its operators fold in the export"
            return f"Layers: none that can be folded or adopted; {archive}"
        columns = ("layer", "found", *(_COLUMNS[outcome] for outcome in outcome_of), "unchanged")
        parts = [table("Layers", columns, rows)]
        done = ("folded", "adopted")
        shown = self.changes if verbose else [change for change in self.changes if change.outcome not in done]
        if shown:
            title = "Each layer" if verbose else "Layers that did not fold, and why"
            each = ((change.name or "(the network)", change.kind, change.outcome, change.detail) for change in shown)
            parts.append(table(title, ("layer", "class", "outcome", "detail"), each))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.tables()


class FoldResult(NamedTuple):
    """The folded network, in evaluation mode on the CPU, and the report."""

    model: nn.Module
    report: FoldReport
