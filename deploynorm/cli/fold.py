"""Fold MABN, BatchNorm and weight centralisation into plain convolutions.

Writes the folded network as a torch.export archive (.pt2), which `deploynorm export` takes, after checking it
against the network as it was. The table tells each layer that could not fold, and why.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deploynorm.cli import options

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("-o", "--output", type=Path, help="default: MODEL with the ending .folded.pt2")
    options.add_dynamic(parser)
    options.add_parity(parser)
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from deploynorm._fold import fold
    from deploynorm.cli.network import load_network
    from deploynorm.cli.parity import check_folded, raise_if_broken
    from deploynorm.cli.tables import fold_to_dict, print_checks, print_fold
    from deploynorm.cli.terminal import Terminal
    from deploynorm.files import staging
    from deploynorm.trace import quiet, trace

    terminal = Terminal(verbose=arguments.verbose, quiet=arguments.quiet)
    output: Path = arguments.output or arguments.model.with_suffix(".folded.pt2")
    with staging(output) as folder:
        with terminal.step(f"reading {arguments.model}"):
            network = load_network(arguments)
        with terminal.step("folding"):
            examples = network.example_inputs(arguments.dynamic)
            folded, report = fold(network.model, examples, dynamic=arguments.dynamic)
        with terminal.step("checking"):
            parity = check_folded(network, folded, arguments)
        print_fold(terminal, report)
        print_checks(terminal, [parity])
        for note in network.checkpoint.notes:
            terminal.line(f"note: {note}")
        terminal.write_json(arguments.json, {"fold": fold_to_dict(report), "checks": [parity.to_dict()]})
        raise_if_broken(terminal, [parity], network, arguments)
        with terminal.step(f"writing {output}"), quiet():
            torch.export.save(trace(folded, examples, arguments.dynamic), folder / output.name)
    terminal.line(f"wrote {output}")
    return 0
