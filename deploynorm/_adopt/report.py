"""What adopting found and did, for reading and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from deploynorm.changes import Change, LayerReport
from deploynorm.tables import table


@dataclass(frozen=True)
class AdoptReport(LayerReport):
    """What `deploynorm.adopt` found and did; `print(report)` shows it as tables.

    Outcomes: "adopted" (`became` is ours) and "left" (FRN or MABN all the same, for the reason in `detail`). A layer
    that computes something else has no entry.
    """

    def __str__(self) -> str:
        """Layers by class and outcome; then each that was left, with the reason."""
        counts = Counter((change.kind, change.outcome, change.became) for change in self.changes)
        if not counts:
            return "Layers: none of another project that computes FRN or MABN"
        rows = [(kind, became or "-", outcome, count) for (kind, outcome, became), count in sorted(counts.items())]
        parts = [table("Layers", ("class", "became", "outcome", "count"), rows)]
        told = [(x.name or "(the network)", x.kind, x.outcome, x.detail) for x in self.changes if x.detail]
        if told:
            parts.append(table("What to know of them", ("layer", "class", "outcome", "detail"), told))
        return "\n\n".join(parts)


def adopted_notes(changes: Iterable[Change]) -> Iterator[str]:
    """A line for a user on the layers that were adopted by the way; none for none."""
    counts = Counter((change.kind, change.became) for change in changes if change.outcome == "adopted")
    if counts:
        what = ", ".join(f"{count} {kind} as {became}" for (kind, became), count in counts.items())
        yield f"layers of other projects became ours: {what}"


class AdoptResult(NamedTuple):
    """The network with our layers, on the device and in the mode of the one given, and the report."""

    model: nn.Module
    report: AdoptReport
