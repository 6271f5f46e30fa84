"""Show what is installed, what of it works together, and how to fix the rest.

Looks for the packages, the driver and its GPUs, and our libraries, tries what can be tried, and lists what it found.
What is broken makes the exit code 3; what is not installed does not: the notes say what it would bring. Of ONNX files
that are named it says what another tool has dropped from them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deploynorm.cli import options
from deploynorm.cli.terminal import Terminal
from deploynorm.errors import BackendError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="ONNX", nargs="*", type=options.existing_file, help="ONNX files to look at")


def run(terminal: Terminal, files: Sequence[Path]) -> int:
    from deploynorm import doctor

    with terminal.step("examining"):
        diagnosis = doctor.diagnose(doctor.examine(), files)
    terminal.show(diagnosis.tables(terminal.verbose))
    if terminal.quiet:
        for finding in diagnosis.broken:
            print(f"deploynorm doctor: {finding.problem}. Fix: {finding.remedy}.", file=sys.stderr)
    terminal.write_json(diagnosis.to_dict())
    return 0 if diagnosis else BackendError.exit_code
