"""What a rewrite returns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

import onnx_ir as ir

__all__ = ["Change", "RewriteResult"]


class Change(NamedTuple):
    """What became of one node.

    Attributes:
        node: Name of its first output, which is unique where node names are not.
        kind: Its operator.
        outcome: "rewritten" or "left".
        detail: What it is now, or the reason why it stays.
    """

    node: str
    kind: str
    outcome: Literal["rewritten", "left"]
    detail: str


@dataclass(frozen=True)
class RewriteResult:
    """A rewritten graph, and what was done.

    Attributes:
        model: The new model; the one given is untouched.
        changes: One entry for each node that the pass looked at, in the graph's order.
        before: Nodes of each operator in the graph that the pass started from.
        after: The same of the result.
    """

    model: ir.Model
    changes: tuple[Change, ...]
    before: Counter[str]
    after: Counter[str]

    @property
    def modified(self) -> bool:
        """Whether anything was rewritten."""
        return any(change.outcome != "left" for change in self.changes)
