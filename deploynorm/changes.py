"""What became of one layer or node: the entries that swap, fold and rewrite put into their reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple


class Change(NamedTuple):
    """What became of one layer of a network, or of one node of an ONNX graph.

    Attributes:
        name: The layer's path in the network ("" is the network itself), or the node's first output.
        kind: Its class or operator before.
        outcome: What happened, in a word; each report lists its own.
        became: What stands there now; "" where nothing changed.
        detail: Where it went, or the reason why it stays.
    """

    name: str
    kind: str
    outcome: str
    became: str = ""
    detail: str = ""


@dataclass(frozen=True)
class LayerReport:
    """What swap or fold found and did.

    Attributes:
        found: How many layers of each class that it knows the network has.
        changes: One entry for each layer that it looked at, in the network's order.
    """

    found: Counter[str]
    changes: tuple[Change, ...]

    def with_outcome(self, outcome: str) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.outcome == outcome)

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {"found": dict(self.found), "changes": [change._asdict() for change in self.changes]}
