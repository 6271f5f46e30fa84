"""What a swap found and did, for reading and for programs."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

__all__ = ["Change", "Outcome", "SwapReport"]

Outcome = Literal["absorbed", "swapped", "partly", "left"]


class Change(NamedTuple):
    """What became of one layer.

    Attributes:
        layer: Its path in the network; "" is the network itself.
        kind: Its class before the swap.
        outcome: "absorbed" (a normalization that took its ReLU in as a TLU, or that ReLU), "swapped" (another layer
            now), "partly" (a normalization that is another layer now, beside which something stays that does not go
            with it: a ReLU behind FRN, which learns no threshold, or a layer before MABN that is not centred), or
            "left" (as it was).
        became: What stands there now; "" where the layer was left.
        detail: What goes with it, or the reason.
    """

    layer: str
    kind: str
    outcome: Outcome
    became: str
    detail: str


@dataclass(frozen=True)
class SwapReport:
    """What a swap found and did.

    Attributes:
        found: How many layers of each class that matters here the network has.
        changes: One entry for each of these layers, in the network's order.
        notes: What concerns the whole network.
    """

    found: Counter[str]
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()

    def with_outcome(self, outcome: Outcome) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.outcome == outcome)

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "found": dict(self.found),
            "changes": [change._asdict() for change in self.changes],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Tables of the layers by class and outcome, and of all that stayed, with the reason; like ones share a row."""
        outcomes = Counter((change.kind, change.outcome, change.became) for change in self.changes)
        counts = [
            (kind, became or "-", outcome, str(count)) for (kind, outcome, became), count in sorted(outcomes.items())
        ]
        alike: dict[tuple[str, str, str, str], list[str]] = {}
        for layer, kind, outcome, became, detail in self.changes:
            if outcome in ("partly", "left"):
                alike.setdefault((kind, became or "-", outcome, detail), []).append(layer or "(the network)")
        told = [_table(("class", "became", "outcome", "count"), counts)]
        if alike:
            rows = [(_shortened(layers), *key) for key, layers in alike.items()]
            told.append(_table(("layer", "class", "became", "outcome", "why"), rows))
        told += [f"note: {note}" for note in self.notes]
        return "\n\n".join(told)


def _shortened(layers: list[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    text = io.StringIO()
    Console(file=text, width=200, highlight=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
