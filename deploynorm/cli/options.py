"""Options that several verbs share, and the values that they stand for.

What can be known to be wrong without torch is said here, before it is imported.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from deploynorm.contract import DTYPES, MAX_OPSET, MIN_OPSET
from deploynorm.inputs import parse_dynamic_axes, parse_input_shapes
from deploynorm.run.backends import ONNX_BACKENDS

__all__ = [
    "ONNX_HELP",
    "add_dynamic",
    "add_input_shape",
    "add_model",
    "add_output",
    "add_output_control",
    "add_parity",
    "add_precision",
    "add_tolerance",
    "dynamic",
    "existing_file",
    "model_options",
    "names",
    "numbers",
    "opset",
    "tolerances",
]

ONNX_HELP = "an ONNX file that deploynorm export has written"


def existing_file(text: str) -> Path:
    """A path as an argument, refused where no file is."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return path


def output_file(text: str) -> Path:
    """A path as an argument, refused where its folder is not there or it is a folder itself."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise argparse.ArgumentTypeError(f"cannot write there: {reason}")
    return path


def opset(text: str) -> int:
    if not text.isdecimal() or not MIN_OPSET <= int(text) <= MAX_OPSET:
        raise argparse.ArgumentTypeError(f"unsupported opset {text}; expected {MIN_OPSET} to {MAX_OPSET}")
    return int(text)


def tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, finite and not negative: {text}")
    return value


def names(text: str) -> list[str]:
    """a,b,c."""
    return [name.strip() for name in text.split(",")]


def numbers(text: str) -> list[float]:
    """0.5,0.25."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no numbers: {text}; expected as in 0.485,0.456,0.406") from error


def json_object(text: str) -> dict[str, Any]:
    expected = 'expected an object such as {"num_classes": 10}'
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {text!r}; {expected}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text!r}; {expected}")
    return value


def add_model(
    parser: argparse.ArgumentParser,
    help: str = "checkpoint, state_dict, pickled module or .pt2",
    *,
    shapes: bool = True,
) -> None:
    """MODEL and how to read it."""
    parser.add_argument("model", metavar="MODEL", type=existing_file, help=help)
    group = parser.add_argument_group("reading the model")
    group.add_argument(
        "--factory",
        metavar="PKG.MOD:FN",
        help="function that builds the network for a state_dict; imported and called, so name only code you trust",
    )
    group.add_argument(
        "--factory-kwargs", metavar="JSON", type=json_object, help="its arguments, as in '{\"num_classes\": 10}'"
    )
    group.add_argument(
        "--trust-pickle", action="store_true", help="let a pickle run code; only for files from a source you trust"
    )
    if shapes:
        add_input_shape(group)


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_model` read, as the library's functions take it."""
    found = {name: getattr(arguments, name) for name in ("factory", "factory_kwargs", "trust_pickle")}
    if "input_shape" in arguments:
        found["input_shapes"] = parse_input_shapes(arguments.input_shape)
    return found


def add_input_shape(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--input-shape",
        metavar="[NAME:]SHAPE",
        action="append",
        default=[],
        help="x:2x3x224x224 or 2x3x224x224; may be left out where the model names its input",
    )


def add_dynamic(parser: argparse._ActionsContainer) -> None:
    """Which axes of the inputs are dynamic."""
    parser.add_argument(
        "--dynamic",
        metavar="{none,batch,spatial,all,[NAME:]AXIS=NAME,...}",
        action="append",
        help="axes that must be dynamic: a word, or by number with their names, x:0=N,2=H,3=W "
        "(default: each axis that the network takes in other sizes)",
    )


def dynamic(arguments: argparse.Namespace) -> Any:
    """What `add_dynamic` read, as the library's functions take it."""
    return parse_dynamic_axes(arguments.dynamic or ())


def add_precision(parser: argparse._ActionsContainer) -> None:
    """The type of weights and activations, and what does not take it."""
    parser.add_argument(
        "--dtype",
        choices=[name for name in DTYPES if name != "float64"],
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
    parser.add_argument("--atol", type=tolerance, help="absolute tolerance (default by dtype; float32: 1e-7)")
    parser.add_argument(
        "--rtol", type=tolerance, help="relative to the largest output (default by dtype; float32: 1e-4)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")


def tolerances(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_tolerance` read, as the library's functions take it."""
    return {"atol": arguments.atol, "rtol": arguments.rtol, "seed": arguments.seed}


def add_parity(parser: argparse.ArgumentParser, *, backend: bool = True) -> None:
    """The tolerance and the inputs of a parity check."""
    group = parser.add_argument_group("parity check")
    add_tolerance(group)
    if backend:
        group.add_argument(
            "--backend",
            choices=ONNX_BACKENDS,
            help="what runs the ONNX file: half rounds every half tensor as a GPU does, reference is ONNX's slow "
            "evaluator (default onnxruntime, after half for a file in half precision; reference where onnxruntime is "
            "not installed)",
        )


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("-o", "--output", type=output_file, help=f"default: MODEL with the ending {default}")


def add_output_control(parser: argparse.ArgumentParser) -> None:
    """What is printed, and where else it goes."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="PATH", type=output_file, help="also write what was found, as JSON")
    level = group.add_mutually_exclusive_group()
    level.add_argument("-v", "--verbose", action="store_true", help="a line for each layer and each sample")
    level.add_argument("-q", "--quiet", action="store_true", help="errors only")
