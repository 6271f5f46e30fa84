"""A smaller copy of a CUDA library, for one kind of GPU: the code for all others in it becomes zeros.

File and headers keep their sizes and places; CUDA never reads an entry that it does not choose. Entries are those of
the section .nv_fatbin: a head (magic, version, sizes), and behind it an entry for each architecture.
"""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = ["prune"]

_MAGIC = 0xBA55ED50
_ELF = 2  # and 1 is PTX


def prune(library: Path, target: Path, architecture: int) -> int:
    """Copies the library; returns how many bytes of it became zeros. 90 is compute capability 9.0.

    What has no code for that architecture stays whole.
    """
    data = bytearray(library.read_bytes())
    zeroed = 0
    for start, size in _sections(data, b".nv_fatbin"):
        at, end = start, start + size
        while at < end:
            magic, _, head, length = struct.unpack_from("<IHHQ", data, at)
            if magic != _MAGIC:  # the filling between two of them
                at += 8
                continue
            entries = list(_entries(data, at + head, at + head + length))
            if any((kind, of) == (_ELF, architecture) for kind, of, _, _ in entries):
                for kind, of, content, count in entries:
                    if (kind, of) != (_ELF, architecture):
                        data[content : content + count] = bytes(count)
                        zeroed += count
            at += head + length
    target.write_bytes(data)
    return zeroed


def _entries(data: bytearray, at: int, end: int) -> list[tuple[int, int, int, int]]:
    """Kind, architecture, and where the code lies and how long it is, of each entry."""
    found = []
    while at < end:
        kind, _, head, size = struct.unpack_from("<HHIQ", data, at)
        (architecture,) = struct.unpack_from("<I", data, at + 28)
        found.append((kind, architecture, at + head, size))
        at += head + size
    return found


def _sections(data: bytearray, name: bytes) -> list[tuple[int, int]]:
    """Where the sections of an ELF file of this name lie, and how long they are."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + index * entry) for index in range(count)]
    start = headers[names][4]
    return [(at, size) for word, _, _, _, at, size in headers if data.startswith(name + b"\0", start + word)]
