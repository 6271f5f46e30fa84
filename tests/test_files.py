"""Files appear whole under their name, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploynorm.errors import InputError
from deploynorm.files import sha256, staging, write_text


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_write_that_breaks_off_keeps_the_file_before_it(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")

    def write() -> None:
        with staging(target) as folder:
            (folder / target.name).write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.onnx", "old")]


def test_nothing_is_seen_before_the_block_ends_and_the_file_asked_for_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that waits for model.onnx must find its weights there."""
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(new).name), replace(old, new)))
    with staging(tmp_path / "model.onnx") as folder:
        for name in ("a.json", "model.onnx", "model.onnx.data"):
            (folder / name).write_text("new")
        assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "model.onnx", "model.onnx.data"]
    assert (len(moved), moved[-1]) == (3, "model.onnx")


@pytest.mark.parametrize("target", ["missing/out.txt", "."])
def test_a_place_that_takes_no_file_is_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(InputError, match="cannot write there"):
        write_text(tmp_path / target, "text")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
