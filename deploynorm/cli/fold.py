"""Fold MABN, BatchNorm and weight centralisation into plain convolutions.

Writes the folded network as a torch.export archive (.pt2), which `deploynorm export` takes, after checking it
against the network as it was. The table shows each layer that could not be folded, and why.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deploynorm.cli import options

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output(parser, ".folded.pt2")
    options.add_dynamic(parser)
    options.add_parity(parser, backend=False)
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output or arguments.model.with_suffix(".folded.pt2")
    model, dynamic = options.model_options(arguments), options.dynamic(arguments)

    from deploynorm._convert import fold_checked
    from deploynorm.cli.terminal import Terminal

    terminal = Terminal(quiet=arguments.quiet)
    with terminal.step(f"folding {arguments.model}"):
        result = fold_checked(arguments.model, **model, dynamic=dynamic, **options.tolerances(arguments))
    terminal.show(f"{result.tables(arguments.verbose)}\n")
    terminal.write_json(arguments.json, result.to_dict())
    with terminal.step(f"writing {output}"):
        result.save(output)
    terminal.show(f"wrote {output}")
    return 0
