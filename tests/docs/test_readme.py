"""The README's blocks are run as they stand, in order, in one folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pages import blocks, comparable, read_page, text_of


def _named(name: str) -> str:
    return next(block.text for block in blocks("README.md") if block.marks.get("command") == name)


def test_commands_install_from_the_clone_with_the_tested_versions() -> None:
    for name, extras in (("main", "[cpu]"), ("test", "[cpu,test]")):
        assert _named(name).startswith(f'pip install ".{extras}" -c constraints.txt && ')
    assert _named("test").strip().endswith("&& pytest")


def test_it_is_short() -> None:
    assert len(text_of("README.md").split()) <= 1500


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require: Callable[[str], None]) -> None:
    require("ort")
    require("native")
    reader = read_page("README.md", tmp_path, require, monkeypatch)
    shown = comparable(reader.printed["convert"])
    assert "note: H and W: multiples of 4" in shown
    assert comparable(reader.printed["export"])[: len(shown)] == shown
    assert "Ankle boot" in reader.printed["run"]
    assert (tmp_path / "mask.engine.json").exists()
