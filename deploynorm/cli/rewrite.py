"""Rewrite an ONNX file, and check it against the file.

--fuse finds FRN that another exporter left in loose operators, and makes each layer one node, with its body beside it.
--fold computes what stands behind a convolution for each channel into its weight: MABN, CenConv, BatchNormalization.
--expand is the inverse of --fuse. --restore puts back what another tool has dropped from one of our files. What cannot
be rewritten is listed, with the reason; a file in which these find nothing is written as it is. --surgery is for what
you do yourself.

--optimize-for-cpu puts FRN, its residual additions and its thresholds on the layout that ONNX Runtime's convolutions
use on this processor, so that nothing is reordered between them. The result runs only on this kind of processor, with
this version of onnxruntime and with our operator library; keep the file that it was made from.

The file is written only if both compute the same numbers, on several shapes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploynorm.cli import options
from deploynorm.cli.terminal import Terminal
from deploynorm.errors import InputError
from deploynorm.rewrite.passes import PASSES, row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_onnx_file(parser, "an ONNX file of deploynorm export, or of another tool")
    options.add_accept_changed(parser)
    options.add_output(parser, f"of the last rewrite: {', '.join(each.suffix for each in PASSES.values())}", _ending)
    passes = parser.add_argument_group("rewrites, in the order in which they are given")
    for name, each in PASSES.items():
        kind: dict[str, Any]
        if each.choices or each.argument:
            kind = {"action": "append", "type": _with(name)}
            kind["metavar"] = each.argument or f"{{{','.join(each.choices)}}}"
        else:
            kind = {"action": "append_const", "const": name}
        passes.add_argument(_option(name), dest="passes", help=each.summary, **kind)
    options.add_input_shape(options.add_parity(parser, backend=False))


def run(terminal: Terminal, model: Path, output: Path, passes: list[str] | None, **given: Any) -> None:
    if passes is None:
        raise InputError(
            "rewrite", f"name a rewrite: {', '.join(map(_option, PASSES))}", fix="see deploynorm rewrite --help"
        )

    from deploynorm.rewrite import rewrite

    with terminal.step(f"rewriting {model}"):
        result = rewrite(model, passes, **given)
    terminal.show(f"{result.tables(terminal.verbose)}\n")
    terminal.write_json(result.to_dict())
    terminal.show(result.save(output))


def _with(name: str) -> Callable[[str], str]:
    """Reads the choice of a pass as its name with the choice."""

    def read(choice: str) -> str:
        try:
            row(f"{name}={choice}")
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error.problem) + f": {choice}") from error
        return f"{name}={choice}"

    return read


def _ending(given: Mapping[str, Any]) -> str:
    """The ending of what the last pass makes."""
    return row((given["passes"] or [next(iter(PASSES))])[-1]).suffix


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
