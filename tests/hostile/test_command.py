"""The command on changed and broken files, called in child processes: an exit code, never a traceback, nothing left."""

from __future__ import annotations

import hashlib
import importlib
import io
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from broken import BROKEN
from children import LeftError, tried
from kinds import KINDS, changed, fed
from torch import nn

from deploynorm.cli import main
from deploynorm.errors import InputError
from deploynorm.layers import FRN2d

VERBS = (
    "inspect broken.onnx --json new.json",
    "run broken.onnx x.npz -o new.npz --json new.json",
    "run broken.onnx x.npz -o new.npz --accept-changed --stock",
    "run broken.onnx x.npz -o new.npz --backend half",
    "run broken.onnx x.npz -o new.npz --backend reference",
    "run broken.onnx x.npz -o new.npz --backend eager",
    "run broken.onnx x.npz -o new.npz --backend tensorrt",
    "run copy.bin x.npz -o new.npz",
    "check m.pt2 broken.onnx --json new.json",
    "check m.pt2 broken.onnx --backend half",
    "check broken.onnx broken.onnx",
    "check broken.onnx good.onnx",
    "rewrite broken.onnx --optimize-for-cpu -o new.onnx",
    "build broken.onnx -o new.engine --compute-capability 8.9 --opt-shapes X:2x4x8x8 --optimization-level 0",
    "build broken.onnx -o new.engine --compute-capability 8.9",
    "export broken.onnx -o new.onnx",
    "fold broken.onnx -o new.pt2",
    "inspect copy.bin",
)
"""Every verb that takes a file, with an ONNX file in each of its places; `copy.bin` is one under another name."""

OUTPUTS = {"new.json", "new.npz", "new.onnx", "new.onnx.data", "new.deploynorm.json", "new.engine", "new.engine.json"}
OUTPUTS |= {"new.pt2", "y.npz", "y.json"}


class Network(nn.Module):
    """What broken.onnx was, before it broke."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = FRN2d(4)

    def forward(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803
        value: torch.Tensor = self.norm(X)
        return value


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str], None]) -> Mapping[str, bytes]:
    """What lies beside a broken file; and the command has been used, so that the children have it all in memory."""
    require("ort")
    folder = tmp_path_factory.mktemp("good")
    program = torch.export.export(Network().eval(), (torch.ones(2, 4, 8, 8),))
    torch.export.save(program, folder / "m.pt2")
    (folder / "x.npz").write_bytes(fed())
    made = folder / "good.onnx"
    for line in (f"export {folder}/m.pt2 -o {made}", f"check {folder}/m.pt2 {made}", f"fold {folder}/m.pt2"):
        assert main([*line.split(), "-q"]) == 0
    for name in ("polygraphy", "tensorrt_rtx", "onnx.reference"):
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    return {name: (folder / name).read_bytes() for name in ("m.pt2", "x.npz", "good.onnx")}


def contents(folder: Path) -> dict[str, str]:
    """The files below a folder by their names, and what is in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def called(line: str, folder: Path) -> int:
    """Calls the command in that folder, where its temporary files go too; the exit code, which must be one of ours.

    A failure leaves every file as it was, and whatever becomes of it, nothing but its outputs is new.
    """
    before, said = contents(folder), io.StringIO()
    with redirect_stderr(said):
        code = main(line.split())
    assert code in (0, 1, 2, 3), f"{line!r} ended in {code}: {said.getvalue()[-600:]}"
    assert "Traceback" not in said.getvalue(), f"{line!r} printed {said.getvalue()[-600:]}"
    assert code in (0, 1) or said.getvalue().strip(), f"{line!r} ended in {code} without a word"
    after = contents(folder)
    new = {name for name in after if after[name] != before.get(name)} | (before.keys() - after.keys())
    if new := new - (OUTPUTS if code in (0, 1) else set()):
        raise LeftError(f"{line!r} left {sorted(new)}")
    return code


def count_as_refused(code: int) -> None:
    if code != 0:
        raise InputError("command", f"ended in {code}")


CASES = [(name, line) for name in BROKEN for line in VERBS]


@pytest.mark.parametrize("line", ["a tenth of all", *(pytest.param(line, marks=pytest.mark.slow) for line in VERBS)])
def test_every_verb_refuses_or_reads_every_broken_file(
    line: str, good: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def call(case: tuple[str, str]) -> None:
        name, line = case
        folder = tmp_path / hashlib.sha256(f"{name} {line}".encode()).hexdigest()[:12]
        folder.mkdir()
        (folder / "folder").mkdir()
        monkeypatch.chdir(folder)
        for each, content in {**good, "broken.onnx": BROKEN[name], "copy.bin": BROKEN[name]}.items():
            if content is not None:
                (folder / each).write_bytes(content)
        code = called(line, folder)
        shutil.rmtree(folder)
        count_as_refused(code)

    cases = [case for case in CASES if case[1] == line] or CASES[::10]
    figures, faults = tried(cases, call, seconds=60)
    figures["left"] += len([path for path in tmp_path.iterdir() if path.is_file() or "deploynorm" in path.name])
    print(f"broken ONNX files, {line}: {figures}")
    figures.assert_harmless(len(BROKEN), faults)


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.command])
def test_the_command_reads_or_refuses_changed_files(
    name: str, count: int, good: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kind = KINDS[name]
    files, output = kind.make(), tmp_path / "y.npz"
    for path in tmp_path.iterdir():
        path.unlink()
    for each, content in files.items():
        Path(each).write_bytes(content)
    assert kind.command is not None
    assert called(kind.command, tmp_path) == 0
    whole = dict(np.load(output)) if output.exists() else {}

    def call(seed: int) -> None:
        output.unlink(missing_ok=True)
        Path(kind.changes).write_bytes(changed(files[kind.changes], seed + 10_000))
        code = called(str(kind.command), tmp_path)
        if code == 0 and whole:
            said = dict(np.load(output))
            same = said.keys() == whole.keys() and all(np.array_equal(said[key], whole[key]) for key in whole)
            assert same or not kind.guarded, "a damaged file is accepted"
        count_as_refused(code)

    figures, faults = tried(range(count), call)
    print(f"command, {name}: {figures}")
    figures.assert_harmless(count, faults)
