"""The matrix loses no cell: a runtime that dies, hangs or computes something else gets its reason or its number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ADAPTER = """
import os, time
import numpy as np

def run(job, samples, how):
    match job["name"].partition(".")[0]:
        case "dies": os.kill(os.getpid(), 11)
        case "ends": raise SystemExit("no licence")
        case "hangs": time.sleep(60)
        case "raises": raise RuntimeError("at /a/b.cpp:84:\\nNo conversion rule for FRN")
        case "builds": return "builds"
        case "notes": return samples, "as given"
    return samples
"""


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture
def adapted(matrix: None, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What becomes of jobs of these names."""
    from cells import run_jobs
    from runtimes import Runtime

    (tmp_path / "adapter.py").write_text(ADAPTER)
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    (tmp_path / "x.bin").write_bytes(x.tobytes())

    def adapted(*names: str, text: str | None = None) -> dict[str, Any]:
        if text is not None:
            (tmp_path / "adapter.py").write_text(text)
        samples = [{"path": str(tmp_path / "x.bin"), "shape": [1, 2, 3]}]
        runtime = Runtime("a runtime", "", str(tmp_path / "adapter.py"), seconds=2)
        return run_jobs(runtime, None, [{"name": name, "model": "", "samples": samples} for name in names])

    return adapted


def test_every_job_has_an_outcome_whatever_one_does(adapted: Callable[..., dict[str, Any]]) -> None:
    names = ("first", "dies.1", "dies.2", "ends", "raises", "hangs", "builds", "notes", "last")
    found = adapted(*names)
    assert set(found) == set(names)
    assert [found[name].get("text") or found[name].get("refused") for name in names[1:7]] == [
        "dies of SIGSEGV",
        "dies of SIGSEGV",
        "ends with 1, after: no licence",
        "RuntimeError: at /a/b.cpp:84:\nNo conversion rule for FRN",
        "takes more than 2 s",
        "builds",
    ]
    for name in ("first", "notes", "last"):
        np.testing.assert_array_equal(found[name]["outputs"], [[[[0, 1, 2], [3, 4, 5]]]])


def test_a_runtime_that_cannot_be_imported_is_a_reason_for_each(adapted: Callable[..., dict[str, Any]]) -> None:
    found = adapted("one", "two", text="import no_such_runtime")
    assert {line["refused"] for line in found.values()} == {
        "ends with 1, after: ModuleNotFoundError: No module named 'no_such_runtime'"
    }


OUT = np.array([[1.0, -4.0]])


@pytest.mark.parametrize(
    ("result", "dtype", "cell"),
    [
        ({"outputs": [OUT + 4e-5]}, "float32", {"error": 1e-5, "wrong": False}),
        ({"outputs": [OUT + 4e-3]}, "float32", {"error": 1e-3, "wrong": True}),
        ({"outputs": [OUT + 4e-3], "note": "n"}, "float16", {"error": 1e-3, "wrong": False, "note": "n"}),
        ({"outputs": [OUT * np.nan]}, "float16", {"error": float("inf"), "wrong": True}),
        ({"outputs": [OUT[0]]}, "float32", {"error": float("inf"), "wrong": True, "refused": "shape (2,), not (1, 2)"}),
        ({"text": "builds"}, "float32", {"text": "builds"}),
        ({"refused": "\x1b[31mat /root/a/b.cpp:3 of 0x7f0123456789:\nno rule: unsupported operator FRN"}, "float32",
         {"refused": "no rule: unsupported operator FRN"}),
        ({"refused": "of frn.custom.float16.free.onnx: fails"}, "float32", {"refused": "of model.onnx: fails"}),
        ({"refused": "in /root/a/b.cpp:3 at 0x7f0123456789"}, "float32", {"refused": "in b.cpp:3 at 0x..."}),
        ({"refused": "x" * 300}, "float32", {"refused": "x" * 237 + "..."}),
        ({"refused": f"[12:00:01] {'x' * 300} invalid"}, "float32", {"refused": f"...{'x' * 59} invalid"}),
    ],
)  # fmt: skip
def test_a_cell_is_a_number_or_a_reason(matrix: None, result: Any, dtype: str, cell: dict[str, Any]) -> None:
    from cells import judge

    got = judge(result, [OUT], dtype)
    assert got.pop("error", None) == pytest.approx(cell.pop("error", None))
    assert got == cell


def test_fewer_outputs_than_samples_are_wrong(matrix: None) -> None:
    from cells import judge

    assert judge({"outputs": [OUT]}, [OUT, OUT], "float32")["refused"] == "1 outputs, not 2"
    assert judge({"outputs": [OUT, OUT]}, [OUT, OUT + 1], "float32")["wrong"]


def test_tables_show_both_sizes_and_what_is_wrong(matrix: None) -> None:
    import page

    right = {"error": 3e-7, "wrong": False}
    cells: dict[str, Any] = {str(file): right for file in page.FILES}
    assert page.advice(cells) == "custom"
    cells["frn.custom.float16.fixed"] = {"error": 0.77, "wrong": True}
    assert page.advice(cells) == "primitives"
    for size in page.SIZES:
        cells[f"unet.rmsnorm.float32.{size}"] = {"refused": "no `rule`"}
    cells["unet.primitives.float32.free"] = {"refused": "no `rule`"}
    assert page.advice(cells) == "custom in float32"
    text = page.tables({page.RUNTIMES[0].title: cells})
    assert "fixed **WRONG: 0.77**, free 3e-7" in text
    assert "| no (1) | fixed 3e-7, free no (1) |" in text
    assert "1. `no 'rule'`" in text
    assert page.advice({}) == "none"


EXPLAINED = {("LiteRT by onnx2tf 1.29.24", f"unet.primitives.{dtype}.free") for dtype in ("float32", "float16")}
"""Wrong cells, whose cause docs/runtimes.md tells."""


def test_the_page_has_the_recorded_cells(matrix: None) -> None:
    import page

    root = Path(__file__).parents[2]
    record = json.loads((root / "benchmarks/results/runtimes.json").read_text())["cells"]
    _, _, rest = (root / "docs/runtimes.md").read_text().partition(page.BEGIN)
    assert rest.partition(page.END)[0].strip() == page.tables(record).strip()
    assert set(record) == {row.title for row in page.RUNTIMES} | set(page.PASSES), "run tests/runtimes --write"
    wrong = {(title, name) for title, cells in record.items() for name, cell in cells.items() if cell.get("wrong")}
    assert wrong == EXPLAINED


def test_only_what_is_known_to_be_wrong_or_refused_passes(
    matrix: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from serve import load

    program = load(Path(__file__).with_name("__main__.py"))
    right, wrong, refused = {"error": 1e-7}, {"error": 0.5, "wrong": True}, {"refused": "no"}
    for now, before, bad in [
        (right, None, 0), (right, wrong, 0), (wrong, wrong, 0),
        (refused, refused, 0), (refused, None, 0), (refused, wrong, 0),
        (wrong, None, 1), (wrong, right, 1), (wrong, refused, 1), (refused, right, 1),
    ]:  # fmt: skip
        assert program.report("row", {"file": now}, {} if before is None else {"file": before}) == bad, (now, before)
    assert capsys.readouterr().out.count("(was right)") == 2
