"""Run a network on arrays or images.

Takes an ONNX file, a TensorRT engine, or any model that `deploynorm export` takes. Images are prepared as the model
says, and their most likely classes are printed by name. Arrays are .npy files, one for each input, or one .npz with
all of them; an image and an array go together by name (image=pic.png prior=p.npy). A file in half precision takes
float32 arrays too, and on the CPU runs with every tensor rounded as on a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploynorm.cli import options
from deploynorm.cli.terminal import Terminal
from deploynorm.run.backends import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, "ONNX file, engine, checkpoint, state_dict, pickled module or .pt2")
    parser.add_argument(
        "files", metavar="INPUT", nargs="+", help=".npy, .npz or image file; NAME=FILE where there are several inputs"
    )
    parser.add_argument("-o", "--output", type=options.output_file, help="write the outputs to this .npz file")
    options.add_accept_changed(parser)
    parser.add_argument("--top", type=int, default=5, help="classes to print for each image (default 5)")
    group = parser.add_argument_group("backend")
    group.add_argument(
        "--backend",
        choices=tuple(BACKENDS),
        help="default onnxruntime for an ONNX file, half for one in half precision, tensorrt for an engine, else eager",
    )
    group.add_argument(
        "--provider",
        dest="providers",
        choices=("cpu", "cuda", "tensorrt"),
        action="append",
        help="of onnxruntime, the preferred first (default cpu)",
    )
    library = group.add_mutually_exclusive_group()
    library.add_argument(
        "--plugins", metavar="LIB", type=Path, action="append", help="operator libraries instead of ours"
    )
    library.add_argument(
        "--stock", dest="plugins", action="store_const", const=[], help="onnxruntime without our operator library"
    )
    group.add_argument(
        "--trust-engine",
        action="store_true",
        help="let the plugin that is inside an engine run; only for files from a source you trust",
    )


def run(
    terminal: Terminal, model: Path, files: list[str], providers: list[str] | None, output: Path | None, **given: Any
) -> None:
    from deploynorm.inference import run_on_files

    with terminal.step(f"running {model}"):
        inference = run_on_files(model, files, providers=providers or ("cpu",), **given)
    terminal.show(inference)
    if output is not None:
        inference.save(output)
        terminal.show(f"wrote {output}")
    terminal.write_json(inference.to_dict())
