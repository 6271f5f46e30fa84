"""Build, find or describe the native libraries: operators for ONNX Runtime, kernels for training, plugin for TensorRT.

`build` compiles the first two for this machine, and with --cuda its CUDA kernels and the TensorRT plugin too;
`path` prints where a library is, for your own code; and `info` shows what is there, which kernels this processor
runs, the compilers, and whether onnxruntime takes the library.
"""

from __future__ import annotations

import argparse
from typing import Any

from deploynorm.cli.terminal import Terminal
from deploynorm.libraries.find import LIBRARIES


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
    group.add_argument(
        "--no-tensorrt",
        dest="tensorrt",
        action="store_false",
        help="with --cuda: leave the plugin and its headers out",
    )
    group.add_argument(
        "--architectures",
        metavar="LIST",
        type=lambda text: [name for name in text.replace(",", ";").split(";") if name],
        default=[],
        help="of the GPUs, as CMake has them: 90, or '86-real;89-real' (default: all since Turing)",
    )


def run(terminal: Terminal, action: str, library: str, **given: Any) -> None:
    from deploynorm import libraries

    if action == "path":
        path = libraries.library_path(library)
        terminal.show(path)
        terminal.write_json({"library": str(path)})
        return
    with terminal.step("building" if action == "build" else "looking"):
        found = libraries.build(**given) if action == "build" else libraries.describe()
    terminal.show(found)
    terminal.write_json(found.to_dict())
