"""Processes of the command that are ended by signals, or write to one place: one file, whole, and nothing else."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from children import Figures
from torch import nn

from deploynorm.cli import main
from deploynorm.layers import FRN2d
from deploynorm.manifest import check_unchanged

SECONDS = 60
"""After which a process that has not ended by itself hangs."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RUN, EXPORT = "run {0}.onnx x.npz -o {1}.npz", "export {0}.pt2 -o {1}.onnx --external-data"
REWRITE, INSPECT = "rewrite {0}.onnx --optimize-for-cpu -o {1}.onnx", "inspect {0}.onnx --json {1}.json"
LINES = (*(RUN, REWRITE, INSPECT, REWRITE) * 4, RUN, REWRITE, INSPECT, EXPORT)
"""What is tried, over and over; what imports torch takes as long as all else together, and comes once, at the end."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str], None]) -> Mapping[str, bytes]:
    """Two networks, a and b, their ONNX files, and an input; each output, of a, under the name `old`."""
    require("ort")
    require("native")
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    for name in "ab":
        network = nn.Sequential(nn.Conv2d(3, 8, 3), FRN2d(8), nn.Conv2d(8, 8, 3), FRN2d(8)).eval()
        torch.export.save(torch.export.export(network, (x,)), folder / f"{name}.pt2")
        assert main(["export", f"{folder}/{name}.pt2", "-q"]) == 0
    np.savez(folder / "x.npz", input=x.numpy())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def here(made: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all of it, and beside it one for temporary files."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "place").mkdir()
    for name, content in made.items():
        (tmp_path / "place" / name).write_bytes(content)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path


class Fork:
    """The command in a child of this process, which has imported all that a new one takes most of its time for."""

    def __init__(self, line: str) -> None:
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  until `wait`
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            with suppress(BaseException):
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                torch.set_num_threads(1)  # those of the parent are not here
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(self.stderr.fileno(), 2)
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  pytest's own goes elsewhere
                code = main([*line.split(), "-q"])
                sys.stderr.flush()
            os._exit(code)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, figures: Figures) -> tuple[int, str]:
        until = time.monotonic() + SECONDS
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > until:
                figures["hung"] += 1
                os.kill(self.pid, signal.SIGKILL)
                ended = os.waitpid(self.pid, 0)
                break
            time.sleep(0.002)
        with self.stderr:
            self.stderr.seek(0)
            return os.waitstatus_to_exitcode(ended[1]), self.stderr.read().decode()


class Process:
    """The command as a user starts it."""

    def __init__(self, line: str) -> None:
        words = [sys.executable, "-m", "deploynorm", *line.split(), "-q"]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.send_signal = self.process.send_signal

    def wait(self, figures: Figures) -> tuple[int, str]:
        try:
            _, error = self.process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            figures["hung"] += 1
            self.process.kill()
            _, error = self.process.communicate()
        return self.process.returncode, error.decode()


def outputs(line: str, of: str) -> str:
    """What that command wrote under that name, as far as it is the same each time; not empty."""
    if line == RUN:
        return str({name: value.tobytes() for name, value in np.load(f"{of}.npz").items()})
    if line == INSPECT:
        return Path(f"{of}.json").read_text()
    check_unchanged(Path(f"{of}.onnx"))
    data = Path(f"{of}.onnx.data")
    return (data if data.exists() else Path(f"{of}.onnx")).read_bytes().replace(of.encode(), b"out").hex()


@pytest.fixture(scope="module")
def alone(
    made: Mapping[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, tuple[dict[str, str], dict[Path, bytes]]]:
    """Of each line: what it gives of a and of b where nothing disturbs it, and the files that it writes of a.

    It is called in this process, which has imported all that a process of its own would take most of its time for.
    """
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for name, content in made.items():
        (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for line in set(LINES):
            gives = {}
            for name in "ba":
                assert main([*line.format(name, "out").split(), "-q"]) == 0
                gives[name] = outputs(line, "out")
                files = {path: path.read_bytes() for path in taken_away()}
            assert gives["a"] != gives["b"]
            found[line] = (gives, files)
    return found


def taken_away() -> Iterator[Path]:
    """The files of the output, each of which is removed once the caller has seen it."""
    for path in sorted(Path().glob("out.*")):
        yield path
        path.unlink()


def left(here: Path, before: set[Path], written: Iterable[Path]) -> list[str]:
    """What is there beside what was there before, what the command writes, and what onnxruntime keeps."""
    expected = before | {here / "place" / path for path in written} | {here / "temporary" / ".ses"}
    return sorted(str(path.relative_to(here)) for path in set(here.rglob("*")) - expected)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "count"), [(Process, 6), (Fork, 40)])
def test_a_signal_at_any_moment_leaves_the_old_file_or_the_new_one(
    start: type[Process | Fork], count: int, here: Path, alone: Mapping[str, tuple[dict[str, str], dict[Path, bytes]]]
) -> None:
    """Each is ended within the time that it takes; before it has begun to work, the signal ends Python itself."""
    lines, seconds = LINES[:count], {}
    for line in sorted(set(lines)):
        since = time.monotonic()
        assert start(line.format("a", "out")).wait(Figures()) == (0, "")
        seconds[line] = time.monotonic() - since
        assert outputs(line, "out") == alone[line][0]["a"]
        _ = [*taken_away()]
    before = set(here.rglob("*"))
    figures, faults, ends = Figures(tried=count), list[str](), set[int]()
    for attempt in range(count):
        line, number, rng = lines[attempt % len(lines)], SIGNALS[attempt % 3], random.Random(attempt)
        gives, files = alone[line]
        for path, content in files.items():
            path.write_bytes(content)
        one = start(line.format("b", "out"))
        time.sleep(rng.uniform(0.2, 1) * seconds[line])
        one.send_signal(number)
        code, error = one.wait(figures)
        ends.add(code)
        extra = left(here, before, files)
        figures["crashed"] += code not in (0, 128 + number, -number)
        figures["wrong"] += (code > 0 and "Traceback" in error) or outputs(line, "out") not in gives.values()
        figures["left"] += bool(extra)
        faults.append(f"{line} {number.name}: {code} {extra} {error[-300:]}")
        _ = [*taken_away()]
    print(f"signals: {figures}; exit codes {sorted(ends)}")
    figures.assert_harmless(count, faults)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "count"), [(Process, 3), (Fork, 40)])
def test_of_two_commands_at_once_one_wins_with_all_its_files(
    start: type[Process | Fork], count: int, here: Path, alone: Mapping[str, tuple[dict[str, str], dict[Path, bytes]]]
) -> None:
    lines, before = LINES[:count], set(here.rglob("*"))
    figures, faults = Figures(tried=count), list[str]()
    for attempt in range(count):
        line = lines[attempt % len(lines)]
        both = [start(line.format(name, "out")) for name in random.Random(attempt).sample("ab", 2)]
        ends = [each.wait(figures) for each in both]
        gives, files = alone[line]
        extra = left(here, before, files)
        figures["crashed"] += any(end != (0, "") for end in ends)
        figures["wrong"] += outputs(line, "out") not in gives.values()
        figures["left"] += bool(extra)
        faults.append(f"{line}: {ends} {extra}")
        _ = [*taken_away()]
    print(f"races: {figures}")
    figures.assert_harmless(count, faults)
