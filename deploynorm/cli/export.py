"""Fold a network, export it to ONNX, and check the file against the network.

Each FRN layer becomes one node, with its body in standard operators beside it for runtimes that read local functions;
for those that do not there is --lowering primitives. The file is written only if it computes the same numbers as the
network in float64, on several shapes. A file in half precision is
checked with every tensor rounded, and overflowing, as on a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploynorm.cli import options
from deploynorm.cli.terminal import Terminal
from deploynorm.contract import DTYPES, LOWERINGS, MAX_OPSET, MIN_OPSET

_LEAST_OPSET = min(row.min_opset for row in LOWERINGS.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output(parser, ".onnx")
    group = parser.add_argument_group("the ONNX file")
    group.add_argument(
        "--dtype",
        choices=[name for name in DTYPES if name != "float64"],
        help="type of weights and activations (default: the network's own); FRN's parameters stay in float32",
    )
    group.add_argument(
        "--keep-io-types", action="store_true", help="inputs and outputs keep the network's own type, with casts inside"
    )
    group.add_argument(
        "--keep-float32",
        metavar="NAME",
        action="append",
        default=[],
        help="a layer that stays in float32 in half precision, as in named_modules; * stands for anything",
    )
    options.add_dynamic(group)
    group.add_argument(
        "--input-names",
        metavar="A,B",
        type=_names,
        help="in the order of --input-shape, where that is given, else of forward (default: those of its arguments)",
    )
    group.add_argument(
        "--output-names",
        metavar="A,B",
        type=_names,
        help="default: the keys of a dict, or output, or output_0, ...",
    )
    group.add_argument(
        "--opset",
        type=_opset,
        help=f"{MIN_OPSET} to {MAX_OPSET}, for primitives {_LEAST_OPSET} (default 20; 22 for bfloat16, 23 for rmsnorm)",
    )
    group.add_argument(
        "--lowering",
        choices=tuple(LOWERINGS),
        default=next(iter(LOWERINGS)),
        help="FRN " + "; ".join(f"{name}: {row.summary}" for name, row in LOWERINGS.items()) + " (default custom)",
    )
    group.add_argument(
        "--no-function",
        dest="function",
        action="store_false",
        help="leave the node's body out: only our libraries run the file then",
    )
    group.add_argument(
        "--no-residual",
        dest="residual",
        action="store_false",
        help="leave an addition behind FRN, and the threshold behind it, nodes of their own",
    )
    group.add_argument("--no-fold", dest="fold", action="store_false", help="export the network as it is")
    group.add_argument(
        "--freeze-buffers",
        action="store_true",
        help="accept that forward changes buffers: in the file each call starts from their values of now",
    )
    group.add_argument("--external-data", action="store_true", help="weights in a file of their own (always past 2 GB)")
    group = parser.add_argument_group("images and classes, for deploynorm run (default: as the model has them)")
    group.add_argument("--mean", metavar="A,B,C", type=_numbers, help="of each channel, with pixels from 0 to 1")
    group.add_argument("--std", metavar="A,B,C", type=_numbers, help="of each channel")
    group.add_argument("--labels", metavar="FILE", type=options.existing_file, help="names of the classes, one a line")
    options.add_parity(parser)


def run(terminal: Terminal, model: Path, output: Path, external_data: bool, **given: Any) -> None:
    from deploynorm._convert import convert

    with terminal.step(f"exporting {model}"):
        result = convert(model, **given)
    terminal.show(f"{result.tables(terminal.verbose)}\n")
    written = result.save(output, external_data=external_data or None) if result else ()
    terminal.write_json(result.to_dict(written[0] if written else None))
    result.parity.raise_if_broken()
    terminal.show(f"wrote {' and '.join(map(str, written))}")


def _opset(text: str) -> int:
    if not text.isdecimal() or not _LEAST_OPSET <= int(text) <= MAX_OPSET:
        raise argparse.ArgumentTypeError(f"unsupported opset {text}; expected {_LEAST_OPSET} to {MAX_OPSET}")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no numbers: {text}; expected as in 0.485,0.456,0.406") from error
