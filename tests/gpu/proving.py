"""What only a GPU can show, in the minutes for which there is one.

    tests/gpu/prove [--minutes 15] [--parts FOLDER] [--out FOLDER] [STEP ...]

Runs in a bare clone where there are torch, nvcc and CMake, and no package index: what else it needs comes from the
folder of parts that tests/gpu/fill filled on another machine. Each step has a time limit, and writes what it found
into the results folder at once, beside its output; a step that fails or has to be stopped does not end the others,
and all is over within the minutes given. One line for each step. Called again, with more parts or for longer, it goes
on with the steps that have not passed yet with these sources.

Without a GPU the steps run on the emulation or on the CPU as far as they can, a little of each, so that this program
works when there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from parts import Parts  # noqa: E402

__all__ = ["STEPS", "Outcome", "Prover", "Step", "main"]


@dataclass(frozen=True)
class Step:
    """One thing to show.

    Attributes:
        name: Of its line and its files.
        seconds: After which it is stopped.
        command: Words. `python` is this Python; {libraries}, {headers} and {out} are folders, {architecture} is "90".
        needs: Pieces that have to be there: of parts.py, where "rtx" and "ort" then can be imported; "libraries" is
            what the step `build` builds.
        without: What runs where there is no GPU, or why nothing does.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    without: tuple[str, ...] | str = ""


_PYTEST = ("python", "-m", "pytest", "-q", "-W", "default")  # of that machine's packages, which nobody chose
_ON_THE_GPU = (*_PYTEST, "-n", "8", "-k", "not emulated and not sanitizer")  # CI runs what is emulated
_GPU_BENCHMARK = ("python", "benchmarks/gpu.py", "--libraries", "{libraries}")
_TRAINING = (*_GPU_BENCHMARK, "--sections", "training", "mabn", "--rounds", "7")
_BUILD = """
import sys
from pathlib import Path
from deploynorm import libraries
link, architecture, headers = sys.argv[1:]
built = libraries.build(cuda=True, tensorrt=bool(headers), architectures=[architecture])
Path(link).unlink(missing_ok=True)
Path(link).symlink_to(built.library.parent)
print(*(path.name for path in built.libraries))
"""

STEPS = (
    Step(
        "build", 150, ("python", "-c", _BUILD, "{libraries}", "{architecture}", "{headers}"),
        without="tests/plugins builds for every GPU",
    ),
    Step(
        "kernels", 150, (*_ON_THE_GPU, "tests/gpu/test_kernels.py"), ("libraries",),
        (*_PYTEST, "tests/gpu/test_kernels.py", "-k", "variants_are_those"),
    ),
    Step(
        "plugin", 120, (*_ON_THE_GPU, "tests/gpu/test_plugin.py", "tests/gpu/test_streams.py"),
        ("libraries", "headers"),
        (*_PYTEST, "tests/gpu/test_plugin.py", "-k", "every_rank"),
    ),
    Step(
        "layers", 120,
        (*_ON_THE_GPU, *(f"tests/gpu/test_{name}.py" for name in ("on_a_gpu", "training", "mabn"))), ("libraries",),
        "tests/layers runs the layers on the CPU",
    ),
    Step(
        "rtx", 100, ("python", "tests/gpu/rtx_engines.py", "--libraries", "{libraries}", "--out", "{out}/engines.json"),
        ("libraries", "rtx"),
        ("python", "tests/gpu/rtx_engines.py", "--build-for", "8.9", "--out", "{out}/engines.json"),
    ),
    Step(
        "engines", 120, (*_PYTEST, "tests/gpu/test_tensorrt.py"), ("libraries", "rtx"),
        "tests/trt runs them on a made-up TensorRT",
    ),
    Step(
        "ort", 90, (*_PYTEST, "tests/gpu/test_ort.py"), ("libraries", "ort"),
        "tests/plugins/test_ort_op.py runs the operator on the CPU",
    ),
    Step(
        "networks", 180,
        ("python", "benchmarks/gpu_ort.py", "--libraries", "{libraries}", "--out", "{out}/gpu_ort.json"),
        ("libraries", "ort"),
        ("python", "benchmarks/gpu_ort.py", "--provider", "cpu", "--network", "ResNet-20", "--batches", "1", "--dtypes",
         "float32", "--rounds", "1", "--out", "{out}/gpu_ort.json"),
    ),
    Step(
        "residual", 60, (*_GPU_BENCHMARK, "--sections", "residual", "--rounds", "11", "--out", "{out}/residual.json"),
        ("libraries",),
    ),
    Step(
        "variants", 60,
        (*_GPU_BENCHMARK, "--sections", "variants", "--batches", "32", "--rounds", "5", "--out", "{out}/variants.json"),
        ("libraries",),
    ),
    Step(
        "training", 90,
        (*_TRAINING, "--no-compile", "--out", "{out}/training.json"), ("libraries",),
    ),
    Step(
        "counters", 60,
        ("ncu", "--clock-control", "none", "--profile-from-start", "off",
         *(word for name in ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
           for word in ("--section", name)), "python", "tests/gpu/small_planes.py", "{libraries}"),
        ("libraries",),
        ("python", "tests/gpu/small_planes.py", "{libraries}"),
    ),
    Step(
        "sanitizer", 120, (*_PYTEST, "-n", "4", "tests/gpu/test_on_a_gpu.py", "-k", "sanitizer"), (),
        "tests/plugins/test_gpu_programs.py runs its program on the emulation",
    ),
    Step(
        "compiled", 150, (*_TRAINING, "--batches", "32", "--out", "{out}/training_compiled.json"), ("libraries",),
    ),
    Step(
        "study", 600,
        ("python", "benchmarks/batch_size_study", "--data", "digits", "--jobs", "4", "-o", "{out}/study"), (),
        ("python", "benchmarks/batch_size_study", "--data", "digits", "--norms", "frn", "--norm-batches", "32",
         "--seeds", "0", "--images", "64", "--epochs", "1", "-o", "{out}/study"),
    ),
)  # fmt: skip
"""The most valuable first. What runs for long writes each figure as soon as it has it."""

