"""Runs functions in forked children, so that one that crashes or hangs is counted and ends nothing else."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from deploynorm.errors import DeployNormError

__all__ = ["Figures", "LeftError", "tried"]

MEMORY = 2**33
"""Bytes that a child may ask for beyond what the parent has."""


class LeftError(Exception):
    """Something was left behind that should not be there."""


class Figures(Counter[str]):
    """How many were tried, crashed, hung, went wrong, left files, were refused and were read; `print` shows them."""

    def __str__(self) -> str:
        words = ("tried", "crashed", "hung", "wrong", "left", "refused", "read")
        return ", ".join(f"{word} {self[word]}" for word in words)

    def assert_harmless(self, least: int, faults: Sequence[str]) -> None:
        assert self["tried"] >= least
        assert not any(self[word] for word in ("crashed", "hung", "wrong", "left")), f"{self}\n" + "\n".join(
            faults[:20]
        )


def tried(
    cases: Sequence[Any], call: Callable[[Any], object], *, seconds: float = 60, may_raise: bool = False
) -> tuple[Figures, list[str]]:
    """Calls with each case, many in one child, and the figures; then a line for each fault.

    A case is refused by a DeployNormError, or with may_raise by any exception. A child that dies, or stays at one case
    for longer than `seconds`, is replaced by another, which goes on behind that case.
    """
    figures, faults, at = Figures(tried=len(cases)), [], 0
    while at < len(cases):
        done, end = _child(cases[at:], call, seconds, may_raise)
        for word, text in done:
            figures[word] += 1
            if word in ("wrong", "left"):
                faults.append(text)
        at += len(done)
        if end:
            figures[end] += 1
            faults.append(f"{end}: {cases[at]!r:.300}")
            at += 1
    return figures, faults


def _child(
    cases: Sequence[Any], call: Callable[[Any], object], seconds: float, may_raise: bool
) -> tuple[list[tuple[str, str]], str]:
    """What became of the cases in one child, and how it ended: "", "crashed" or "hung"."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(reader)
            _work(cases, call, writer, may_raise)
        os._exit(0)
    os.close(writer)
    text, hung = b"", False
    os.set_blocking(reader, False)
    since = time.monotonic()
    while True:
        try:
            block = os.read(reader, 2**16)
        except BlockingIOError:
            if time.monotonic() - since > seconds:
                hung = True
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.002)
            continue
        if not block:
            break
        text, since = text + block, time.monotonic()
    os.close(reader)
    os.waitpid(pid, 0)
    done = [(word, rest) for word, _, rest in (line.partition("\t") for line in text.decode().splitlines())]
    return done, "hung" if hung else "crashed" if len(done) < len(cases) else ""


def _work(cases: Sequence[Any], call: Callable[[Any], object], writer: int, may_raise: bool) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for case in cases:
        try:
            call(case)
            line = "read"
        except DeployNormError:
            line = "refused"
        except LeftError as error:
            line = f"left\t{case!r:.80}: {error!s:.200}"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{case!r:.80}: {type(error).__name__}: {error!s:.120} ({where.filename}:{where.lineno})"
            line = "refused" if may_raise else "wrong\t" + " ".join(text.split())
        os.write(writer, line.encode(errors="replace") + b"\n")
