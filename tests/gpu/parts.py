"""Pieces of software for a machine without a package index, as files small enough to be sent one by one.

All pieces, each packed for itself, are one long stream, which is cut into parts; contents.json says where in it each
piece lies, so that a piece can be used as soon as the parts that it lies in have arrived. Only the standard library.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = ["LARGEST_PART", "Parts", "pack"]

LARGEST_PART = 55 * 2**20

_CONTENTS = "contents.json"


def pack(pieces: Mapping[str, Path], folder: Path, largest: int = LARGEST_PART) -> dict[str, int]:
    """Packs a folder for each piece into parts in `folder`, the first piece into the first; returns the bytes of each.

    Those of an earlier filling are gone; what else is in `folder` stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if re.fullmatch(rf"part\d+|{re.escape(_CONTENTS)}", path.name):
            path.unlink()
    sizes, where, at = {}, {}, 0
    for name, content in pieces.items():
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:xz", preset=6) as archive:
            archive.add(content, name)
        data = packed.getvalue()
        where[name] = {"at": at, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        sizes[name] = len(data)
        while data:
            part = folder / f"part{1 + at // largest}"
            with part.open("ab") as file:
                written = file.write(data[: largest - at % largest])
            data, at = data[written:], at + written
    (folder / _CONTENTS).write_text(json.dumps({"part": largest, "pieces": where}, indent=1))
    return sizes


@dataclass(frozen=True)
class Parts:
    """Those that have arrived in `folder`; pieces are unpacked below `into`."""

    folder: Path
    into: Path

    def missing(self, name: str) -> str | None:
        """What of a piece has not arrived or is damaged; None where all has, and then it is unpacked."""
        if (self.into / name).is_dir():
            return None
        try:
            contents = json.loads((self.folder / _CONTENTS).read_text())
            largest, pieces = contents["part"], contents["pieces"]
            if name not in pieces:
                return f"{name}: it is not among {', '.join(pieces)}"
            at, end, sha256 = pieces[name]["at"], pieces[name]["at"] + pieces[name]["size"], pieces[name]["sha256"]
        except (OSError, ValueError, TypeError, LookupError):
            return f"{name}: {self.folder} has no {_CONTENTS} (tests/gpu/fill makes it), or a damaged one"
        parts = {index: self.folder / f"part{1 + index}" for index in range(at // largest, (end - 1) // largest + 1)}
        if absent := [path.name for path in parts.values() if not path.is_file()]:
            return f"{name}: {' and '.join(absent)} not arrived"
        data = b"".join(
            path.read_bytes()[max(at - index * largest, 0) : end - index * largest] for index, path in parts.items()
        )
        if hashlib.sha256(data).hexdigest() != sha256:
            return f"{name}: {' or '.join(path.name for path in parts.values())} is damaged, or of another filling"
        self._unpack(name, io.BytesIO(data))
        return None

    def _unpack(self, name: str, packed: IO[bytes]) -> None:
        """Whole or not at all, should the time be over in between."""
        incomplete = self.into / f"{name}.incomplete"
        shutil.rmtree(incomplete, ignore_errors=True)
        with lzma.open(packed) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            archive.extractall(incomplete, filter="data")
        (incomplete / name).rename(self.into / name)
        incomplete.rmdir()
