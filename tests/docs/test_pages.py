"""The blocks of every page are run as they stand, page by page, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pages import PAGES, blocks, comparable, read_page, text_of


def _named(name: str) -> str:
    return next(block.text for block in blocks("README.md") if block.marks.get("command") == name)


def test_commands_of_the_readme_install_from_the_clone_with_the_tested_versions() -> None:
    for name, extras in (("main", "[cpu]"), ("test", "[cpu,test]")):
        assert _named(name).startswith(f'pip install ".{extras}" -c constraints.txt && ')
    assert _named("test").strip().endswith("&& pytest")


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= 1500


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require: Callable[[str], None]) -> None:
    require("ort")
    require("native")
    reader = read_page(page, tmp_path, require, monkeypatch)
    if page == "README.md":
        shown = comparable(reader.printed["convert"])
        assert "note: H and W: multiples of 4" in shown
        assert comparable(reader.printed["export"])[: len(shown)] == shown
        assert "Ankle boot" in reader.printed["run"]
        assert (tmp_path / "mask.engine.json").exists()
