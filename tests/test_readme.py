"""The README's commands and code are run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploynorm.cli import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def _marked(name: str) -> str:
    """The fenced block that follows the comment `<!-- name -->`."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```\w*\n(.*?)```", TEXT, re.DOTALL)
    assert found, f"README.md has no block marked {name!r}"
    return found[1]


def _verb(command: str) -> list[str]:
    """The arguments of the `deploynorm` call in a shell command."""
    words = shlex.split(command)
    return words[words.index("deploynorm") + 1 :]


def test_commands_install_from_the_clone_with_the_tested_versions() -> None:
    for name, extras in (("command: main", "[cpu]"), ("command: test", "[cpu,test]")):
        assert _marked(name).startswith(f'pip install ".{extras}" -c constraints.txt && ')
    assert _marked("command: test").strip().endswith("&& pytest")


def test_main_command_prints_what_the_readme_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, require: Callable[[str], None]
) -> None:
    """But for the errors: they are rounding, and another processor rounds otherwise."""
    require("ort")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    assert main(_verb(_marked("command: main"))) == 0

    def without_errors(text: str) -> list[str]:
        text = re.sub(r"\d\.\d\de-\d\d", "#", text)
        return [" ".join(line.split()) for line in text.splitlines() if line.strip()]

    assert without_errors(capsys.readouterr().out) == without_errors(_marked("output: main"))
    run = next(line for line in TEXT.splitlines() if line.startswith("deploynorm run "))
    assert main(_verb(run)) == 0
    assert "Ankle boot" in capsys.readouterr().out


def test_rewrite_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require: Callable[[str], None]) -> None:
    require("ort")
    require("native")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    for command in _marked("command: rewrite").splitlines():
        assert main(_verb(command)) == 0
    assert (tmp_path / "frn.here.onnx").exists()


def test_build_commands_run(tmp_path: Path, require: Callable[[str], None]) -> None:
    """In processes of their own, as TensorRT may end one."""
    require("trt-rtx")
    (tmp_path / "models").symlink_to(ROOT / "models")
    for command in _marked("command: build").splitlines():
        words = [sys.executable, "-m", "deploynorm", *_verb(command)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "frn16.engine").stat().st_size > 100_000
    assert (tmp_path / "frn16.engine.json").exists()


def test_python_blocks_run_one_after_the_other(tmp_path: Path, require: Callable[[str], None]) -> None:
    require("ort")
    require("native")
    program = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    assert program.count("deploynorm") >= 4
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", "models/README.md", "benchmarks/README.md"])
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for name in re.findall(r"(?<![\w/])(?:models|benchmarks)/[\w/]+\.\w+", text):
        assert (ROOT / name).exists(), name
