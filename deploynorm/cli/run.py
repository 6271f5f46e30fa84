"""Run a network on arrays or images.

Takes an ONNX file, a TensorRT engine, or any model that `deploynorm export` takes. Images are prepared as the model
says, and their most likely classes are printed by name. Arrays are .npy files, one for each input, or one .npz with
all of them; an image and an array go together by name (image=pic.png prior=p.npy). A file in half precision takes
float32 arrays too, and on the CPU runs with every tensor rounded as on a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deploynorm.cli import options
from deploynorm.run.backends import BACKENDS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, "ONNX file, engine, checkpoint, state_dict, pickled module or .pt2")
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", help=".npy, .npz or image file; NAME=FILE where there are several inputs"
    )
    parser.add_argument("-o", "--output", type=options.output_file, help="write the outputs to this .npz file")
    parser.add_argument("--top", type=int, default=5, help="classes to print for each image (default 5)")
    group = parser.add_argument_group("backend")
    group.add_argument(
        "--backend",
        choices=tuple(BACKENDS),
        help="default onnxruntime for an ONNX file, half for one in half precision, tensorrt for an engine, else eager",
    )
    group.add_argument(
        "--provider",
        choices=("cpu", "cuda", "tensorrt"),
        action="append",
        help="of onnxruntime, the preferred first (default cpu)",
    )
    library = group.add_mutually_exclusive_group()
    library.add_argument(
        "--plugins", metavar="LIB", type=Path, action="append", help="operator libraries instead of ours"
    )
    library.add_argument("--stock", action="store_true", help="onnxruntime without our operator library")
    group.add_argument(
        "--trust-engine",
        action="store_true",
        help="let the plugin that is inside an engine run; only for files from a source you trust",
    )
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    model = options.model_options(arguments)

    from deploynorm.cli.terminal import Terminal
    from deploynorm.inference import run_on_files

    terminal = Terminal(quiet=arguments.quiet)
    with terminal.step(f"running {arguments.model}"):
        inference = run_on_files(
            arguments.model,
            arguments.inputs,
            backend=arguments.backend,
            providers=arguments.provider or ("cpu",),
            plugins=[] if arguments.stock else arguments.plugins,
            trust_engine=arguments.trust_engine,
            top=arguments.top,
            **model,
        )
    terminal.show(inference)
    if arguments.output is not None:
        inference.save(arguments.output)
        terminal.show(f"wrote {arguments.output}")
    terminal.write_json(arguments.json, inference.to_dict())
    return 0
