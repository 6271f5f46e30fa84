"""The command on a machine where something is wrong: an exit code and a line, never a traceback, nothing left."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deploynorm
from deploynorm.cli import main
from deploynorm.errors import InputError
from deploynorm.layers import FRN2d


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small network, its ONNX file and an input."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 3), FRN2d(4)).eval(), (x,))
    torch.export.save(program, folder / "m.pt2")
    np.savez(folder / "x.npz", **{program.graph_signature.user_inputs[0]: x.numpy()})
    assert main(["export", str(folder / "m.pt2"), "-q"]) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def usual_signal(number: int) -> Iterator[None]:
    """The signal does what it does by default: pytest-xdist ignores SIGINT in its processes, and nohup SIGHUP."""
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    signal.signal(number, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


OVERWRITING = [
    "export m.pt2 -o m.pt2",
    "export m.pt2 --factory nets:build -o nets.py",
    "fold m.pt2 -o ./m.pt2",
    "export m.pt2 -o new.onnx --json m.pt2",
    "export m.pt2 -o new.onnx --json new.onnx",
    "export m.pt2 -o new.onnx --json new.deploynorm.json",
    "export m.pt2 -o new.onnx --labels labels.txt --json labels.txt",
    "fold m.pt2 -o new.pt2 --json new.pt2",
    "run m.pt2 x.npz -o x.npz",
    "run m.onnx x.npz -o m.onnx",
    "run m.onnx x=x.npz -o x.npz",
    "run m.onnx x.npz --json x.npz",
    "run m.onnx x.npz --json m.deploynorm.json",
    "run m.onnx x.npz --json m.onnx.data",
    "check m.pt2 m.onnx --json m.onnx",
    "rewrite m.onnx --optimize-for-cpu -o m.onnx",
    "rewrite m.onnx --optimize-for-cpu --json m.onnx",
    "build m.onnx -o m.onnx",
    "build m.onnx --timing-cache m.onnx",
    "inspect m.onnx --json m.onnx",
    "inspect m.engine --json m.engine.json",
]


@pytest.mark.parametrize("line", OVERWRITING)
def test_an_output_that_is_an_input_is_refused_at_once(
    line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("labels.txt", "m.engine", "m.engine.json"):
        Path(name).write_text("text")
    before = contents(here)
    assert main(line.split()) == 2
    assert "choose another output file" in capsys.readouterr().err
    assert contents(here) == before


def command(line: str, **options: object) -> tuple[int, str]:
    """Runs the command in a process of its own, with what is a shell's to give; its exit code and standard error."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **options}
    done = subprocess.run([sys.executable, "-m", "deploynorm", *line.split()], text=True, timeout=120, **pipes)
    return done.returncode, done.stderr or ""


def forked(line: str, first: Callable[[], None]) -> tuple[int, str]:
    """Calls the command in a forked child, which need not import torch again; its exit code and standard error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            first()
            with open(writing, "w", encoding="utf-8") as stream, redirect_stderr(stream):
                code = main(line.split())
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, encoding="utf-8") as stream:
        error = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), error


def no_room() -> None:
    """In a child process: no file may become larger, which is how a full disk looks."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


SLOW = pytest.mark.slow
LOST = [
    ("run m.onnx x.npz -o a.npz", 0),
    pytest.param("export m.pt2 -o a.onnx", 0, marks=SLOW),
    pytest.param("check m.pt2 m.onnx --rtol 0 --atol 0 --json a.json", 1, marks=SLOW),
]


