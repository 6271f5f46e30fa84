"""Where our files run: every network, lowering, type and kind of sizes on every runtime, against float64.

    python tests/runtimes --folder F            all of it, with the environments in F, where the next call finds them
    python tests/runtimes --only ncnn,openvino  some rows
    python tests/runtimes --quick               what CI runs: the rows that install in seconds, on a few files
    python tests/runtimes --write               and writes docs/runtimes.md and benchmarks/results/runtimes.json

The exit code is 1 where a number is wrong that is not so in the record, or a cell that is right there is so no more.
Runtimes live in environments of their own, which this makes; for the rows of Chromium, it has to be installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "benchmarks"), str(ROOT)]

import exported  # noqa: E402
import machine  # noqa: E402
import page  # noqa: E402
from cells import Cell, judge, run_jobs  # noqa: E402
from environments import Installed, install  # noqa: E402
from runtimes import PASSES, RUNTIMES, Runtime  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "runtimes.json"
PAGE = ROOT / "docs" / "runtimes.md"

PASSED = tuple(exported.File(net, "custom", "float32", "free") for net in ("frn", "unet"))
"""The files that the other tools change."""


def read_record() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"cells": {}}
    return record


def rows(only: Sequence[str], quick: bool) -> list[Runtime]:
    """The rows that were asked for; a pass over our file is a row too."""
    passes = [Runtime(name, "passes", "passes.py", name, takes="passes") for name in PASSES]
    asked = [row for row in (*RUNTIMES, *passes) if row.quick or not quick]
    if not only:
        return asked
    return [row for row in asked if any(word.lower() in row.title.lower() for word in only)]


def jobs_of(row: Runtime, jobs: dict[exported.File, dict[str, Any]]) -> list[dict[str, Any]]:
    if row.takes == "networks":
        first = {file.net: job["samples"][:1] for file, job in jobs.items()}
        return [{"name": net, "net": net, "samples": samples} for net, samples in first.items()]
    return [job for file, job in jobs.items() if row.takes == "files" or file in PASSED]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/runtimes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="for the environments (default: a temporary one)")
    parser.add_argument("--only", default="", metavar="A,B", help="rows whose titles have one of these words")
    parser.add_argument("--quick", action="store_true", help="what CI runs")
    parser.add_argument("--write", action="store_true", help="write the page and the record")
    parser.add_argument("--models", type=Path, help="for the ONNX files; those that are there are taken as they are")
    parser.add_argument("--log", type=Path, help="for all that the runtimes print")
    options = parser.parse_args(arguments)
    asked = rows([word for word in options.only.split(",") if word], options.quick)
    if not asked:
        parser.error(f"no row has {options.only}")
    if options.quick and options.write:
        parser.error("--quick leaves cells out, so that it cannot write the page")
    recorded = read_record()["cells"]
    with tempfile.TemporaryDirectory() as temporary:
        environments = options.folder or Path(temporary) / "environments"
        models = options.models or Path(temporary) / "models"
        for folder in (environments, models):
            folder.mkdir(parents=True, exist_ok=True)
        files = exported.QUICK if options.quick else exported.FILES
        found, bad = {}, 0
        for row, cells in run(asked, files, environments.resolve(), models.resolve(), options.log):
            found[row.title] = cells
            bad += report(row.title, cells, recorded.get(row.title, {}))
    if options.write:
        record = read_record()  # another call may have written
        record["cells"] |= found
        order = [row.title for row in rows([], quick=False)]
        record["cells"] = {title: record["cells"][title] for title in order if title in record["cells"]}
        record["machine"] = machine.describe("torch", "onnx", "numpy")
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        page.fill(PAGE, record["cells"])
    return 1 if bad else 0


def run(
    asked: Sequence[Runtime], files: Sequence[exported.File], environments: Path, models: Path, log: Path | None
) -> Iterator[tuple[Runtime, dict[str, Cell]]]:
    """The cells of each row. Environments are made beside the exports, since pip mostly waits."""
    with ThreadPoolExecutor(4) as pool:
        names = dict.fromkeys(row.environment for row in asked if row.environment)
        installing: dict[str, Future[Installed]] = {name: pool.submit(install, name, environments) for name in names}
        truths = {net: exported.truth(net) for net in dict.fromkeys(file.net for file in files)}
        jobs = exported.write(files, models)
        dtypes = {str(file): file.dtype for file in jobs}
        for row in asked:
            wanted = jobs_of(row, jobs)
            try:
                installed = installing[row.environment].result() if row.environment else None
            except Exception as error:
                results: dict[str, Any] = {job["name"]: {"refused": f"not installed: {error}"} for job in wanted}
            else:
                results = run_jobs(row, installed, wanted, log)
            quantized = row.how == "quantize_static"
            cells = {}
            for job in wanted:
                dtype = "int8" if quantized else dtypes.get(job["name"], "float32")
                cells[job["name"]] = judge(results[job["name"]], truths[job["net"]][: len(job["samples"])], dtype)
            yield row, cells


def report(title: str, cells: Mapping[str, Cell], before: Mapping[str, Cell]) -> int:
    """Prints the cells of a row; returns how many are wrong, and not in the record, or were right there."""
    bad = 0
    for name, cell in cells.items():
        was = before.get(name)
        lost = page.good(was) and not page.good(cell)
        bad += bool(lost or (cell.get("wrong") and not (was or {}).get("wrong")))
        error = f"{cell['error']:.1e}" if "error" in cell else ""
        words = [
            "WRONG" if cell.get("wrong") else "",
            error,
            *(cell.get(key, "") for key in ("text", "refused", "note")),
        ]
        words.append("(was right)" if lost else "")
        print(f"{title:<40} {name:<29} {' '.join(filter(None, words))}", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
