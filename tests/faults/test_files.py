"""Files and what may befall them: two writers, signals, devices, full disks. Nothing is mixed, half-written or left."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from deploynorm import files
from deploynorm.errors import InputError
from deploynorm.files import check_outputs, onnx_companions, scratch_folder, staging, write_text

FORK = multiprocessing.get_context("fork")
NAMES = ("net.onnx", "net.onnx.data", "net.deploynorm.json")
MANY = pytest.param(True, marks=pytest.mark.slow)


def write_three(target: Path, tag: str) -> None:
    with staging(target, companions=onnx_companions(target)) as folder:
        for name in NAMES:
            (folder / name).write_text(tag)


def child(function: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def write_each_round(target: Path, tag: str, rounds: int, turn: Barrier) -> None:
    for number in range(rounds):
        turn.wait(60)
        write_three(target, f"{tag}{number}")
        turn.wait(60)


@pytest.mark.parametrize("many", [False, MANY])
def test_of_two_writers_one_wins_with_all_its_files(many: bool, tmp_path: Path) -> None:
    rounds, turn = 400 if many else 40, FORK.Barrier(3)
    writers = [child(write_each_round, tmp_path / "net.onnx", tag, rounds, turn) for tag in "AB"]
    for _ in range(rounds):
        turn.wait(60)  # they write at once
        turn.wait(60)
        assert len({(tmp_path / name).read_text() for name in NAMES}) == 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


def write_on_and_on(target: Path, ready: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for number in range(1_000_000):
        write_three(target, str(number))
        if number == 1:
            ready.touch()


@pytest.mark.parametrize("many", [False, MANY])
def test_a_signal_leaves_files_of_one_writer_and_nothing_else(many: bool, tmp_path: Path) -> None:
    place, ready = tmp_path / "place", tmp_path / "ready"
    place.mkdir()
    for attempt in range(100 if many else 10):
        ready.unlink(missing_ok=True)
        process = child(write_on_and_on, place / "net.onnx", ready)
        while not ready.exists():
            time.sleep(0.001)
        time.sleep(random.Random(attempt).uniform(0, 0.01))
        process.terminate()
        process.join()
        assert len({(place / name).read_text() for name in NAMES}) == 1
        assert sorted(path.name for path in place.iterdir()) == sorted(NAMES)


def die_inside(target: Path) -> None:
    with staging(target) as folder:
        (folder / target.name).write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    child(die_inside, tmp_path / "a.json").join()
    assert len([*tmp_path.iterdir()]) == 1
    with scratch_folder(tmp_path) as living:
        write_text(tmp_path / "b.json", "text")
        assert {path.name for path in tmp_path.iterdir()} == {"b.json", living.name}
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_a_scratch_folder_takes_files_at_once(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        write_three(folder / "net.onnx", "text")
        assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)


def test_a_user_s_folder_is_never_swept(tmp_path: Path) -> None:
    (tmp_path / ".deploynorm").mkdir()
    (tmp_path / f"{files._PREFIX}link").symlink_to(tmp_path / ".deploynorm")
    write_text(tmp_path / "a.json", "text")
    assert (tmp_path / ".deploynorm").is_dir()


def test_ctrl_c_while_files_move_waits_for_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (signal.raise_signal(signal.SIGINT), replace(*paths)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the processes of pytest-xdist ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            write_three(tmp_path / "net.onnx", "new")
    finally:
        signal.signal(signal.SIGINT, before)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(NAMES, "new")


def test_weights_and_manifest_of_the_file_before_it_go(tmp_path: Path) -> None:
    target = tmp_path / "net.onnx"
    write_three(target, "old")
    with staging(target, companions=onnx_companions(target)) as folder:
        (folder / target.name).write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    near, far = tmp_path / "here" / "near.json", tmp_path / "here" / "far.json"
    near.symlink_to("target.json")
    far.symlink_to(tmp_path / "there" / "target.json")
    for link in (near, far):
        for text in ("made", "replaced"):
            write_text(link, text)
            assert link.is_symlink()
            assert link.read_text() == text
    assert len([*tmp_path.rglob("*")]) == 6, "nothing is left beside the two folders, links and targets"


def test_a_fifo_gets_the_bytes_and_stays_one(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.json"
    os.mkfifo(fifo)
    reader = subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE, text=True)
    write_text(fifo, "text")
    assert reader.communicate(timeout=20)[0] == "text"
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


def test_a_fifo_in_the_place_of_a_companion_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net.onnx.data")
    with pytest.raises(InputError, match=r"net\.onnx\.data is a pipe or device"):
        write_three(tmp_path / "net.onnx", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx.data"]


def test_a_fifo_takes_one_file(tmp_path: Path) -> None:
    fifo = tmp_path / "net.onnx"
    os.mkfifo(fifo)
    with pytest.raises(InputError, match=r"takes one file\. Got .*net\.onnx\.data"):
        write_three(fifo, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_a_device_gets_the_bytes_and_stays_one() -> None:
    """A terminal of our own is a device that needs no privileges."""
    ours, theirs = os.openpty()
    try:
        device = Path(os.ttyname(theirs))
        write_text(device, "text")
        assert os.read(ours, 100) == b"text"
        assert device.is_char_device()
    finally:
        os.close(ours)
        os.close(theirs)


def fill_up(target: Path) -> None:
    with staging(target) as folder:
        (folder / target.name).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / target.name))


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_full_disk_keeps_the_file_before_it(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_text("old")
    with unchanged(tmp_path), pytest.raises(InputError, match="cannot write there: No space left on device"):
        fill_up(tmp_path / "net.onnx")


def test_the_longest_names_are_written_and_longer_ones_refused(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 245), "text")
    with unchanged(tmp_path), pytest.raises(InputError, match="File name too long"):
        write_text(tmp_path / ("x" * 256), "text")


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"n\xffe.json")
    write_text(path, "text")
    assert path.read_text() == "text"


def lose_the_folder(target: Path) -> None:
    with staging(target) as folder:
        (folder / target.name).write_text("text")
        folder.rename(target.parents[1] / "moved")
        target.parent.rmdir()


def test_a_folder_that_goes_away_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    with pytest.raises(InputError, match="cannot write there"):
        lose_the_folder(tmp_path / "gone" / "a.json")


def test_an_input_under_any_name_is_refused(tmp_path: Path) -> None:
    model, other = tmp_path / "m.pt", tmp_path / "x.npz"
    for path in (model, other):
        path.write_text("read")
    (tmp_path / "link").symlink_to(model)
    os.link(model, tmp_path / "hard")
    for output in (model, tmp_path / "link", tmp_path / "hard", tmp_path / ".." / tmp_path.name / "m.pt"):
        with unchanged(tmp_path), pytest.raises(InputError, match="is MODEL itself, which is read"):
            write_text(output, "new", inputs=[model, other])
    with unchanged(tmp_path), pytest.raises(InputError, match=r"is .*x\.npz, which is read"):
        write_text(other, "new", inputs=[model, other])
    with pytest.raises(InputError, match=r"is .*new, which is written too"):
        check_outputs([tmp_path / "new", tmp_path / "link" / ".." / "new"], [])
    with unchanged(tmp_path), pytest.raises(InputError, match="which is read"):
        staging(tmp_path / "m", inputs=[other], companions=[other]).__enter__()
