"""Check an ONNX file against the network that it was made from.

Both run on the same random inputs, of several shapes inside the file's dynamic range; the network runs in float64.
A file in half precision runs with every tensor rounded, and overflowing, as on a GPU, on inputs of its type.
"""

from __future__ import annotations

import argparse

from deploynorm.cli import options

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("candidate", metavar="ONNX", type=options.existing_file, help="the file under test")
    options.add_parity(parser)
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    model = options.model_options(arguments)

    from deploynorm._check.parity import check_file
    from deploynorm.cli.terminal import Terminal

    terminal = Terminal(quiet=arguments.quiet)
    with terminal.step(f"checking {arguments.candidate}"):
        parity = check_file(
            arguments.model, arguments.candidate, backend=arguments.backend, **model, **options.tolerances(arguments)
        )
    terminal.show(parity.tables(arguments.verbose))
    terminal.write_json(arguments.json, parity.to_dict())
    parity.raise_if_broken()
    return 0
