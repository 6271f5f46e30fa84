"""What a verb shows: results on standard output, progress on standard error."""

from __future__ import annotations

import io
import json
import os
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


class _Sink(io.RawIOBase):
    """Standard output or error, which takes all that is written even where nobody reads it any more."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return self._raw.write(data) or 0
            except OSError as error:
                self.error = error
        return len(data)


@contextmanager
def steady_output() -> Iterator[list[OSError]]:
    """Keeps what is printed from ending the work, for the work is more than its table.

    Where the reader of a pipe has gone, as `head` does, or a stream was closed, the rest is not printed. A character
    that the encoding lacks is printed by its number. The error of a disk that was full stands in the list afterwards.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else our next file would be standard output
        pass
    os.close(descriptor)
    lost: list[OSError] = []
    before = {"stdout": (1, sys.stdout), "stderr": (2, sys.stderr)}
    sinks: dict[str, _Sink] = {}
    for name, (descriptor, stream) in before.items():
        buffer = getattr(stream, "buffer", None)
        raw = io.FileIO(descriptor, "w", closefd=False) if stream is None else getattr(buffer, "raw", buffer)
        if isinstance(raw, io.FileIO):
            sinks[name] = _Sink(raw)
            encoding, by_line = (stream.encoding, stream.line_buffering) if stream else ("utf-8", False)
            into = io.BufferedWriter(sinks[name])
            setattr(sys, name, io.TextIOWrapper(into, encoding, "backslashreplace", line_buffering=bool(by_line)))
    try:
        yield lost
    finally:
        for name, (_, stream) in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)
        error = sinks["stdout"].error if "stdout" in sinks else None
        if error is not None and not isinstance(error, BrokenPipeError):
            lost.append(error)
