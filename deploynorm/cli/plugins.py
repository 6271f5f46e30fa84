"""Build, find or describe the operator library for ONNX Runtime.

`build` compiles it for this machine, `path` prints where it is, for your own code, and `info` tells what is there:
the library, the instruction sets of this processor that it uses, the compiler, and whether onnxruntime takes it.
"""

from __future__ import annotations

import argparse
from typing import Any

from deploynorm.cli import options
from deploynorm.errors import BackendError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("build", "path", "info"))
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    from deploynorm import plugins
    from deploynorm.cli.terminal import Terminal

    terminal = Terminal(verbose=arguments.verbose, quiet=arguments.quiet)
    if arguments.action == "build":
        with terminal.step("building"):
            library = plugins.build()
        terminal.line(f"built {library}")
        terminal.write_json(arguments.json, {"library": str(library)})
    elif arguments.action == "path":
        library = plugins.library_path()
        terminal.line(str(library))
        terminal.write_json(arguments.json, {"library": str(library)})
    else:
        facts = _facts()
        terminal.table("Operator library", ("", ""), facts.items())
        terminal.write_json(arguments.json, facts)
    return 0


def _facts() -> dict[str, Any]:
    from deploynorm import ort, plugins

    library = plugins.find_library()
    facts: dict[str, Any] = {"library": "none: run deploynorm plugins build" if library is None else str(library)}
    if library is not None:
        facts["processor runs"] = ", ".join(plugins.cpu_variants(library))
    try:
        tools = plugins.find_tools()
        facts |= {"compiler": f"{tools.compiler} ({tools.compiler_version})", "cmake": str(tools.cmake)}
    except BackendError as error:
        facts["compiler"] = str(error)
    try:
        onnxruntime = ort.import_onnxruntime()
        facts["onnxruntime"] = onnxruntime.__version__
        if library is not None:
            ort.register(onnxruntime.SessionOptions())
            facts["onnxruntime"] += ", takes the library"
    except BackendError as error:
        facts["onnxruntime"] = str(error)
    return facts
