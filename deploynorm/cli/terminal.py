"""What a verb shows: results on standard output, progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploynorm.files import write_text

__all__ = ["Terminal"]


class Terminal:
    """Prints for one run of a verb.

    Args:
        quiet: Whether nothing is shown.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def show(self, text: object) -> None:
        if not self._quiet:
            print(text)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Shows what is being done while it lasts; nothing where standard error is not a terminal."""
        if self._quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(text)):
            yield

    @staticmethod
    def write_json(path: Path | None, content: dict[str, Any]) -> None:
        """Writes the machine-readable form, where one was asked for."""
        if path is not None:
            write_text(path, json.dumps(content, indent=2) + "\n")
