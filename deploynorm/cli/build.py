"""Build a TensorRT engine from an ONNX file.

The engine has the types of the ONNX file: export with --dtype float16 for one in float16. TensorRT builds for the GPU
of this machine, TensorRT-RTX for the RTX cards that --compute-capability names, with or without a GPU. FRN layers
become our plugin or stay standard operators; `--frn auto` builds both, runs both where there is a GPU for it, and
keeps the faster. MODEL.engine.json, beside the engine, has what it was built from and what is in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from deploynorm.cli import options
from deploynorm.cli.terminal import Terminal
from deploynorm.trt import BUILDERS
from deploynorm.trt.settings import HARDWARE_COMPATIBILITY, Way


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_onnx_file(parser)
    options.add_accept_changed(parser)
    options.add_output(parser, ".engine")
    group = parser.add_argument_group("what the engine is for")
    group.add_argument(
        "--backend",
        choices=("auto", *BUILDERS),
        default="auto",
        help="default: TensorRT where both are installed",
    )
    group.add_argument(
        "--compute-capability",
        dest="compute_capabilities",
        metavar="X.Y",
        action="append",
        default=[],
        help="kind of GPU, as 8.9; TensorRT-RTX takes several (default: the GPU of this machine)",
    )
    group.add_argument(
        "--hardware-compatible",
        choices=tuple(HARDWARE_COMPATIBILITY),
        help="GPUs besides this machine's (TensorRT only)",
    )
    group.add_argument(
        "--version-compatible", action="store_true", help="for later versions of TensorRT too (TensorRT only)"
    )
    group = parser.add_argument_group(
        "shapes of inputs with dynamic axes",
        "One of the three is enough. Those that are given again for an input make another optimization profile: a run "
        "takes the one that holds its shapes.",
    )
    for option, text in (("min", "smallest"), ("opt", "the one to be fast for"), ("max", "largest")):
        group.add_argument(
            f"--{option}-shapes",
            metavar="[NAME:]SHAPE",
            action="append",
            help=f"{text}: x:1x3x64x64 or 1x3x64x64",
        )
    group = parser.add_argument_group("how")
    group.add_argument(
        "--frn",
        choices=("auto", *get_args(Way)),
        default="auto",
        help="our plugin, or standard operators that TensorRT fuses (default: what is better)",
    )
    group.add_argument("--plugins", metavar="LIB", type=Path, action="append", help="plugin libraries instead of ours")
    group.add_argument(
        "--no-embed-plugin",
        dest="embed_plugin",
        action="store_false",
        help="leave the plugin library out: the engine runs only where ours is installed, and needs no --trust-engine",
    )
    group.add_argument("--tf32", action="store_true", help="let float32 products be rounded to 10 bits: faster")
    group.add_argument(
        "--timing-cache", metavar="FILE", type=Path, help="read where it exists, and written anew (TensorRT only)"
    )
    group.add_argument(
        "--workspace", metavar="MIB", type=mebibytes, help="scratch memory of a layer, in MiB (default: all)"
    )
    group.add_argument("--optimization-level", metavar="0..5", type=int, choices=range(6), help="how long to search")


def run(terminal: Terminal, model: Path, output: Path, timing_cache: Path | None, **given: Any) -> None:
    from deploynorm._build import build

    with terminal.step(f"building {output}"):
        engine = build(model, timing_cache=timing_cache, **given)
    terminal.show(f"{engine.tables(terminal.verbose)}\n")
    terminal.write_json(engine.save(output, timing_cache=timing_cache))
    terminal.show(f"wrote {output} and {output.name}.json")


def mebibytes(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0: {text}")
    return int(text) * 2**20
