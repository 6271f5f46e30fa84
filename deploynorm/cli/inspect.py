"""Show what is in a model, an ONNX file or an engine.

Of a model: how it was read, its layers that matter here, its parameters. Of an ONNX file: inputs and outputs, nodes,
functions, weights by type, and what it says of its origin. Of an engine: what its manifest says. Nothing is run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploynorm.cli import options
from deploynorm.cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, "checkpoint, state_dict, pickled module, .pt2, ONNX file or engine", shapes=False)


def run(terminal: Terminal, model: Path, **given: Any) -> None:
    from deploynorm._inspect import inspect

    inspection = inspect(model, **given)
    terminal.show(inspection)
    terminal.write_json(inspection.to_dict())
