"""Show what is installed, what of it works together, and how to fix the rest.

Looks for the packages, the driver and its GPUs, and our libraries, tries what can be tried, and lists what it found.
What is broken makes the exit code 3; what is not installed does not: the notes say what it would bring.
"""

from __future__ import annotations

import argparse
import sys

from deploynorm.cli.terminal import Terminal
from deploynorm.errors import BackendError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has no options of its own."""


def run(terminal: Terminal) -> int:
    from deploynorm import doctor

    with terminal.step("examining"):
        diagnosis = doctor.diagnose(doctor.examine())
    terminal.show(diagnosis.tables(terminal.verbose))
    if terminal.quiet:
        for finding in diagnosis.broken:
            print(f"deploynorm doctor: {finding.problem}. Fix: {finding.remedy}.", file=sys.stderr)
    terminal.write_json(diagnosis.to_dict())
    return 0 if diagnosis else BackendError.exit_code
