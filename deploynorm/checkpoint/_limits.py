"""How much a file may take to be read: a hostile one unpacks into gigabytes, or keeps Python busy for ever."""

from __future__ import annotations

import ctypes
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from deploynorm.errors import ModelError

MOST_MEMBERS = 100_000
"""Some ten times the tensors of the deepest networks. torch takes a minute for twice as many."""
MOST_UNPACKED = 10
"""An archive may unpack into so many times its own bytes. What torch writes is not compressed at all."""
MOST_TENSORS = 100_000
"""In a pickle, whatever storage they share: torch, which looks each one's parts up in lists, takes 10 s for as many."""
_FREE = 2**24
"""Bytes that any archive may unpack into."""


def check_archive(archive: zipfile.ZipFile, length: int, where: str) -> None:
    """ModelError for a zip archive, a file of `length` bytes, that unpacks into too much. Nothing is unpacked here."""
    members = archive.infolist()
    size = sum(member.file_size for member in members)
    most = MOST_UNPACKED * length + _FREE
    for what, got, limit in (("members", len(members), MOST_MEMBERS), ("bytes unpacked", size, most)):
        if got > limit:
            problem = f"the archive has too many {what}"
            fix = "write it again with torch.save or torch.export.save, which do not compress"
            raise ModelError(where, problem, got=f"{got:,}", expected=f"at most {limit:,}", fix=fix)


_SECONDS, _SECONDS_A_BYTE = 15, 5 / 2**20
"""Some ten times what the slowest files take, which are small networks of many layers."""


class _TimeIsUp(BaseException):
    """Not an Exception: what reads a file may catch those and go on."""


@contextmanager
def time_limit(length: int, where: str) -> Iterator[None]:
    """Ends the block with a ModelError when reading a file of `length` bytes takes longer than any such file should.

    It works in any thread, as soon as Python code runs there.
    """
    seconds = _SECONDS + _SECONDS_A_BYTE * length
    thread, lock, ended = threading.get_ident(), threading.Lock(), threading.Event()

    def interrupt() -> None:
        with lock:
            if not ended.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeIsUp))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                ended.set()
            timer.cancel()
            timer.join()
    except _TimeIsUp:
        problem = f"it cannot be read within {seconds:.0f} s, which no file of its size should take"
        raise ModelError(where, problem, fix="write it again where it was made") from None
