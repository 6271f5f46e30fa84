"""Fold MABN, BatchNorm and weight centralisation into plain convolutions.

Writes the folded network as a torch.export archive (.pt2), which `deploynorm export` takes, after checking it
against the network as it was. The table shows each layer that could not be folded, and why.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploynorm.cli import options
from deploynorm.cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output(parser, ".folded.pt2")
    options.add_dynamic(parser)
    options.add_parity(parser, backend=False)


def run(terminal: Terminal, model: Path, output: Path, **given: Any) -> None:
    from deploynorm._convert import fold_checked

    with terminal.step(f"folding {model}"):
        result = fold_checked(model, **given)
    terminal.show(f"{result.tables(terminal.verbose)}\n")
    terminal.write_json(result.to_dict())
    with terminal.step(f"writing {output}"):
        result.save(output)
    terminal.show(f"wrote {output}")
