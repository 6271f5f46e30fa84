"""What a swap found and did, for reading and for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from deploynorm.changes import LayerReport
from deploynorm.tables import table

Outcome = Literal["absorbed", "swapped", "partly", "unchanged"]


@dataclass(frozen=True)
class SwapReport(LayerReport):
    """What a swap found and did; `print(report)` shows it as tables. `notes` concern the whole network.

    Outcomes: "absorbed" (a normalization that took its ReLU in as a TLU, or that ReLU), "swapped" (another layer now),
    "partly" (a normalization that is another layer now, beside which something stays that does not fit it: a ReLU
    behind FRN, which then learns no threshold, or a layer before MABN that is not centred) and "unchanged" (for the
    reason in `detail`).
    """

    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"notes": list(self.notes)}

    def __str__(self) -> str:
        """Layers by class and outcome; then all that stayed in whole or in part, layers of one reason in one row."""
        outcomes = Counter((change.kind, change.outcome, change.became) for change in self.changes)
        counts = [(kind, became or "-", outcome, count) for (kind, outcome, became), count in sorted(outcomes.items())]
        alike: dict[tuple[str, ...], list[str]] = {}
        for name, kind, outcome, became, detail in self.changes:
            if outcome in ("partly", "unchanged"):
                alike.setdefault((kind, became or "-", outcome, detail), []).append(name or "(the network)")
        parts = [table("Layers", ("class", "became", "outcome", "count"), counts)]
        if alike:
            rows = [
                (names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", *key)
                for key, names in alike.items()
            ]
            title = "Layers that stayed, in whole or in part, and why"
            parts.append(table(title, ("layer", "class", "became", "outcome", "why"), rows))
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(parts)
