"""Show what is installed, what of it works together, and how to fix the rest.

Looks for the packages, the driver and its GPUs, and our libraries, tries what can be tried, and lists what it found.
What is broken makes the exit code 3; what is not installed does not: the notes say what it would bring.
"""

from __future__ import annotations

import argparse
import sys

from deploynorm.cli import options
from deploynorm.errors import BackendError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    from deploynorm import doctor
    from deploynorm.cli.terminal import Terminal

    terminal = Terminal(quiet=arguments.quiet)
    with terminal.step("examining"):
        diagnosis = doctor.diagnose(doctor.examine())
    terminal.show(diagnosis.tables(arguments.verbose))
    if arguments.quiet:
        for finding in diagnosis.broken:
            print(f"deploynorm doctor: {finding.problem}. Fix: {finding.remedy}.", file=sys.stderr)
    terminal.write_json(arguments.json, diagnosis.to_dict())
    return 0 if diagnosis else BackendError.exit_code
