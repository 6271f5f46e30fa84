"""Tell what is installed, what of it works together, and how to mend the rest.

Looks for the packages, the driver and its GPUs, and our libraries, tries what can be tried, and lists what it found.
What is broken makes the exit code 3; what is not installed does not: the notes say what it would bring.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deploynorm.cli import options
from deploynorm.errors import BackendError

if TYPE_CHECKING:
    from deploynorm.cli.terminal import Terminal
    from deploynorm.doctor import Examination, Finding

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    from deploynorm.cli.terminal import Terminal
    from deploynorm.doctor import diagnose, examine

    terminal = Terminal(verbose=arguments.verbose, quiet=arguments.quiet)
    with terminal.step("examining"):
        examination = examine()
    findings = diagnose(examination)
    broken = [finding for finding in findings if finding.level == "broken"]
    _print_facts(terminal, examination)
    _print_findings(terminal, findings)
    if arguments.quiet:
        for finding in broken:
            print(f"deploynorm doctor: {finding.problem}. Fix: {finding.remedy}.", file=sys.stderr)
    content: dict[str, Any] = {"ok": not broken, "findings": [finding._asdict() for finding in findings]}
    terminal.write_json(arguments.json, content | {"facts": dataclasses.asdict(examination)})
    return BackendError.exit_code if broken else 0


def _print_facts(terminal: Terminal, facts: Examination) -> None:
    shown = {name: version for name, version in facts.packages.items() if terminal.verbose or "nvidia" not in name}
    torch_cuda = f" (for CUDA {facts.torch_cuda})" if facts.torch_cuda else " (for CPUs)"
    rows = {"Python": facts.python, "system": facts.system}
    rows |= {name: version + (torch_cuda if name == "torch" else "") for name, version in shown.items()}
    rows |= {"C++ compiler, CMake": facts.compiler or "missing", "CUDA compiler": facts.nvcc or "none"}
    terminal.table("Installed", ("", ""), rows.items())
    terminal.table("GPU", ("", ""), _gpu(facts))
    terminal.table("Runtimes", ("", ""), _runtimes(facts, terminal.verbose))
    columns = ("library", "size", "code for GPUs", "path")
    terminal.table("Our libraries", columns, ((each.name, *_library(each)) for each in facts.libraries))
    if terminal.verbose:
        columns = ("library", "from", "needs", "exports")
        needs = (
            (
                each.name,
                each.origin + (", outdated" if each.outdated else ""),
                " ".join(each.needed),
                " ".join(each.exports),
            )
            for each in facts.libraries
        )
        terminal.table("Each of our libraries", columns, needs)


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


def _library(library: Any) -> tuple[str, str, str]:
    code = " ".join(code.name for code in library.code)
    return f"{library.size_bytes / 2**20:.2f} MiB", code or "none", library.path


def _print_findings(terminal: Terminal, findings: list[Finding]) -> None:
    for level, title in (("broken", "Broken"), ("note", "Not here, or slower than it could be")):
        told = [(finding.problem, finding.remedy) for finding in findings if finding.level == level]
        if told:
            terminal.line(title)
            for problem, remedy in told:
                terminal.line(f"- {problem}")
                terminal.line(f"  Fix: {remedy}")
            terminal.line("")
    if not any(finding.level == "broken" for finding in findings):
        terminal.line("What is installed works together.")
