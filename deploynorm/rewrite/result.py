"""What a rewriting pass returns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from deploynorm.changes import Change
from deploynorm.tables import table


@dataclass(frozen=True)
class RewriteResult:
    """A rewritten graph, and what was done; `print` shows it.

    Attributes:
        model: The new model; the one given is untouched.
        changes: One entry for each node that the pass looked at, in the graph's order. Outcomes: "rewritten", with
            what it became, and "unchanged", with the reason.
        before, after: Nodes of each operator in the graph that the pass started from, and in the result.
        read: Other files that the pass has read, which no output is to overwrite.
    """

    model: ir.Model
    changes: tuple[Change, ...]
    before: Counter[str]
    after: Counter[str]
    read: tuple[Path, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether anything was rewritten."""
        return any(change.outcome == "rewritten" for change in self.changes)

    def __str__(self) -> str:
        """What was rewritten, what was not and why, and the nodes before and after."""
        done = Counter((change.kind, change.became) for change in self.changes if change.outcome == "rewritten")
        rows = ((kind, count, became) for (kind, became), count in done.items())
        unchanged = [(x.name, x.kind, x.detail) for x in self.changes if x.outcome == "unchanged"]
        nodes = ((n, self.before[n] or "-", self.after[n] or "-") for n in sorted(self.before | self.after))
        parts = [table("Rewritten", ("operator", "count", "is now"), rows)] if done else []
        if unchanged:
            parts.append(table("Unchanged, and why", ("value", "operator", "reason"), unchanged))
        parts.append(table("Nodes", ("operator", "before", "rewritten"), nodes))
        return "\n\n".join(parts)