@pytest.mark.parametrize(("line", "code"), LOST)
def test_what_is_printed_may_be_lost_and_the_work_is_done(line: str, code: int, here: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as broken:  # a pipe that nobody reads, as after `| head`
        assert command(line, stdout=broken)[0] == code
    assert Path(line.split()[-1]).exists()


def test_a_full_a_closed_and_an_ascii_standard_output(here: Path) -> None:
    with Path("full").open("wb") as full:
        code, error = command("inspect m.onnx", stdout=full, preexec_fn=no_room)
    assert (code, error.count("\n")) == (2, 1)
    assert "standard output: cannot write there: File too large" in error
    closed = 'exec "$@" <&- >&- 2>&-'
    words = ["sh", "-c", closed, "sh", sys.executable, "-m", "deploynorm", "run", "m.onnx", "x.npz", "-o", "y.npz"]
    assert subprocess.run(words, timeout=120).returncode == 0
    assert list(np.load("y.npz")) == ["output"]
    (here / "é\N{SNOWMAN}.onnx").write_bytes(Path("m.onnx").read_bytes())
    assert command("inspect é\N{SNOWMAN}.onnx", env={**os.environ, "PYTHONIOENCODING": "ascii"}) == (0, "")


FULL = [
    "run m.onnx x.npz -o a.npz",
    pytest.param("export m.pt2 -o a.onnx", marks=SLOW),
    pytest.param("fold m.pt2 -o a.pt2", marks=SLOW),
]


@pytest.mark.parametrize("line", FULL)
def test_a_full_disk_is_told_in_one_line(line: str, here: Path) -> None:
    before = contents(here)
    of_its_own = line.startswith("run")  # which imports no torch
    code, error = command(f"{line} -q", preexec_fn=no_room) if of_its_own else forked(f"{line} -q", no_room)
    assert (code, error.count("\n")) == (2, 1), error
    assert "File too large" in error
    assert contents(here) == before


def test_no_home_and_no_entry_of_the_user(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "USERNAME", "LNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    for line in ("inspect m.onnx", "run m.onnx x.npz", "run m.pt2 x.npz"):
        assert main([*line.split(), "-q"]) == 0


def test_a_file_that_goes_away_meanwhile(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(path: Path, **_: object) -> None:
        path.unlink()
        path.read_bytes()

    monkeypatch.setattr("deploynorm._inspect.inspect", gone)
    assert main(["inspect", "m.pt2"]) == 2
    shown = capsys.readouterr().err
    assert shown == "deploynorm inspect: cannot read or write a file: No such file or directory (m.pt2)\n"


def test_a_command_that_is_ended_cleans_up(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Once it has begun to write, which a reader of the fifo that it writes to keeps up."""
    temporary = tmp_path_factory.mktemp("temporary")
    os.mkfifo("fifo.json")
    words = [sys.executable, "-m", "deploynorm", "inspect", "m.onnx", "--json", "fifo.json", "-q"]
    process = subprocess.Popen(words, env={**os.environ, "TMPDIR": str(temporary)}, stderr=subprocess.PIPE, text=True)
    while not any(temporary.iterdir()):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (143, "deploynorm inspect: ended by SIGTERM\n")
    assert not any(temporary.iterdir())


@pytest.mark.usefixtures("usual_signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_of_which_a_library_makes_another_error(
    number: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def imported(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as error:
            raise ImportError("the compiled module cannot be imported") from error

    monkeypatch.setattr("deploynorm._inspect.inspect", imported)
    assert main(["inspect", "m.pt2"]) == 128 + number
    assert capsys.readouterr().err == f"deploynorm inspect: ended by {signal.Signals(number).name}\n"


@pytest.mark.parametrize(
    "line",
    ["inspect LONG.onnx", "export LONG.pt2", "export m.pt2 -o LONG.onnx", "run m.onnx x.npz --json LONG", "fold LOOP"],
)
def test_names_that_no_file_can_have_are_refused(line: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "LOOP").symlink_to("LOOP")
    before = contents(here)
    assert main(line.replace("LONG", "x" * 300).split()) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert contents(here) == before


def test_a_link_to_itself_can_be_written(here: Path) -> None:
    (here / "loop.json").symlink_to("loop.json")
    assert main(["inspect", "m.onnx", "--json", "loop.json", "-q"]) == 0
    assert (here / "loop.json").is_file()


def test_what_is_no_path_is_refused_in_python() -> None:
    exported = deploynorm.export(nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8), dynamic="none")
    paths: list[Any] = [None, 5, b"model.onnx", "", ".", "a\0b", "x" * 300, ["model.pt"]]
    for path in paths:
        for call in (deploynorm.load, exported.save, *([] if isinstance(path, bytes) else [deploynorm.open_runner])):
            with pytest.raises(InputError, match=r"(that is no path of a file|the name of the file is longer)"):
                call(path)


@pytest.mark.usefixtures("usual_signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("endless", [False, True])
def test_a_signal_waits_for_an_import_that_ends(
    number: int, endless: bool, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"slow_to_import_{endless}_{number}"
    module = "import os, signal, time\nos.kill(os.getpid(), {})\ntime.sleep({})\nopen('done', 'w').close()\n"
    (here / f"{name}.py").write_text(module.format(number, 30 if endless else 0.01))
    monkeypatch.syspath_prepend(here)
    monkeypatch.setattr("deploynorm.cli._IMPORT_SECONDS", 0.1 if endless else 60)
    monkeypatch.setattr("deploynorm._inspect.inspect", lambda *_, **__: (importlib.import_module(name), time.sleep(5)))
    assert main(["inspect", "m.pt2"]) == 128 + number
    assert (here / "done").exists() is not endless
    assert "Traceback" not in capsys.readouterr().err
