"""Turn a checkpoint of another project's FRN or MABN network into one for the same network with our layers.

Parameters take our names, shapes and epsilon; what only training needs is dropped; all else passes through. With
--factory, which builds the network with our layers, the result is a whole checkpoint; without, a state dict.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploynorm.cli import options
from deploynorm.cli.terminal import Terminal
from deploynorm.sources import SOURCES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, "checkpoint: state_dict, .safetensors, .npz, or a pickled dict of arrays", shapes=False)
    options.add_output(parser, ".imported.pt")
    group = parser.add_argument_group("whose layers they are")
    group.add_argument(
        "--from",
        dest="source",
        metavar="NAME",
        choices=["auto", *SOURCES],
        default="auto",
        help=f"auto, which finds out by names and shapes (default), or {', '.join(SOURCES)}",
    )
    group.add_argument(
        "--eps",
        type=float,
        help="the number that their layers were built with, where the checkpoint does not store it",
    )


def run(terminal: Terminal, model: Path, output: Path, **given: Any) -> None:
    from deploynorm.checkpoint import import_checkpoint

    with terminal.step(f"importing {model}"):
        result = import_checkpoint(model, **given)
    terminal.show(f"{result}\n")
    result.save(output)
    terminal.write_json(result.to_dict())
    terminal.show(f"wrote {output}")
    if result.factory is None:
        terminal.show(
            f"next: deploynorm export {output} --factory PKG.MOD:FN, which builds the network with our layers"
        )
