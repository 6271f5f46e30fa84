"""The tables that several verbs print, and the same as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deploynorm._check import Report
from deploynorm._fold import FoldReport
from deploynorm.cli.terminal import Terminal

__all__ = ["fold_to_dict", "print_checks", "print_fold"]


def print_fold(terminal: Terminal, report: FoldReport) -> None:
    """The tables of a fold's report; each layer with -v."""
    terminal.line(report.tables(verbose=terminal.verbose) + "\n")


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
    return report.to_dict()
