"""Build, find or describe the native libraries: operators for ONNX Runtime, kernels for training, plugin for TensorRT.

`build` compiles the first two for this machine, and with --cuda its CUDA kernels and the TensorRT plugin too;
`path` prints where a library is, for your own code; and `info` shows what is there, which kernels this processor
runs, the compilers, and whether onnxruntime takes the library.
"""

from __future__ import annotations

import argparse

from deploynorm.cli import options
from deploynorm.libraries.find import LIBRARIES

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("build", "path", "info"))
    parser.add_argument(
        "--library",
        choices=tuple(LIBRARIES),
        default="onnxruntime",
        help="of `path`: tensorrt for hosts that load plugins, tensorrt-register for those that open a library",
    )
    group = parser.add_argument_group("build")
    group.add_argument("--cuda", action="store_true", help="with nvcc: the CUDA kernels, and the TensorRT plugin")
    group.add_argument("--no-tensorrt", action="store_true", help="with --cuda: leave the plugin and its headers out")
    group.add_argument(
        "--architectures",
        metavar="LIST",
        default="",
        help="of the GPUs, as CMake has them: 90, or '86-real;89-real' (default: all from 75 to 120)",
    )
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    from deploynorm import libraries
    from deploynorm.cli.terminal import Terminal

    terminal = Terminal(quiet=arguments.quiet)
    if arguments.action == "build":
        with terminal.step("building"):
            built = libraries.build(
                cuda=arguments.cuda,
                tensorrt=not arguments.no_tensorrt,
                architectures=[name for name in arguments.architectures.replace(",", ";").split(";") if name],
            )
        terminal.show(built)
        terminal.write_json(arguments.json, built.to_dict())
    elif arguments.action == "path":
        path = libraries.library_path(arguments.library)
        terminal.show(path)
        terminal.write_json(arguments.json, {"library": str(path)})
    else:
        description = libraries.describe()
        terminal.show(description)
        terminal.write_json(arguments.json, description.to_dict())
    return 0
