"""Changed files of each kind, read in child processes: read or refused by one of our errors, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from children import tried
from kinds import KINDS, changed


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_changed_files_are_read_or_refused(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind = KINDS[name]
    files = kind.make()
    for each, content in files.items():
        Path(each).write_bytes(content)
    path = tmp_path / kind.changes
    whole = kind.read(path)
    there = set(tmp_path.iterdir())

    def call(seed: int) -> None:
        path.write_bytes(changed(files[kind.changes], seed))
        said = kind.read(path)
        assert not kind.guarded or said == whole, "a damaged file is accepted"

    figures, faults = tried(range(count), call)
    figures["left"] = len(set(tmp_path.iterdir()) - there)
    print(f"{name}: {figures}")
    figures.assert_harmless(count, faults)
