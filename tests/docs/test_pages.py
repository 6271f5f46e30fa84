"""The blocks of every page but the README are run as they stand, page by page, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pages import PAGES, blocks, read_page


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(page)])
def test_blocks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require: Callable[[str], None]) -> None:
    require("ort")
    require("native")
    read_page(page, tmp_path, require, monkeypatch)
