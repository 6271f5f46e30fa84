"""Where our files run: every network, lowering, type and kind of sizes on every runtime, against float64.

    python tests/runtimes --folder F            all of it, with the environments in F, where the next call finds them
    python tests/runtimes --only ncnn,openvino  some rows
    python tests/runtimes --quick               what CI runs: the rows that install in seconds, on a few files
    python tests/runtimes --write               and writes docs/runtimes.md and benchmarks/results/runtimes.json

The exit code is 1 where a number is wrong, or where a cell that is right in the record is so no more. Runtimes live in
environments of their own, which this makes; for the rows of Chromium, it has to be installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "benchmarks"), str(ROOT)]

import machine  # noqa: E402
import nets  # noqa: E402
import page  # noqa: E402
from cells import Cell, judge, run_jobs  # noqa: E402
from environments import Installed, install  # noqa: E402
from runtimes import PASSES, RUNTIMES, Runtime  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "runtimes.json"
PAGE = ROOT / "docs" / "runtimes.md"

PASSED = tuple(nets.File(net, "custom", "float32", "free") for net in ("frn", "unet"))
"""The files that the other tools change."""


def rows(only: Sequence[str], quick: bool) -> list[Runtime]:
    """The rows that were asked for; a pass over our file is a row too."""
    passes = [Runtime(name, "passes", "passes.py", name, takes="passes") for name in PASSES]
    asked = [row for row in (*RUNTIMES, *passes) if row.quick or not quick]
    if not only:
        return asked
    return [row for row in asked if any(word.lower() in row.title.lower() for word in only)]


def jobs_of(row: Runtime, jobs: dict[nets.File, dict[str, Any]]) -> list[dict[str, Any]]:
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
    parser.add_argument("--log", type=Path, help="for all that the runtimes print")
    options = parser.parse_args(arguments)
    asked = rows([word for word in options.only.split(",") if word], options.quick)
    if not asked:
        parser.error(f"no row has {options.only}")
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"cells": {}}
    with tempfile.TemporaryDirectory() as temporary:
        found = run(asked, nets.QUICK if options.quick else nets.FILES, Path(temporary), options.folder, options.log)
    bad = report(found, record["cells"])
    if options.write:
        record["cells"] = record["cells"] | found
        order = [row.title for row in rows([], quick=False)]
        record["cells"] = {title: record["cells"][title] for title in order if title in record["cells"]}
        record["machine"] = machine.describe("torch", "onnx", "numpy")
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        page.fill(PAGE, record["cells"])
    return 1 if bad else 0


def run(
    asked: Sequence[Runtime], files: Sequence[nets.File], temporary: Path, folder: Path | None, log: Path | None
) -> dict[str, dict[str, Cell]]:
    """The cells of each row. Environments are made beside the exports, since pip mostly waits."""
    where = temporary / "environments" if folder is None else folder.resolve()
    where.mkdir(parents=True, exist_ok=True)
    models = temporary / "models"
    models.mkdir()
    with ThreadPoolExecutor(4) as pool:
        names = dict.fromkeys(row.environment for row in asked if row.environment)
        installing: dict[str, Future[Installed]] = {name: pool.submit(install, name, where) for name in names}
        truths = {net: nets.truth(net) for net in dict.fromkeys(file.net for file in files)}
        jobs = nets.write(files, models)
        dtypes = {str(file): file.dtype for file in jobs}
        found = {}
        for row in asked:
            since = time.monotonic()
            wanted = jobs_of(row, jobs)
            try:
                installed = installing[row.environment].result() if row.environment else None
                results = run_jobs(row, installed, wanted, log)
            except Exception as error:
                results = {job["name"]: {"refused": f"not installed: {error}"} for job in wanted}
            found[row.title] = {
                job["name"]: judge(
                    results[job["name"]],
                    truths[job["net"]],
                    "int8" if row.how == "quantize_static" else dtypes.get(job["name"], "float32"),
                )
                for job in wanted
            }
            print(f"{row.title}: {len(wanted)} files, {time.monotonic() - since:.1f} s", flush=True)
    return found


def report(found: dict[str, dict[str, Cell]], before: dict[str, dict[str, Cell]]) -> int:
    """Prints every cell; returns how many are wrong, or were right in the record."""
    bad = 0
    for title, cells in found.items():
        for name, cell in cells.items():
            was = before.get(title, {}).get(name)
            lost = page.good(was) and not page.good(cell)
            bad += bool(cell.get("wrong") or lost)
            shown = "WRONG " * bool(cell.get("wrong")) + (f"{cell['error']:.1e}" if "error" in cell else "")
            told = " ".join(str(cell[key]) for key in ("text", "refused", "note") if key in cell)
            print(f"{title:<44} {name:<32} {shown} {told}{'  WAS RIGHT' if lost else ''}")
    return bad


if __name__ == "__main__":
    sys.exit(main())
