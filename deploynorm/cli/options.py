"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from deploynorm.errors import InputError

__all__ = [
    "add_dynamic",
    "add_input_shape",
    "add_model",
    "add_output_control",
    "add_parity",
    "add_precision",
    "add_tolerance",
    "factory_kwargs",
]


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to read it."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="checkpoint, state_dict, pickled module or .pt2")
    group = parser.add_argument_group("reading the model")
    group.add_argument(
        "--factory",
        metavar="PKG.MOD:FN",
        help="function that builds the network for a state_dict; imported and called, so name only code you trust",
    )
    group.add_argument("--factory-kwargs", metavar="JSON", help="its arguments, as in '{\"num_classes\": 10}'")
    group.add_argument(
        "--trust-pickle", action="store_true", help="let a pickle run code; only for files from a source you trust"
    )
    add_input_shape(group)


def add_input_shape(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--input-shape",
        metavar="[NAME:]SHAPE",
        action="append",
        default=[],
        help="x:2x3x224x224 or 2x3x224x224; may be left out where the model names its input",
    )


def add_dynamic(parser: argparse._ActionsContainer) -> None:
    """Which axes of the inputs stay free."""
    parser.add_argument(
        "--dynamic",
        choices=("none", "batch", "spatial", "all"),
        help="axes that must stay free (default: all that the network leaves free)",
    )


def add_precision(parser: argparse._ActionsContainer) -> None:
    """The type of weights and activations, and what does not take it."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of weights and activations (default: the network's own); FRN's parameters stay in float32",
    )
    parser.add_argument(
        "--keep-io-types", action="store_true", help="inputs and outputs keep the network's own type, with casts inside"
    )
    parser.add_argument(
        "--keep-float32",
        metavar="NAME",
        action="append",
        default=[],
        help="a layer that stays in float32 in half precision, as in named_modules; * stands for anything",
    )


def add_tolerance(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--atol", type=float, help="absolute tolerance (default by dtype; float32: 1e-7)")
    parser.add_argument("--rtol", type=float, help="relative to the largest output (default by dtype; float32: 1e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")


def add_parity(parser: argparse.ArgumentParser) -> None:
    """The tolerance and the inputs of a parity check."""
    group = parser.add_argument_group("parity check")
    add_tolerance(group)
    group.add_argument(
        "--backend",
        choices=("onnxruntime", "half", "reference"),
        help="what runs the ONNX file: half rounds every half tensor as a GPU does, reference is ONNX's slow evaluator "
        "(default onnxruntime, after half for a file in half precision; reference where onnxruntime is not installed)",
    )


def add_output_control(parser: argparse.ArgumentParser) -> None:
    """What is printed, and where else it goes."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="PATH", type=Path, help="also write what was found, as JSON")
    level = group.add_mutually_exclusive_group()
    level.add_argument("-v", "--verbose", action="store_true", help="a line for each layer and each sample")
    level.add_argument("-q", "--quiet", action="store_true", help="errors alone")


def factory_kwargs(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The value of --factory-kwargs, None where it was not given.

    Raises:
        InputError: It is something else.
    """
    text: str | None = arguments.factory_kwargs
    if text is None:
        return None
    option, expected = "--factory-kwargs", 'an object such as {"num_classes": 10}'
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(option, "not JSON", got=repr(text), expected=expected) from error
    if not isinstance(value, dict):
        raise InputError(option, "not a JSON object", got=repr(text), expected=expected)
    return value
