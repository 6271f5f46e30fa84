"""What a verb shows: results on standard output, progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploynorm.files import write_text


@dataclass(frozen=True)
class Terminal:
    """Prints for one run of a verb: nothing (quiet), or with each layer and sample (verbose); and JSON into a file."""

    quiet: bool
    verbose: bool
    json: Path | None

    def show(self, text: object) -> None:
        if not self.quiet:
            print(text)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Shows what is being done while it lasts; nothing where standard error is not a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(text)):
            yield

    def write_json(self, content: dict[str, Any]) -> None:
        if self.json is not None:
            write_text(self.json, json.dumps(content, indent=2) + "\n")