_DEVICE = """
import json, subprocess, torch
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found = {"name": properties.name, "architecture": f"{properties.major}{properties.minor}",
             "memory": properties.total_memory, "torch": torch.__version__, "cuda": torch.version.cuda}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    print(json.dumps(found))
"""

_NO_GPU = "torch finds no CUDA device"

State = Literal["passed", "failed", "stopped", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """Of a step; `said` is the last line that it printed, or why it did not run."""

    step: str
    state: State
    said: str
    seconds: float = 0.0


class Prover:
    """Runs steps, one after the other.

    Args:
        work: Where pieces are unpacked and libraries built.
        out: Where results go.
        parts: The folder of parts.
        seconds: After which all is over.
    """

    def __init__(self, work: Path, out: Path, parts: Path, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._out, self._work = out, work
        for folder in (out, work):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                sys.exit(f"tests/gpu/prove: cannot make the folder {folder}: {error.strerror}")
        self._parts = Parts(parts, work)
        self._install_wheels()
        self.device: dict[str, object] | None = None
        said = subprocess.run([sys.executable, "-c", _DEVICE], capture_output=True, text=True, env=self._environment())
        if said.returncode != 0:
            sys.exit(f"tests/gpu/prove: torch does not work here: {said.stderr.strip().splitlines()[-1:]}")
        self.device = json.loads(said.stdout.splitlines()[-1]) if said.stdout else None
        self._sources = _sources()

    def prove(self, step: Step, again: bool = False) -> Outcome:
        """Runs a step and writes its result; one that has passed before only if it is asked for `again`."""
        command = step.command if self.device else step.without
        if isinstance(command, str) and command:
            return self._done(step, Outcome(step.name, "skipped", f"{_NO_GPU}; {command}"))
        words = [self._fill_in(word) for word in command or step.command]
        if not again and self._passed(step, words):
            return Outcome(step.name, "passed", "before, with these sources")
        missing = [reason for name in step.needs if (reason := self._missing(name))] if self.device else []
        if missing:
            return self._done(step, Outcome(step.name, "skipped", "; ".join(missing)))
        left = self._end - time.monotonic() - _GRACE
        if left < 5:
            return self._done(step, Outcome(step.name, "skipped", "no time is left"))
        return self._done(step, self._run(step, words, min(step.seconds, left)), words)

    def _run(self, step: Step, words: Sequence[str], seconds: float) -> Outcome:
        begin = time.monotonic()
        log = self._out / f"{step.name}.log"
        with log.open("wb") as output:
            try:
                code = _call(words, seconds, stdout=output, env=self._environment(*step.needs))
            except FileNotFoundError as error:
                return Outcome(step.name, "skipped", f"{error.filename} is not installed")
        taken = round(time.monotonic() - begin, 1)
        said = next((line for line in reversed(_text(log).splitlines()) if line.strip()), "it printed nothing").strip()
        if code is None:
            return Outcome(step.name, "stopped", f"after {taken:.0f} s, at: {said}", taken)
        if code == 0:
            # pytest is content where every test was skipped.
            nothing = "pytest" in words and not re.search(r"\d+ passed", said)
            return Outcome(step.name, "skipped" if nothing else "passed", said, taken)
        if self.device is None and _NO_GPU in said:
            return Outcome(step.name, "skipped", said, taken)
        return Outcome(step.name, "failed", f"exit code {code}: {said}", taken)

    def _done(self, step: Step, outcome: Outcome, words: Sequence[str] = ()) -> Outcome:
        facts = {"step": outcome.step, "state": outcome.state, "said": outcome.said, "seconds": outcome.seconds,
                 "command": list(words), "device": self.device, "sources": self._sources}  # fmt: skip
        (self._out / f"{step.name}.json").write_text(json.dumps(facts, indent=1))
        return outcome

    def _passed(self, step: Step, words: Sequence[str]) -> bool:
        try:
            facts = json.loads(_text(self._out / f"{step.name}.json"))
        except (OSError, ValueError):
            return False
        now = ("passed", list(words), self.device, self._sources)
        return tuple(facts.get(name) for name in ("state", "command", "device", "sources")) == now

    def _missing(self, name: str) -> str | None:
        if name == "libraries":
            return None if self._libraries.is_dir() else "the libraries are not built"
        return None if name == "headers" and self._headers() else self._parts.missing(name)

    @property
    def _libraries(self) -> Path:
        return self._work / "libraries"

    def _headers(self) -> str:
        """Those of TensorRT: of this machine, of the parts, or none."""
        there = os.environ.get("TENSORRT_INCLUDE_DIR", "")
        return there or ("" if self._parts.missing("headers") else str(self._work / "headers"))

    def _fill_in(self, word: str) -> str:
        if word == "python":
            return sys.executable
        places = {"libraries": self._libraries, "headers": self._headers(), "out": self._out,
                  "architecture": (self.device or {}).get("architecture")}  # fmt: skip
        return re.sub(r"\{(\w+)\}", lambda found: str(places[found[1]]) if found[1] in places else found[0], word)

    def _environment(self, *pieces: str) -> dict[str, str]:
        """Of a step that uses these pieces."""
        paths = [self._work / piece for piece in pieces if piece in ("rtx", "ort")]
        paths += [ROOT, self._work / "site", *map(Path, filter(None, [os.environ.get("PYTHONPATH")]))]
        more = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUNBUFFERED": "1"}
        more["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/local/cuda/bin"
        if self.device is not None:
            required = [name for name in ("ort", "headers") if name in pieces]
            more["DEPLOYNORM_REQUIRE"] = ",".join(["gpu", "nvcc", *required]).replace("headers", "trt-headers")
            more["XDG_CACHE_HOME"] = str(self._work / "cache")  # where the libraries are built
            more["DEPLOYNORM_GPU_LIBRARIES"] = str(self._libraries)
        if headers := self._headers():
            more["TENSORRT_INCLUDE_DIR"] = headers
        return os.environ | more

    def _install_wheels(self) -> None:
        """Those that this Python lacks."""
        site, incomplete = self._work / "site", self._work / "site.incomplete"
        if self._parts.missing("wheels") or site.is_dir():
            return
        for wheel in (self._work / "wheels").glob("*.whl"):
            try:
                importlib.metadata.version(wheel.name.partition("-")[0])
            except importlib.metadata.PackageNotFoundError:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(incomplete)
        if incomplete.is_dir():
            incomplete.rename(site)


_GRACE = 5.0
"""Seconds that a step which is stopped has for its end."""


def _call(words: Sequence[str], seconds: float, **given: Any) -> int | None:
    """The exit code; None where it had to be stopped. All processes that it started end with it."""
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT,
                               start_new_session=True, **given)  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _sources() -> str:
    """A digest of all that a step may run."""
    digest = hashlib.sha256()
    for folder in ("deploynorm", "models", "plugins", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".map"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _stop(number: int, frame: object) -> None:
    sys.exit(f"tests/gpu/prove: stopped by signal {number}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/gpu/prove", description=(__doc__ or "").partition("\n")[0])
    names = [step.name for step in STEPS]
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=f"run these alone, even if they have results: {' '.join(names)}"
    )
    work = ROOT / "build" / "prove"
    parser.add_argument("--minutes", type=float, default=15.0, help="after which all is over (default: 15)")
    parser.add_argument("--parts", type=Path, default=work / "parts", help="what tests/gpu/fill made")
    parser.add_argument("--work", type=Path, default=work, help="for what is unpacked and built")
    parser.add_argument("--out", type=Path, default=work / "results", help="for results")
    options = parser.parse_args()
    if unknown := set(options.steps) - set(names):
        parser.error(f"unknown steps: {' '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, _stop)
    folders = (path.absolute() for path in (options.work, options.out, options.parts))
    prover = Prover(*folders, 60 * options.minutes)
    print(json.dumps(prover.device) if prover.device else _NO_GPU, flush=True)
    failed = False
    for step in STEPS:
        if not options.steps or step.name in options.steps:
            outcome = prover.prove(step, again=bool(options.steps))
            print(f"{outcome.step:>10} {outcome.state:>7} {outcome.seconds:5.0f} s  {outcome.said}", flush=True)
            failed |= outcome.state in ("failed", "stopped")
    sys.exit(failed)


if __name__ == "__main__":
    main()
