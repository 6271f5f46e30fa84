"""Writing files so that a half-written or unchecked one never stands under its final name."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploynorm.errors import InputError


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder beside the target; its files move into the target's folder when the block ends without an error.

    The file named as the target moves last, so that whoever sees it sees the others too. InputError where the folder
    does not exist or cannot be written to.
    """
    parent = target.parent
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        problem = f"cannot write there: {error.strerror or error}"
        raise InputError(f"output {target}", problem, fix="choose another output file") from error
    try:
        yield folder
        for path in sorted(folder.iterdir(), key=lambda path: path.name == target.name):
            os.replace(path, parent / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with staging(target) as folder:
        (folder / target.name).write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
