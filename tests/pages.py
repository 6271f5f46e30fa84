"""Reads the documentation's pages, and runs their blocks of code as a reader types them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deploynorm import libraries
from deploynorm.cli import _parser, main
from deploynorm.models.training.options import build_parser

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "README.md",
    "docs/*.md",
    "models/README.md",
    "models/web/README.md",
    "benchmarks/README.md",
    "benchmarks/*/README.md",
)
PAGES = [str(path.relative_to(ROOT)) for pattern in FOLDERS for path in sorted(ROOT.glob(pattern))]

_TRAINING = ["-m", "deploynorm.models.train"]
_TYPED = ("pytest", "mypy", "ruff", "git", "cd", "cp", "tar", "npm", "apt-get", "cmake", "g++", "trtexec",
          "tritonserver", "polygraphy", "nvidia-smi")  # fmt: skip
"""Programs of others, whose arguments are not checked."""


@dataclass(frozen=True)
class Block:
    """A fenced block, with the comments `<!-- mark: value -->` that stand above it.

    The marks: `command` names a block and `output` what it prints; `file` is the name of a file that the block is;
    `requires` names backends as DEPLOYNORM_REQUIRE does; `not run` says why a block is only parsed.
    """

    language: str
    text: str
    line: int
    marks: dict[str, str]

    def commands(self) -> Iterator[list[str]]:
        """The words of each command of a shell block."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = text_of(page)
    found = []
    for match in re.finditer(r"((?:^<!-- .*? -->\n)*)^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        marks = dict(re.findall(r"<!-- ([\w ]+): (.*?) -->", match[1], re.DOTALL))
        found.append(Block(match[2], match[3], text.count("\n", 0, match.start(2)) + 1, marks))
    assert text.count("```") == 2 * len(found), f"{page}: a fenced block is not closed or has marks that are not read"
    return found


@dataclass
class Reader:
    """Goes through a page in one folder and one Python process.

    Attributes:
        page: Its path in the repository.
        require: The fixture of tests/conftest.py.
        namespace: What the Python blocks have defined.
        printed: What each named block printed.
    """

    page: str
    require: Callable[[str], None]
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})
    printed: dict[str, str] = field(default_factory=dict)

    def read(self) -> None:
        """Runs every block. A block whose backend is missing is left out, and at last the test is skipped for it."""
        left_out = []
        for block in blocks(self.page):
            try:
                for backend in re.findall(r"[\w-]+", block.marks.get("requires", "")):
                    self.require(backend)
            except pytest.skip.Exception as missing:
                left_out.append(f"line {block.line}: {missing}")
                continue
            try:
                self._run(block)
            except BaseException:
                print(f"in the block at line {block.line} of {self.page}", file=sys.stderr)
                raise
        if left_out:
            pytest.skip(f"blocks of {self.page} were not run: {'; '.join(left_out)}")

    def _run(self, block: Block) -> None:
        if "output" in block.marks:
            assert comparable(self.printed[block.marks["output"]]) == comparable(block.text)
            return
        assert block.language in ("python", "bash", "text", "toml", "cpp"), f"unknown language {block.language!r}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if block.language == "python":
                self._run_python(block)
            elif block.language == "cpp" and "file" in block.marks:
                self._compile(block)
            elif block.language == "bash":
                for words in block.commands():
                    self._run_command(words, block)
        self.printed[block.marks.get("command", "")] = printed.getvalue()

    def _run_python(self, block: Block) -> None:
        # Lines as in the page, so that a traceback shows them.
        code = compile("\n" * block.line + block.text, str(ROOT / self.page), "exec")
        if "file" in block.marks:
            Path(block.marks["file"]).write_text(block.text, encoding="utf-8")
        elif "not run" not in block.marks:
            exec(code, self.namespace)

    def _compile(self, block: Block) -> None:
        """To an object file alone: what it links is not here."""
        Path(block.marks["file"]).write_text(block.text, encoding="utf-8")
        headers = ["-isystem", os.environ["TENSORRT_INCLUDE_DIR"]]
        words = [str(libraries.find_cuda().nvcc), "-std=c++17", "-Xcompiler=-Wall,-Wextra,-Werror", *headers]
        done = subprocess.run([*words, "-c", block.marks["file"]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def _run_command(self, words: list[str], block: Block) -> None:
        program, *arguments = words
        only_parsed = "not run" in block.marks
        if program == "pip":
            check_pip(arguments)
        elif program == "deploynorm" and only_parsed:
            for name in arguments:
                if re.fullmatch(r"[\w./]+\.(onnx|pt|pt2|engine|txt)", name):
                    Path(name).touch()
            _parser().parse_args(arguments)
        elif words[:2] == ["deploynorm", "build"]:  # in a process of its own, which TensorRT may end
            done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif program == "deploynorm":
            assert main(arguments) == 0, words
        else:
            assert only_parsed, f"{program} is not run here: say why in a comment <!-- not run: ... -->"
            check_other(words)


def check_pip(arguments: list[str]) -> None:
    """Looks whether the extras and files of a `pip install` exist."""
    _, _, table = text_of("pyproject.toml").partition("[project.optional-dependencies]")
    extras = re.findall(r"^([\w-]+) = \[", table.partition("\n[")[0], re.MULTILINE)
    assert arguments[0] == "install"
    for word in arguments[1:]:
        for names in re.findall(r"\[([\w,-]+)\]", word):
            assert set(names.split(",")) <= set(extras), word
        if word.endswith(".txt"):
            assert (ROOT / word).exists(), word


def check_other(words: list[str]) -> None:
    """Looks whether a command that takes too long here names a program of this repository, with its options."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, *arguments = words
    if program in ("python", "torchrun") and all(word in arguments for word in _TRAINING):
        build_parser().parse_args(arguments[arguments.index(_TRAINING[1]) + 1 :])
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), arguments[1]
    elif program == "python":
        assert (ROOT / arguments[0]).exists(), arguments[0]
    else:
        assert program in _TYPED or (ROOT / program).exists(), program
    for word in arguments:
        if "/" in word and program in ("pytest", "ruff", "mypy"):
            assert (ROOT / word).exists(), word


def comparable(printed: str) -> list[str]:
    """Lines less what another processor changes: rounding, the sample where it is worst, and so the widths."""
    printed = re.sub(r"\b\d\.\d\de[-+]\d\d\b|\b(\w+ )?\d+(x\d+){3}\b|\d+\.\d+%", "#", printed)
    return [" ".join(line.split()) for line in printed.splitlines() if line.strip()]


def read_page(page: str, folder: Path, require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Runs a page in a folder that has what a clone has at its top."""
    for name in ("models", "benchmarks", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # as Python does where it is started
    reader = Reader(page, require)
    try:
        reader.read()
    finally:
        for block in blocks(page):
            sys.modules.pop(Path(block.marks.get("file", "")).stem, None)
    return reader
