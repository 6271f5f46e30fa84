"""What the pages name exists, and their blocks are run as they stand, page by page, each in a folder of its own."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, comparable, read_page, text_of

from deploynorm.cli import _parser


def _named(name: str) -> str:
    return next(block.text for block in blocks("README.md") if block.marks.get("command") == name)


def test_commands_of_the_readme_install_from_the_clone_with_the_tested_versions() -> None:
    for name, extras in (("main", "[cpu]"), ("test", "[cpu,test]")):
        assert _named(name).startswith(f'pip install ".{extras}" -c constraints.txt && ')
    assert _named("test").strip().endswith("&& pytest")


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= 1500


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # of torch.onnx.export about itself
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if page == "README.md" else pytest.mark.slow) for page in PAGES if blocks(page)],
)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's own exporter
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


_TOP = r"(?:models|benchmarks|docs|tests|deploynorm|plugins|\.ci)"


def _anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _verbs() -> dict[str, argparse.ArgumentParser]:
    (verbs,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(verbs.choices)


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    here = (ROOT / page).parent
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text_of(page)):
        found = (here / target).resolve() if target else ROOT / page
        assert found.exists(), target
        if anchor:
            assert anchor in _anchors(str(found.relative_to(ROOT))), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_files(page: str) -> None:
    """A path from the top of the repository, anywhere in the text."""
    for name in re.findall(rf"(?<![\w/.(-]){_TOP}/[\w./-]*[\w/]", text_of(page)):
        assert (ROOT / name).exists(), name


def test_tables_named_by_the_list_of_changes() -> None:
    """Each row of docs/contributing.md that says `NAME` in `file`: the file defines that name."""
    named = re.findall(r"`(\w+)` (?:in|of) `([\w./]+)`", text_of("docs/contributing.md"))
    assert len(named) >= 12
    for name, file in named:
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8")), f"{name} in {file}"


@pytest.mark.parametrize("verb", _verbs())
def test_options_of_each_verb(verb: str) -> None:
    """docs/command_line.md has a section for each verb, with all of its options and no others."""
    sections = re.split(r"^## (\w+)$", text_of("docs/command_line.md"), flags=re.MULTILINE)
    section = sections[sections.index(verb) + 1]
    known = {text for action in _verbs()[verb]._actions for text in action.option_strings if text.startswith("--")}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", section)) == known - {"--help"}


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, left = {"README.md"}, ["README.md"]
    while left:
        page = left.pop()
        for target in re.findall(r"\]\((?!https?:)([^)#]+\.md)", text_of(page)):
            name = str(((ROOT / page).parent / target).resolve().relative_to(ROOT))
            if name in PAGES and name not in reached:
                reached.add(name)
                left.append(name)
    assert reached == set(PAGES)


def test_no_path_of_one_machine() -> None:
    for page in [*PAGES, "CHANGELOG.md"]:
        assert not re.search(r"/(work|tmp|home|root)/", text_of(page)), page
