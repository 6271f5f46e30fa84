"""A second name for a shared library that this process has loaded, for a program that opens it by that name.

TensorRT-RTX's ONNX parser opens "libtensorrt_rtx.so" when it meets a plugin, its wheel brings libtensorrt_rtx.so.1
only, and the parser ends the process when the name is not found. A file of that name would have to stand in a folder
of LD_LIBRARY_PATH before Python starts. The loader also takes a library that is there under its DT_SONAME: so the name
is given to an empty one, made here, that needs the real one. No compiler is needed, and nothing touches the disk.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from functools import cache
from pathlib import Path

from deploynorm.errors import BackendError


@cache
def also_known_as(name: str, library: str) -> None:
    """Makes `name`, such as "libtensorrt_rtx.so", findable for dlopen in this process, with the symbols of `library`.

    Linux only. BackendError if the system refuses it.
    """
    try:
        ctypes.CDLL(name)
    except OSError:
        pass
    else:
        return
    try:
        descriptor = os.memfd_create(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(empty_library(name, library))
            file.flush()
            ctypes.CDLL(f"/proc/self/fd/{descriptor}")  # which stays loaded as long as the process lives
    except OSError as error:
        fix = f"make a link {name} to it in a folder, and put the folder in LD_LIBRARY_PATH before Python starts"
        raise BackendError(library, f"cannot be made known as {name}: {error}", fix=fix) from error


def loaded_library(stem: str) -> str | None:
    """Path of the library of this process whose name begins with `stem`, as libtensorrt_rtx.so does of ...so.1.7."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[5] for line in lines if f"/{stem}" in line)
    return next((path for path in paths if Path(path).name.startswith(stem)), None)


def empty_library(soname: str, needed: str) -> bytes:
    """A 64-bit ELF shared object for this machine with a name and one dependency, and nothing else in it.

    Source: the System V ABI, chapters 4 and 5.
    """
    strings = b"\0" + soname.encode() + b"\0" + os.fsencode(needed) + b"\0"
    header_size, segment_size, entry_size, symbol_size = 64, 56, 16, 24
    dynamic_at = header_size + 3 * segment_size
    dynamic_size = 8 * entry_size
    symbols_at = dynamic_at + dynamic_size
    hash_at = symbols_at + symbol_size
    strings_at = hash_at + 16
    size = strings_at + len(strings)
    order = "<" if sys.byteorder == "little" else ">"
    with Path(sys.executable).open("rb") as file:
        machine = struct.unpack_from(order + "H", file.read(20), 18)[0]

    identification = b"\x7fELF" + bytes([2, 1 if order == "<" else 2, 1]) + bytes(9)
    shared_object = 3
    header = identification + struct.pack(
        order + "HHI3QI6H", shared_object, machine, 1, 0, header_size, 0, 0, header_size, segment_size, 3, 0, 0, 0
    )

    def segment(kind: int, at: int, length: int, alignment: int) -> bytes:
        read_write = 6  # the loader writes into the dynamic section
        return struct.pack(order + "II6Q", kind, read_write, at, at, at, length, length, alignment)

    load, dynamic, stack = 1, 2, 0x6474E551  # without the last one the loader asks for an executable stack
    segments = segment(load, 0, size, 2**16) + segment(dynamic, dynamic_at, dynamic_size, 8) + segment(stack, 0, 0, 16)
    entries = {
        14: 1,  # DT_SONAME
        1: 2 + len(soname.encode()),  # DT_NEEDED
        5: strings_at,  # DT_STRTAB
        10: len(strings),  # DT_STRSZ
        6: symbols_at,  # DT_SYMTAB
        11: symbol_size,  # DT_SYMENT
        4: hash_at,  # DT_HASH
        0: 0,
    }
    table = b"".join(struct.pack(order + "qQ", tag, value) for tag, value in entries.items())
    no_symbol = bytes(symbol_size)
    no_hashes = struct.pack(order + "4I", 1, 1, 0, 0)
    return header + segments + table + no_symbol + no_hashes + strings
