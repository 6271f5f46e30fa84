"""Runs the files of the matrix in a runtime's own process, and compares: each cell gets a number or a reason."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from environments import Installed
from runtimes import Runtime

from deploynorm._check.comparison import DEFAULT_TOLERANCE

__all__ = ["Cell", "judge", "run_jobs"]

HERE = Path(__file__).parent

Cell = dict[str, Any]
"""{"error": relative to max|y|, "wrong": above the tolerance}, {"text": "builds"} or {"refused": the reason}; some with
the "note" of the adapter."""

QUANTIZED = 0.25
"""Of 8 bits, calibrated with three images: it tells whether the file computes that network at all, no more."""


def run_jobs(
    runtime: Runtime, installed: Installed | None, jobs: Sequence[Mapping[str, Any]], log: Path | None = None
) -> dict[str, Any]:
    """What became of each job, by its name, as serve.py says it. After a crash the next process goes on behind it."""
    done: dict[str, Any] = {}
    while left := [job for job in jobs if job["name"] not in done]:
        with tempfile.TemporaryDirectory() as folder:
            given, results = Path(folder) / "jobs.json", Path(folder) / "results.jsonl"
            given.write_text(json.dumps(left))
            results.touch()
            ending = _serve(runtime, installed, given, results, log)
            begun, before = None, len(done)
            for line in map(json.loads, results.read_text(encoding="utf-8").splitlines()):
                begun = line.get("begins", begun)
                if name := line.get("name"):
                    if "outputs" in line:
                        line["outputs"] = [
                            np.fromfile(y["path"], np.float32).reshape(y["shape"]) for y in line["outputs"]
                        ]
                    done[name] = line
            if begun is not None and begun not in done:
                done[begun] = {"refused": ending}
            elif len(done) == before:  # it did not come to the first job
                done |= {job["name"]: {"refused": ending} for job in left}
    return done


def _serve(runtime: Runtime, installed: Installed | None, jobs: Path, results: Path, log: Path | None) -> str:
    """Runs one process to its end, or until a job takes too long; returns how it ended."""
    adapter = HERE / "inside" / runtime.adapter
    if adapter.suffix == ".mjs":
        assert installed is not None
        words = [str(installed.node), str(HERE / "serve.mjs")]
    else:
        words = [sys.executable if installed is None else str(installed.python), str(HERE / "serve.py")]
    variables = dict(os.environ) if installed is None else installed.variables()
    variables |= {"OMP_NUM_THREADS": "2", "TMPDIR": str(jobs.parent)}
    words += [str(adapter), runtime.how, str(jobs), str(results)]
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(
            words, cwd=jobs.parent, env=variables, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        size, since, timed_out = 0, time.monotonic(), False
        while process.poll() is None:
            if (now := results.stat().st_size) != size:
                size, since = now, time.monotonic()
            if timed_out := time.monotonic() - since > runtime.seconds:
                break
            time.sleep(0.05)
        with suppress(ProcessLookupError):  # its children too, such as a browser
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        printed.seek(0)
        text = printed.read()
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            print(f"==== {runtime.title}: {code}\n{text}", file=file)
            print(results.read_text(encoding="utf-8"), file=file)
    if timed_out:
        return f"takes more than {runtime.seconds:.0f} s"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    last = f", after: {lines[-1].strip()}" if lines else ""
    return (f"dies of {signal.Signals(-code).name}" if code < 0 else f"ends with {code}") + last


def judge(result: Mapping[str, Any], truth: Sequence[np.ndarray[Any, Any]], dtype: str) -> Cell:
    """Compares outputs with the network in float64: the largest difference, relative to the largest value."""
    note = {"note": result["note"]} if "note" in result else {}
    if "text" in result:
        return {"text": result["text"]} | note
    if "refused" in result:
        return {"refused": reason(result["refused"])} | note
    if len(result["outputs"]) != len(truth):
        return {"error": math.inf, "wrong": True, "refused": f"{len(result['outputs'])} outputs, not {len(truth)}"}
    allowed = QUANTIZED if dtype == "int8" else DEFAULT_TOLERANCE[dtype].rtol
    worst = 0.0
    for got, want in zip(result["outputs"], truth, strict=True):
        if got.shape != want.shape:
            return {"error": math.inf, "wrong": True, "refused": f"shape {got.shape}, not {want.shape}"} | note
        error = float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())
        worst = max(worst, math.inf if math.isnan(error) else error)
    return {"error": worst, "wrong": worst > allowed} | note


_TELLING = (
    r"no conver|current official support|not (?:be )?support|not impl|failed to legaliz|can't create"
    r"|(?:must|should) match|unknown op|unequal",
    r"unsupported|not a registered|not found|invalid|cannot|refuse|too many|takes more|not install|mismatch",
    r"error|fail|must",
)
"""Words of errors, those that say most first."""


def reason(text: str, length: int = 240) -> str:
    """The part of an error that says most, without what is of one machine or one run."""
    text = re.sub(
        r"\x1b\[[\d;]*m|\[\d\d:\d\d:\d\d\] |^(?:Error: |page\.evaluate: )+|^[>-]+ ", "", text, flags=re.MULTILINE
    )
    text = re.sub(r"(?:[\w.+-]*/)+([\w.+-]+)", r"\1", text)  # a path of this machine
    text = re.sub(r"\b\w+\.\w+\.\w+\.(?:fixed|free)\.onnx\b", "model.onnx", text)
    text = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", text)
    lines = [" ".join(line.split()) for line in text.splitlines() if re.search(r"[A-Za-z]{3}", line)] or ["no message"]
    found = ((line, match) for telling in _TELLING for line in lines if (match := re.search(telling, line, re.I)))
    line, match = next(found, (lines[0], None))
    start = match.start() - 60 if match is not None and match.end() > length else 0  # it must be in what is shown
    line = f"...{line[start:]}" if start > 0 else line
    return line if len(line) <= length else f"{line[: length - 3].rstrip()}..."
