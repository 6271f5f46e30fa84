"""The programs that the pages name start where the pages put the reader: at the top of a clone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if "ArgumentParser(" in path.read_text())

HELP = """
import contextlib, io, os, runpy, sys

def shows_its_help(start, first_on_path):
    sys.path[0] = first_on_path
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            start()
        except SystemExit as end:
            assert end.code == 0
    assert out.getvalue().startswith("usage: ")

root, *programs = sys.argv[1:]
os.chdir(root)
sys.argv[1:] = ["--help"]
for name in programs:
    print(name, file=sys.stderr)
    path = os.path.join("benchmarks", name)
    shows_its_help(lambda: runpy.run_path(path, run_name="__main__"), os.path.abspath("benchmarks"))
print("deploynorm.models.train", file=sys.stderr)
shows_its_help(lambda: runpy.run_module("deploynorm.models.train", run_name="__main__"), root)
"""


@pytest.mark.slow
def test_every_program_shows_its_help() -> None:
    """In one process, since each imports torch, with the import path that `python PROGRAM` and `python -m` have."""
    assert {"gpu.py", "ort_cpu.py", "training.py"} <= set(PROGRAMS)
    command = [sys.executable, "-c", HELP, str(ROOT), *PROGRAMS, "batch_size_study"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_program_is_in_the_table_of_its_page() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert [name for name in PROGRAMS if f"| `{name}` |" not in page] == []
