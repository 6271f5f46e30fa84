"""Tables as text: what `print` shows of a report, and what the command line shows of the same report."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Sequence

_PLAIN_WIDTH = 200
"""Columns of a table that no terminal limits: a pipe has no width, and a table folded at 80 cannot be searched."""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table without lines; no title where that is empty, no headings where all of them are.

    Longer cells are folded at the width of the terminal, if there is one. Numbers should come as text, formatted.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(escape(str(cell)) for cell in row))
    text = io.StringIO()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _PLAIN_WIDTH
    Console(file=text, width=width, highlight=False, color_system=None).print(grid)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([title, *lines] if title else lines)
