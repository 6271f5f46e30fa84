"""What a verb shows: tables on standard output, progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploynorm.files import write_text

__all__ = ["Terminal"]

_PIPE_WIDTH = 200


class Terminal:
    """Prints for one run of a verb.

    Args:
        verbose: Whether `detail` prints.
        quiet: Whether nothing does.
    """

    def __init__(self, *, verbose: bool = False, quiet: bool = False) -> None:
        self.verbose = verbose
        # A pipe has no width of its own, and a table folded at 80 columns cannot be searched.
        width = None if sys.stdout.isatty() else _PIPE_WIDTH
        self._out = Console(quiet=quiet, highlight=False, width=width)
        self._progress = Console(stderr=True, quiet=quiet)

    def line(self, text: str) -> None:
        self._out.print(escape(text), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Prints a table; numbers should come as text, formatted."""
        self._out.print(escape(title), style="bold", soft_wrap=True)  # rich folds a title to the table's width
        table = Table(box=None, pad_edge=False, show_header=any(columns))
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        with self._out.capture() as rendered:
            self._out.print(table)
        for line in rendered.get().splitlines():
            self._write(line.rstrip())  # rich fills each line to the table's width
        self._write("")

    def _write(self, line: str) -> None:
        if not self._out.quiet:
            print(line)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Shows what is being done while it lasts; nothing where standard error is not a terminal."""
        if not self._progress.is_terminal:
            yield
            return
        with self._progress.status(escape(text)):
            yield

    @staticmethod
    def write_json(path: Path | None, content: dict[str, Any]) -> None:
        """Writes the machine-readable form, where one was asked for."""
        if path is not None:
            write_text(path, json.dumps(content, indent=2) + "\n")
