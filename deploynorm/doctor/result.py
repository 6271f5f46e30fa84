"""The facts and findings of one machine, as `deploynorm doctor` prints them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from deploynorm.doctor.facts import Examination, Library
from deploynorm.tables import table

_TITLES = {"broken": "Broken", "note": "Not here, or slower than it could be"}


class Finding(NamedTuple):
    """A known failure, met on this machine."""

    level: Literal["broken", "note"]  # something installed does not work, or something would be faster or possible
    name: str
    problem: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What is on this machine and what works together. True where nothing is broken; `print` shows it.

    Attributes:
        facts: What `examine` found.
        findings: What the facts mean, what is broken first.
    """

    facts: Examination
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return not self.broken

    def __str__(self) -> str:
        return self.tables()

    @property
    def broken(self) -> tuple[Finding, ...]:
        """What is installed and does not work."""
        return tuple(finding for finding in self.findings if finding.level == "broken")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        findings = [finding._asdict() for finding in self.findings]
        return {"ok": bool(self), "findings": findings, "facts": dataclasses.asdict(self.facts)}

    def tables(self, verbose: bool = False) -> str:
        """The facts as tables, then the findings; if verbose, all packages, and what each library needs and exports."""
        facts = self.facts
        codes = {each: " ".join(code.name for code in each.code) or "none" for each in facts.libraries}
        libraries = [(x.name, f"{x.size_bytes / 2**20:.2f} MiB", code, x.path) for x, code in codes.items()]
        parts = [
            table("Installed", ("", ""), _installed(facts, verbose)),
            table("GPU", ("", ""), _gpu(facts)),
            table("Runtimes", ("", ""), _runtimes(facts, verbose)),
            table("Our libraries", ("library", "size", "code for GPUs", "path"), libraries),
        ]
        if verbose:
            columns = ("library", "from", "needs", "exports")
            parts.append(table("Each of our libraries", columns, map(_origin, facts.libraries)))
        for level, title in _TITLES.items():
            found = [finding for finding in self.findings if finding.level == level]
            lines = [f"- {finding.problem}\n  Fix: {finding.remedy}" for finding in found]
            parts += ["\n".join([title, *lines])] if lines else []
        parts += ["What is installed works together."] if self else []
        return "\n\n".join(parts)


def _installed(facts: Examination, verbose: bool) -> Iterator[tuple[str, str]]:
    yield "Python", facts.python
    yield "system", facts.system
    for name, version in facts.packages.items():
        if verbose or "nvidia" not in name:
            cuda = f" (for CUDA {facts.torch_cuda})" if facts.torch_cuda else " (for CPUs)"
            yield name, version + (cuda if name == "torch" else "")
    yield "C++ compiler, CMake", facts.compiler or "missing"
    yield "CUDA compiler", facts.nvcc or "none"


def _gpu(facts: Examination) -> Iterator[tuple[str, str]]:
    driver = facts.driver
    if driver.cuda is None:
        yield "driver", driver.problem or "none"
        return
    yield "driver", f"{driver.version or 'of unknown version'}, for CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    if driver.problem is not None:
        yield "GPUs", driver.problem
    for gpu in driver.gpus:
        capability = f"compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        yield gpu.name, f"{capability}, {gpu.memory_bytes / 2**30:.1f} GiB"


def _runtimes(facts: Examination, verbose: bool) -> Iterator[tuple[str, str]]:
    runtime = facts.onnxruntime
    if runtime is not None and runtime.problem is not None:
        yield "onnxruntime", runtime.problem
    elif runtime is not None:
        takes = {True: "; takes our library", False: "; refuses our library", None: ""}[runtime.takes_library]
        short = [name.removesuffix("ExecutionProvider") for name in runtime.providers]
        yield "onnxruntime", f"{runtime.version}, providers {', '.join(short)}{takes}"
    for provider in facts.providers:
        if provider.missing or verbose:
            missing = ", ".join(provider.missing)
            yield f"its provider {provider.name}", f"missing {missing}" if missing else "finds all that it needs"
    for found in facts.tensorrt:
        takes = {True: "; takes our plugin", False: "; refuses our plugin", None: ""}[found.takes_plugin]
        plugins = f", {found.creators} plugins in its registry" if verbose else ""
        yield found.module, found.problem or f"{found.version}{plugins}{takes}"


def _origin(library: Library) -> tuple[str, str, str, str]:
    origin = library.origin + (", outdated" if library.outdated else "")
    return library.name, origin, " ".join(library.needed), " ".join(library.exports)
