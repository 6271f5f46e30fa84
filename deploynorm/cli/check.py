"""Check an ONNX file against the network that it was made from.

Both run on the same random inputs, of several shapes inside the file's dynamic range; the network runs in float64.
A file in half precision runs with every tensor rounded, and overflowing, as on a GPU, on inputs of its type.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploynorm.cli import options
from deploynorm.cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("candidate", metavar="ONNX", type=options.existing_file, help="the file under test")
    options.add_accept_changed(parser)
    options.add_parity(parser)


def run(terminal: Terminal, model: Path, candidate: Path, **given: Any) -> None:
    from deploynorm._check.parity import check_file

    with terminal.step(f"checking {candidate}"):
        parity = check_file(model, candidate, **given)
    terminal.show("\n\n".join([parity.tables(terminal.verbose), *(f"note: {note}" for note in parity.notes)]))
    terminal.write_json(parity.to_dict())
    parity.raise_if_broken()
