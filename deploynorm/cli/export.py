"""Fold a network, export it to ONNX, and check the file against the network.

Each FRN layer becomes one node; the file carries its body in standard operators too, so that any runtime can run
it. The file is written only if it computes the same numbers as the network in float64, on several shapes. A file in
half precision is checked with every tensor rounded, and overflowing, as on a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deploynorm.cli import options
from deploynorm.contract import LOWERINGS, MAX_OPSET, MIN_OPSET

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output(parser, ".onnx")
    group = parser.add_argument_group("the ONNX file")
    options.add_precision(group)
    options.add_dynamic(group)
    group.add_argument("--input-names", metavar="A,B", type=options.names, help="default: those of forward's arguments")
    group.add_argument(
        "--output-names",
        metavar="A,B",
        type=options.names,
        help="default: the keys of a dict, or output, or output_0, ...",
    )
    group.add_argument(
        "--opset",
        type=options.opset,
        help=f"{MIN_OPSET} to {MAX_OPSET} (default 20; 22 for bfloat16, 23 for rmsnorm)",
    )
    group.add_argument(
        "--lowering",
        choices=tuple(LOWERINGS),
        default=next(iter(LOWERINGS)),
        help="FRN " + "; ".join(f"{name}: {text}" for name, text in LOWERINGS.items()) + " (default custom)",
    )
    group.add_argument(
        "--no-function", action="store_true", help="leave the node's body out: only our libraries run the file then"
    )
    group.add_argument("--no-fold", action="store_true", help="export the network as it is")
    group.add_argument("--external-data", action="store_true", help="weights in a file of their own (always past 2 GB)")
    group = parser.add_argument_group("images and classes, for deploynorm run (default: as the model has them)")
    group.add_argument("--mean", metavar="A,B,C", type=options.numbers, help="of each channel, with pixels from 0 to 1")
    group.add_argument("--std", metavar="A,B,C", type=options.numbers, help="of each channel")
    group.add_argument("--labels", metavar="FILE", type=options.existing_file, help="names of the classes, one a line")
    options.add_parity(parser)
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output or arguments.model.with_suffix(".onnx")
    model, dynamic = options.model_options(arguments), options.dynamic(arguments)

    import torch

    from deploynorm._convert import convert
    from deploynorm.cli.terminal import Terminal

    terminal = Terminal(quiet=arguments.quiet)
    with terminal.step(f"exporting {arguments.model}"):
        result = convert(
            arguments.model,
            **model,
            fold=not arguments.no_fold,
            dtype=arguments.dtype and getattr(torch, arguments.dtype),
            keep_float32=arguments.keep_float32,
            keep_io_types=arguments.keep_io_types,
            dynamic=dynamic,
            opset=arguments.opset,
            lowering=arguments.lowering,
            function=not arguments.no_function,
            input_names=arguments.input_names,
            output_names=arguments.output_names,
            mean=arguments.mean,
            std=arguments.std,
            labels=arguments.labels,
            backend=arguments.backend,
            **options.tolerances(arguments),
        )
    terminal.show(f"{result.tables(arguments.verbose)}\n")
    written = result.save(output, external_data=arguments.external_data or None) if result else None
    terminal.write_json(arguments.json, result.to_dict(written and written[0]))
    result.parity.raise_if_broken()
    terminal.show(f"wrote {' and '.join(map(str, written or ()))}")
    return 0
