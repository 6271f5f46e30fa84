"""The tables that several verbs print, and the same as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from deploynorm._check import Report
from deploynorm._fold import FoldReport
from deploynorm.cli.terminal import Terminal

__all__ = ["fold_to_dict", "print_checks", "print_fold"]


def print_fold(terminal: Terminal, report: FoldReport) -> None:
    """Layers found, folded and left, by class; then each layer that was left, with the reason."""
    rows = []
    for kind, found in sorted(report.found.items()):
        outcomes = Counter(change.outcome for change in report.changes if change.kind == kind)
        counts = (outcomes["folded"], outcomes["affine"], outcomes["left"], found - outcomes.total())
        rows.append((kind, found, *(count or "-" for count in counts)))
    if rows:
        # FRN and TLU have nothing to fold: their layers are taken as they are.
        terminal.table("Layers", ("layer", "found", "folded", "kept as affine", "left", "as they are"), rows)
    told = report.changes if terminal.verbose else [c for c in report.changes if c.outcome != "folded"]
    if told:
        terminal.table(
            "Each layer" if terminal.verbose else "Layers that did not fold, and why",
            ("layer", "class", "outcome", "detail"),
            ((change.layer or "(the network)", change.kind, change.outcome, change.detail) for change in told),
        )


def print_checks(
    terminal: Terminal, reports: Iterable[Report], title: str = "Parity with the network in float64"
) -> None:
    """The worst error of each sample and output, beside what is allowed."""
    rows = []
    for report in reports:
        for comparison in report.comparisons:
            rows.append(
                (
                    report.candidate,
                    comparison.sample,
                    comparison.output,
                    f"{comparison.max_abs:.2e}",
                    f"{comparison.max_rel:.2e}",
                    f"{comparison.allowed:.2e}",
                    ("ok" if comparison.ok else "BROKEN") + (f": {comparison.reason}" if comparison.reason else ""),
                )
            )
    columns = ("candidate", "sample", "output", "max |error|", "relative", "allowed", "")
    terminal.table(title, columns, rows)


def fold_to_dict(report: FoldReport) -> dict[str, Any]:
    return {"found": dict(report.found), "changes": [change._asdict() for change in report.changes]}
