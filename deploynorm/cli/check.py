"""Check an ONNX file against the network that it was made from.

Both run on the same random inputs, of several shapes inside the file's dynamic range; the network runs in float64.
A file in half precision runs with every tensor rounded, and overflowing, as on a GPU, on inputs of its type.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deploynorm.cli import options

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("candidate", metavar="ONNX", type=Path, help="the file under test")
    options.add_parity(parser)
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    from deploynorm.cli.network import load_network
    from deploynorm.cli.parity import check_onnx, raise_if_broken
    from deploynorm.cli.tables import print_checks
    from deploynorm.cli.terminal import Terminal

    terminal = Terminal(verbose=arguments.verbose, quiet=arguments.quiet)
    with terminal.step(f"reading {arguments.model}"):
        network = load_network(arguments)
    with terminal.step("checking"):
        reports = check_onnx(terminal, network, arguments.candidate, arguments)
    print_checks(terminal, reports)
    terminal.write_json(arguments.json, {"ok": all(reports), "checks": [report.to_dict() for report in reports]})
    raise_if_broken(terminal, reports, network, arguments)
    return 0
