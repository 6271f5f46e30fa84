"""Writing files so that a half-written or unchecked one never stands under its final name, and nothing read is lost.

Other processes may write to the same place, and any process may be killed. Folders for unfinished files are locked
while they are in use, so that those of a dead process are known and removed by the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Final

from deploynorm.errors import InputError

NAME_BYTES: Final = 255
"""What disks take in the name of a file."""

_PREFIX: Final = ".deploynorm-scratch-"
_PATIENCE: Final = 60
"""Seconds to wait for a writer that is moving its files, which takes it milliseconds."""


@contextmanager
def staging(target: Path, *, inputs: Iterable[Path] = (), companions: Collection[Path] = ()) -> Iterator[Path]:
    """A folder beside the target; its files move into the target's folder when the block ends without an error.

    They move while no other writer's do, so those of two writers are never mixed. The file named as the target moves
    last, so that whoever sees it sees the others too. A link is followed, and a pipe or device is written into.

    Args:
        target: The file to write; the block writes it under the same name.
        inputs: Files that were read for it, the model first, which are not to be overwritten.
        companions: Files beside it that belong to it. One that the block does not write was an earlier target's, and
            is removed.

    Raises:
        InputError: The target or a companion is an input; the files cannot be written there; or there are several, and
            the target is a pipe or device.
    """
    parent = target.parent
    check_outputs([target, *companions], inputs)
    with _naming(target), ExitStack() as folders:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        stream = is_stream(target)
        folder = folders.enter_context(scratch_folder(None if stream else parent))
        yield folder
        staged = sorted(folder.iterdir(), key=lambda path: path.name == target.name)
        if stream:
            _write_into(target, staged)
            return
        moves = [(path, Path(os.path.realpath(parent / path.name))) for path in staged]
        for _, final in moves:
            if is_stream(final):
                raise OSError(f"{final} is a pipe or device, and belongs to {target.name}")
        for index, (path, final) in enumerate(moves):
            if final.parent != Path(os.path.realpath(parent)):  # a link leads there, perhaps to another disk
                near = folders.enter_context(scratch_folder(final.parent)) / final.name
                moves[index] = Path(shutil.copyfile(path, near)), final
        with ExitStack() as held:
            for place in sorted({final.parent for _, final in moves}):  # in one order, or two would wait for each other
                held.enter_context(_alone_in(place))
            with _uninterrupted():
                for path, final in moves:
                    os.replace(path, final)
                for path in companions:
                    if path.name not in {written.name for written in staged}:
                        path.unlink(missing_ok=True)


def as_path(where: str, given: object) -> Path:
    """The path of a file that a user gave; raises InputError for what can be none."""
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text or not Path(text).name:
        expected = "a path, such as 'model.onnx'"
        raise InputError(where, "that is no path of a file", got=repr(given)[:80], expected=expected)
    if len(os.fsencode(Path(text).name)) > NAME_BYTES:
        problem = f"the name of the file is longer than the {NAME_BYTES} bytes that a disk takes"
        raise InputError(where, problem, got=f"{Path(text).name[:40]}...")
    return Path(text)


def write_text(target: Path, text: str, *, inputs: Iterable[Path] = ()) -> None:
    """Writes a text file whole or not at all; see `staging`."""
    with staging(target, inputs=inputs) as folder:
        (folder / target.name).write_text(text, encoding="utf-8")


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raises InputError for a file to be written that is also read, or would be written twice, under whatever name."""
    taken: dict[object, str] = {}
    for path in inputs:
        taken.setdefault(_identity(path), f"{path}, which is read" if taken else "MODEL itself, which is read")
    for path in outputs:
        identity = _identity(path)
        if identity is not None and identity in taken:
            raise InputError(f"output {path}", f"is {taken[identity]}", fix="choose another output file")
        taken[identity] = f"{path}, which is written too"


def onnx_companions(model: Path) -> tuple[Path, Path]:
    """What belongs to an ONNX file of that name: its weights, where they have a file of their own, and its manifest."""
    stem = model.name.removesuffix(".onnx")
    return model.with_name(f"{model.name}.data"), model.with_name(f"{stem}.deploynorm.json")


def is_stream(path: Path) -> bool:
    """Whether it is a pipe, a device or this process's own output: bytes are written into it, and nothing beside it."""
    try:
        status = path.stat()
    except OSError:  # there is none, or its name is none
        return False
    return not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)) or _own_output(status) is not None


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder for this process alone, by default among the system's temporary ones; removed when the block ends.

    Where an earlier process was killed, its folder is removed too.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    _sweep(parent)
    folder, lock = parent / f"{_PREFIX}{secrets.token_hex(8)}", None
    try:
        lock = _make_locked(folder)
        yield folder
    finally:
        try:
            with _uninterrupted():
                shutil.rmtree(folder, ignore_errors=True)
        except BaseException:  # a signal came just before they were held back
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            if lock is not None:
                os.close(lock)


def sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Turns an error of the system into an InputError that names the target, and the file if it is another one."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is not None and _PREFIX not in (name := os.fsdecode(error.filename)) and name != str(target):
            reason += f" ({name})"
        fix = "choose another output file"
        raise InputError(f"output {target}", f"cannot write there: {reason}", fix=fix) from error


def _identity(path: Path) -> object:
    """Equal for paths that lead to one file; None for a stream, in which nothing is lost."""
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    return None if is_stream(path) else (status.st_dev, status.st_ino)


def _own_output(status: os.stat_result) -> int | None:
    """The descriptor among standard output and standard error that is the file of this status."""
    for descriptor in (1, 2):
        with suppress(OSError):  # it may be closed
            if os.path.samestat(os.fstat(descriptor), status):
                return descriptor
    return None


def _write_into(target: Path, staged: list[Path]) -> None:
    if [path.name for path in staged] != [target.name]:
        got, fix = ", ".join(path.name for path in staged), "choose another output file"
        raise InputError(f"output {target}", "is a pipe or device, which takes one file", got=got, fix=fix)
    # Its own output is not opened again: what was printed before would be overwritten.
    own = _own_output(target.stat())
    if own is not None:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    into: IO[bytes] = target.open("wb") if own is None else os.fdopen(os.dup(own), "wb")
    with into, staged[0].open("rb") as content:
        shutil.copyfileobj(content, into)


def _make_locked(folder: Path) -> int:
    """Makes a folder and returns a descriptor that keeps it locked."""
    while True:
        folder.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # swept away before it was locked
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks, where nothing is swept
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return lock
            os.close(lock)


def _sweep(parent: Path) -> None:
    """Removes the folders of processes of this user that died in the use of them, which are not locked any more."""
    with suppress(OSError):
        for folder in [Path(entry) for entry in os.scandir(parent) if entry.name.startswith(_PREFIX)]:
            with suppress(OSError):
                lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(lock).st_uid == os.geteuid():
                        shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps the other processes out that ask for the same; where folders cannot be locked, none."""
    if folder.name.startswith(_PREFIX):  # it is this process's alone, and locked already
        yield
        return
    try:
        lock = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it can be written to, and not listed
        yield
        return
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process keeps {folder} locked") from error
                time.sleep(0.002)
                continue
            except OSError:
                pass
            break
        yield
    finally:
        os.close(lock)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Makes the signals that end a process wait until the block has ended."""
    waiting: list[int] = []
    handlers = {}

    def wait(number: int, _: FrameType | None) -> None:
        waiting.append(number)

    if threading.current_thread() is threading.main_thread():  # signals do not reach the others
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not None:  # which could not be put back
                handlers[number] = signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for caught in waiting:
            signal.raise_signal(caught)
