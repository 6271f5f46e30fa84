"""Rewrite an exported ONNX file, and check it against the file.

--optimize-for-cpu puts FRN, its residual additions and its thresholds on the layout that ONNX Runtime's convolutions
use on this processor, so that nothing is reordered between them. The result runs only on this kind of processor, with
this version of onnxruntime and with our operator library; keep the file that it was made from. It is written only if
both compute the same numbers, on several shapes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploynorm.cli import options
from deploynorm.cli.terminal import Terminal
from deploynorm.errors import InputError
from deploynorm.rewrite.passes import PASSES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_onnx_file(parser)
    options.add_accept_changed(parser)
    options.add_output(parser, next(iter(PASSES.values())).suffix)
    passes = parser.add_argument_group("rewrites, in the order in which they are given")
    for name, row in PASSES.items():
        passes.add_argument(_option(name), dest="passes", action="append_const", const=name, help=row.summary)
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


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
