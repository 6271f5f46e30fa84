"""Whether a file of a cache may be loaded, which runs what is in it: nobody else wrote it, and it is whole."""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import Final

from deploynorm.errors import BackendError
from deploynorm.files import sha256
from deploynorm.libraries.elf import read_needed

SUMS: Final = "SHA256SUMS"
"""Beside built libraries: their hashes, as the program sha256sum writes and checks them."""


def objection(library: Path) -> str | None:
    """Why a library must not be loaded; None where it may be."""
    return foreign(library) or damage(library)


def foreign(path: Path) -> str | None:
    """Which part of a path somebody besides this user and root owns, or may change; None where there is none."""
    there = path.absolute()
    resolved = Path(os.path.realpath(path))
    for part in dict.fromkeys((there, *there.parents, resolved, *resolved.parents)):
        status = part.lstat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{part} belongs to another user"
        # In a sticky folder, such as /tmp, others cannot replace what is ours.
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
        if shared and not stat.S_ISLNK(status.st_mode):
            return f"others may write to {part} (chmod go-w)"
    return None


def damage(library: Path) -> str | None:
    """What is wrong with a library's file: it is none, cut short, or not as it was built; None where it is whole."""
    try:
        status = library.stat()
        return _damage(library, status.st_mtime_ns, status.st_size)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


@lru_cache
def _damage(library: Path, _modified: int, _size: int) -> str | None:
    try:
        read_needed(library)
    except ValueError as error:
        return str(error)
    sums = library.with_name(SUMS)
    if sums.exists() and f"{sha256(library)}  {library.name}" not in sums.read_text(encoding="utf-8").splitlines():
        return "it is not as it was built"
    return None


def make_private(folder: Path) -> None:
    """Makes a folder, and those above it, for this user alone. BackendError where that fails, or others may write."""
    try:
        for part in (*reversed(folder.parents), folder):
            part.mkdir(mode=0o700, exist_ok=True)
        problem = foreign(folder)
    except OSError as error:
        problem = f"the folder cannot be made: {error.strerror}"
    if problem is not None:
        raise BackendError(f"cache {folder}", problem, fix="name another folder for caches with XDG_CACHE_HOME")
