"""Build, find or describe the native libraries: operators for ONNX Runtime, kernels for training, plugin for TensorRT.

`build` compiles the first two for this machine, and with --cuda its CUDA kernels and the TensorRT plugin too;
`path` prints where a library is, for your own code; and `info` tells what is there, of what this processor and the
library make use, the compilers, and whether onnxruntime takes it.
"""

from __future__ import annotations

import argparse
from typing import Any

from deploynorm.cli import options
from deploynorm.errors import BackendError, InputError

__all__ = ["add_arguments", "run"]

_LIBRARIES = ("onnxruntime", "torch", "tensorrt", "tensorrt-register")
"""Names of libraries.LIBRARIES here, which is not imported before it is needed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("build", "path", "info"))
    parser.add_argument(
        "--library",
        choices=_LIBRARIES,
        default="onnxruntime",
        help="of `path`: tensorrt for hosts that load plugins, tensorrt-register for those that open a library",
    )
    group = parser.add_argument_group("build")
    group.add_argument("--cuda", action="store_true", help="with nvcc: the CUDA kernels, and the TensorRT plugin")
    group.add_argument("--no-tensorrt", action="store_true", help="with --cuda: leave the plugin and its headers out")
    group.add_argument(
        "--architectures",
        metavar="LIST",
        help="of the GPUs, as CMake has them: 90, or '86-real;89-real' (default: all from 75 to 120)",
    )
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    from deploynorm import libraries
    from deploynorm.cli.terminal import Terminal

    terminal = Terminal(verbose=arguments.verbose, quiet=arguments.quiet)
    if arguments.action == "build":
        if not arguments.cuda and (arguments.no_tensorrt or arguments.architectures):
            raise InputError(
                "plugins build", "--no-tensorrt and --architectures are for a build with CUDA", fix="--cuda"
            )
        architectures = arguments.architectures.replace(",", ";").split(";") if arguments.architectures else ()
        with terminal.step("building"):
            library = libraries.build(
                cuda=arguments.cuda, tensorrt=not arguments.no_tensorrt, architectures=architectures
            )
        built = sorted(str(path) for path in library.parent.glob("*.so"))
        for path in built:
            terminal.line(f"built {path}")
        terminal.write_json(arguments.json, {"library": str(library), "libraries": built})
    elif arguments.action == "path":
        library = libraries.library_path(libraries.LIBRARIES[_LIBRARIES.index(arguments.library)])
        terminal.line(str(library))
        terminal.write_json(arguments.json, {"library": str(library)})
    else:
        facts = _facts()
        terminal.table("Native libraries", ("", ""), facts.items())
        terminal.write_json(arguments.json, facts)
    return 0


def _facts() -> dict[str, Any]:
    from deploynorm import libraries, ort

    library = libraries.find_library()
    facts: dict[str, Any] = {"library": "none: run deploynorm plugins build" if library is None else str(library)}
    if library is not None:
        facts["processor runs"] = ", ".join(libraries.cpu_variants(library))
        facts["CUDA kernels"] = (
            ", ".join(libraries.cuda_variants(library)) or "none: run deploynorm plugins build --cuda"
        )
    training = libraries.find_library(libraries.TORCH_LIBRARY)
    facts["for training"] = "none: run deploynorm plugins build" if training is None else str(training)
    plugin = libraries.find_library(libraries.TENSORRT_LIBRARY)
    facts["TensorRT plugin"] = "none: run deploynorm plugins build --cuda" if plugin is None else str(plugin)
    try:
        tools = libraries.find_tools()
        facts |= {"compiler": f"{tools.compiler} ({tools.compiler_version})", "cmake": str(tools.cmake)}
    except BackendError as error:
        facts["compiler"] = str(error)
    try:
        cuda = libraries.find_cuda()
        facts["CUDA compiler"] = f"{cuda.nvcc} ({cuda.version})"
    except BackendError as error:
        facts["CUDA compiler"] = str(error)
    try:
        onnxruntime = ort.import_onnxruntime()
        facts["onnxruntime"] = onnxruntime.__version__
        if library is not None:
            ort.register(onnxruntime.SessionOptions())
            facts["onnxruntime"] += ", takes the library"
    except BackendError as error:
        facts["onnxruntime"] = str(error)
    return facts
