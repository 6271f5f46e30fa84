from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("required", "outcome"), [("native,trt", pytest.skip.Exception), ("ort,trt", pytest.fail.Exception)]
)
def test_a_missing_backend_skips_with_its_reason_unless_it_is_required(
    required: str, outcome: type[BaseException], require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("DEPLOYNORM_REQUIRE", required)
    # Both are caught: otherwise a wrong skip would skip this test and not fail it.
    with pytest.raises(
        (pytest.skip.Exception, pytest.fail.Exception), match="ort: onnxruntime is not installed"
    ) as got:
        require("ort")
    assert got.type is outcome


@pytest.fixture
def conftest(pytestconfig: pytest.Config) -> Any:
    return pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


def test_the_cache_of_the_user_is_not_that_of_the_tests() -> None:
    cache = Path(os.environ["XDG_CACHE_HOME"])
    assert cache.name.startswith("deploynorm-tests-")
    assert not any(cache.rglob("*.so"))


def test_all_skips_are_one_line_with_each_reason(conftest: Any) -> None:
    reasons = ["ort: none", "data: none", "ort: none"]
    skipped = [SimpleNamespace(longrepr=("a file", 1, f"Skipped: {reason}")) for reason in reasons]
    lines: list[str] = []
    conftest.pytest_terminal_summary(SimpleNamespace(stats={"skipped": skipped}, write_line=lines.append))
    assert lines == ["skipped 3: 2 since ort: none; 1 since data: none"]


Source = pytest.Config.ArgsSource


@pytest.mark.parametrize(
    ("source", "given", "processes"), [(Source.TESTPATHS, None, 2), (Source.TESTPATHS, 0, 0), (Source.ARGS, None, None)]
)
def test_a_plain_pytest_takes_two_processes(
    conftest: Any, monkeypatch: pytest.MonkeyPatch, source: Source, given: int | None, processes: int | None
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    config = SimpleNamespace(args_source=source, option=SimpleNamespace(numprocesses=given, usepdb=False))
    conftest.pytest_cmdline_main(config)
    assert config.option.numprocesses == processes
