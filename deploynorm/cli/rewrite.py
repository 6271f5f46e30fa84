"""Rewrite an exported ONNX file, and check it against the file.

--optimize-for-cpu puts FRN, its residual additions and its thresholds on the layout that ONNX Runtime's convolutions
use on this processor, so that nothing is reordered between them. The result runs only on this kind of processor, with
this version of onnxruntime and with our operator library; keep the file that it was made from. It is written only if
both compute the same numbers, on several shapes.
"""

from __future__ import annotations

import argparse

from deploynorm.cli import options
from deploynorm.inputs import parse_input_shapes
from deploynorm.rewrite.passes import PASSES

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=options.existing_file, help=options.ONNX_HELP)
    options.add_output(parser, next(iter(PASSES.values())).suffix)
    passes = parser.add_argument_group("rewrites, in the order in which they are given")
    for name, entry in PASSES.items():
        option = f"--{name.replace('_', '-')}"
        passes.add_argument(option, dest="passes", action="append_const", const=name, help=entry.summary)
    group = parser.add_argument_group("parity check")
    options.add_input_shape(group)
    options.add_tolerance(group)
    options.add_output_control(parser)
    parser.set_defaults(error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.passes:
        arguments.error(f"name a rewrite: {', '.join('--' + name.replace('_', '-') for name in PASSES)}")
    shapes = parse_input_shapes(arguments.input_shape)

    from deploynorm.cli.terminal import Terminal
    from deploynorm.rewrite import rewrite

    terminal = Terminal(quiet=arguments.quiet)
    with terminal.step(f"rewriting {arguments.model}"):
        result = rewrite(arguments.model, arguments.passes, input_shapes=shapes, **options.tolerances(arguments))
    terminal.show(f"{result.tables(arguments.verbose)}\n")
    terminal.write_json(arguments.json, result.to_dict())
    terminal.show(result.save(arguments.output))
    return 0
