"""Show what is in a model, an ONNX file or an engine.

Of a model: how it was read, its layers that matter here, its parameters. Of an ONNX file: inputs and outputs, nodes,
functions, weights by type, and what it says of its origin. Of an engine: what its manifest says. Nothing is run.
"""

from __future__ import annotations

import argparse

from deploynorm.cli import options

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, "checkpoint, state_dict, pickled module, .pt2, ONNX file or engine", shapes=False)
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    model = options.model_options(arguments)

    from deploynorm._inspect import inspect
    from deploynorm.cli.terminal import Terminal

    terminal = Terminal(quiet=arguments.quiet)
    inspection = inspect(arguments.model, **model)
    terminal.show(inspection)
    terminal.write_json(arguments.json, inspection.to_dict())
    return 0
