"""What a shared library says of itself: the processor it is for, what it needs, what it exports, its code for GPUs.

Read from the file, so that nothing in it runs, no program of the system is needed, and one for another processor can
be read too.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

_MACHINES: Final = {62: "x86-64", 183: "aarch64"}

_DYNAMIC: Final = 6
_DYNAMIC_SYMBOLS: Final = 11
_NEEDED: Final = 1


@dataclass(frozen=True)
class CudaCode:
    """Code for one generation of GPUs."""

    kind: Literal["sm", "compute"]  # machine code, or PTX, which the driver compiles
    capability: tuple[int, int]
    cuda: int | None = None  # of PTX, the major version of CUDA that wrote it, which the driver must know

    @property
    def name(self) -> str:
        """As nvcc has it: sm_90, compute_90."""
        return f"{self.kind}_{self.capability[0]}{self.capability[1]}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Machine code serves later devices of its generation, PTX all later ones.

        Source: CUDA C++ Programming Guide, "Binary compatibility" and "PTX compatibility".
        """
        if self.kind == "sm" and self.capability[0] != capability[0]:
            return False
        return self.capability <= capability


class SharedLibrary(NamedTuple):
    """What was read of one."""

    machine: str
    needed: tuple[str, ...]
    exports: tuple[str, ...]
    code: tuple[CudaCode, ...]


def read_library(path: Path) -> SharedLibrary:
    """Reads a shared library of 64-bit Linux; ValueError if it is something else, or damaged."""
    with _opened(path) as file:
        return SharedLibrary(file.machine, tuple(file.needed()), tuple(file.exports()), tuple(file.code()))


def read_needed(path: Path) -> tuple[str, ...]:
    """The libraries that one needs; see read_library, which takes longer for large ones."""
    with _opened(path) as file:
        return tuple(file.needed())


def machine_here() -> str | None:
    """The processor that this Python is for; None where programs are no ELF files."""
    try:
        with _opened(Path(sys.executable)) as file:
            return file.machine
    except (OSError, ValueError):
        return None


@contextmanager
def _opened(path: Path) -> Iterator[_Elf]:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < 64:  # an empty one cannot be mapped at all
            raise ValueError("no shared library")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                yield _Elf(data)
            except (struct.error, IndexError, OverflowError) as error:
                raise ValueError(f"damaged or cut short ({error})") from error


class _Section(NamedTuple):
    """What is read of one row of the table of sections."""

    name: int
    kind: int
    offset: int
    size: int
    link: int


class _Elf:
    """An ELF file. Source: the System V ABI, chapter 4."""

    def __init__(self, data: mmap.mmap) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("no shared library of 64-bit Linux")
        self._data = data
        machine = struct.unpack_from("<H", data, 18)[0]
        self.machine = _MACHINES.get(machine, f"ELF machine {machine}")
        (table,) = struct.unpack_from("<Q", data, 40)
        size, count, names = struct.unpack_from("<HHH", data, 58)
        self._sections = [_Section(*struct.unpack_from("<II16xQQI20x", data, table + i * size)) for i in range(count)]
        self._names = self._sections[names] if count else None

    def _string(self, strings: _Section, at: int) -> str:
        start = strings.offset + at
        end = self._data.find(b"\0", start)
        if not strings.offset <= start <= end:
            raise ValueError("damaged or cut short (no end of a name)")
        return self._data[start:end].decode(errors="replace")

    def _entries(self, kind: int, layout: str) -> Iterator[tuple[_Section, tuple[int, ...]]]:
        """The rows of each section of a kind, with the section of their strings."""
        for section in self._sections:
            if section.kind == kind:
                for at in range(section.offset, section.offset + section.size, struct.calcsize(layout)):
                    yield self._sections[section.link], struct.unpack_from(layout, self._data, at)

    def needed(self) -> Iterator[str]:
        for strings, (tag, value) in self._entries(_DYNAMIC, "<qQ"):
            if tag == 0:
                return
            if tag == _NEEDED:
                yield self._string(strings, value)

    def exports(self) -> Iterator[str]:
        for strings, (name, info, _, section, _, _) in self._entries(_DYNAMIC_SYMBOLS, "<IBBHQQ"):
            is_global_or_weak = info >> 4 in (1, 2)
            if is_global_or_weak and section != 0:
                yield self._string(strings, name)

    def code(self) -> list[CudaCode]:
        """All that nvcc has put into it, each kind once, machine code first."""
        found: set[CudaCode] = set()
        for section in self._sections:
            if self._names is not None and self._string(self._names, section.name) == ".nv_fatbin":
                found.update(_fat_binaries(self._data[section.offset : section.offset + section.size]))
        return sorted(found, key=lambda code: (code.kind == "compute", code.capability))


def _fat_binaries(content: bytes) -> Iterator[CudaCode]:
    """The section holds containers one behind the other, aligned to 8, and each holds entries.

    NVIDIA does not describe it; this is what nvcc 12 and 13 write, and the tests compare it with what nvcc was asked
    for. A container: magic, version (2 bytes), size of this header (2), size of the entries (8). An entry: kind (2;
    1 is PTX, 2 machine code), version (2), size of this header (4), size of what follows it (8), 8 bytes of
    compression, minor and major version of the format (2 + 2; of PTX that of its language, which is CUDA's less 4),
    and the architecture (4).
    """
    magic, head, entry = 0xBA55ED50, "<IHHQ", "<HHIQQHHI"
    at = 0
    while at + struct.calcsize(head) <= len(content):
        found, _, header_size, size = struct.unpack_from(head, content, at)
        if found != magic:
            at += 8
            continue
        if header_size < struct.calcsize(head):
            raise ValueError("damaged or cut short (code for GPUs)")
        at += header_size
        end = at + size
        while at < end:
            kind, _, entry_header, length, _, _, major, architecture = struct.unpack_from(entry, content, at)
            if entry_header == 0:
                raise ValueError("damaged or cut short (code for GPUs)")
            capability = divmod(architecture, 10)
            if kind == 1:
                yield CudaCode("compute", capability, major + 4)
            elif kind == 2:
                yield CudaCode("sm", capability)
            at += entry_header + length
        at = end
