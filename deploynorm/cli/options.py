"""Options that several verbs share, and the values that they stand for.

What can be known to be wrong without torch is said here, before it is imported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deploynorm.files import NAME_BYTES, check_outputs, is_stream, onnx_companions
from deploynorm.inputs import (
    parse_dynamic_axes,
    parse_input_dtypes,
    parse_input_shapes,
    parse_named_file,
    parse_profile_shapes,
)
from deploynorm.run.backends import ENGINE_SUFFIXES, ONNX_BACKENDS

PARSED: Final[Mapping[str, Callable[[Sequence[str]], Any]]] = {
    "input_shapes": parse_input_shapes,
    **dict.fromkeys(("min_shapes", "opt_shapes", "max_shapes"), parse_profile_shapes),
    "input_dtypes": parse_input_dtypes,
    "dynamic": parse_dynamic_axes,
}
"""Options that may be given several times, and what reads all their values together."""


_READ: Final = ("model", "candidate", "files", "labels", "plugins")
_WRITTEN: Final = ("output", "json", "timing_cache")
"""Options of any verb whose values are files."""


def check_files(given: Mapping[str, Any]) -> None:
    """Raises InputError where an output of a call is one of its inputs or is there twice, companions included."""
    read, written = ([value for name in names if (value := given.get(name))] for names in (_READ, _WRITTEN))
    texts = [text for value in read for text in (value if isinstance(value, list) else [value])]
    inputs = [Path(parse_named_file(str(text))[1]) for text in texts]
    if factory := given.get("factory"):
        inputs.append(Path(f"{factory.partition(':')[0].replace('.', '/')}.py"))  # looked for in this folder first
    inputs += [Path(name.partition("=")[2].rpartition(":")[0]) for name in given.get("passes") or () if ":" in name]
    check_outputs(_with_companions(written), _with_companions(inputs))


def _with_companions(files: Sequence[Path]) -> list[Path]:
    """Files, and what belongs to those that are ONNX files or engines."""
    weights_and_manifests = (each for path in files if path.suffix == ".onnx" for each in onnx_companions(path))
    manifests = (path.with_name(f"{path.name}.json") for path in files if path.suffix in ENGINE_SUFFIXES)
    return [*files, *weights_and_manifests, *manifests]


def existing_file(text: str) -> Path:
    """A path as an argument, refused where no file is."""
    path = Path(text)
    if not os.path.exists(path) or path.is_dir():  # unlike path.exists(), for names that are none too
        reason = "it is a folder, not a file" if os.path.isdir(path) else "no such file"
        raise argparse.ArgumentTypeError(f"{reason}: {text}")
    return path


def output_file(text: str) -> Path:
    """A path as an argument, refused where its folder cannot be written to or it is a folder itself."""
    path = Path(text)
    if os.path.isdir(path):  # unlike path.is_dir(), for names that are none too
        reason = "it is a folder"
    elif len(os.fsencode(path.name)) > NAME_BYTES:
        reason = f"the name is longer than the {NAME_BYTES} bytes that a disk takes"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif not is_stream(path) and not os.access(path.parent, os.W_OK):
        reason = f"the folder {path.parent} is read-only"
    else:
        return path
    raise argparse.ArgumentTypeError(f"cannot write there: {reason}")


def tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, finite and not negative: {text}")
    return value


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'not JSON of an object: {text!r}; expected one such as {{"num_classes": 10}}')
    return value


def add_onnx_file(
    parser: argparse.ArgumentParser, text: str = "an ONNX file that deploynorm export has written"
) -> None:
    parser.add_argument("model", metavar="MODEL", type=existing_file, help=text)


def add_model(
    parser: argparse.ArgumentParser,
    help: str = "checkpoint, state_dict, .safetensors, pickled module or .pt2",
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
        "--key", help="where the weights are in the file, as state_dict (default: an average, else the raw weights)"
    )
    group.add_argument(
        "--strip-prefix",
        metavar="PREFIX",
        help="what stands before the network's names in a state_dict that holds more, as encoder.",
    )
    group.add_argument(
        "--trust-pickle", action="store_true", help="let a pickle run code; only for files from a source you trust"
    )
    if shapes:
        add_input_shape(group)
        add_input_dtype(group)


def add_accept_changed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accept-changed",
        action="store_true",
        help="go on with a file that is not the one that its manifest was written for, as after another tool",
    )


def add_input_shape(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--input-shape",
        dest="input_shapes",
        metavar="[NAME:]SHAPE",
        action="append",
        help="x:2x3x224x224 or 2x3x224x224; may be left out where the model names its input",
    )


def add_input_dtype(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--input-dtype",
        dest="input_dtypes",
        metavar="[NAME:]DTYPE",
        action="append",
        help="label:int64 (default: the network's own type, or int64 where it refuses that)",
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


def add_parity(parser: argparse.ArgumentParser, *, backend: bool = True) -> argparse._ArgumentGroup:
    """The tolerance and the inputs of a parity check."""
    group = parser.add_argument_group("parity check")
    group.add_argument("--atol", type=tolerance, help="absolute tolerance (default by dtype; float32: 1e-7)")
    group.add_argument(
        "--rtol", type=tolerance, help="relative to the largest output (default by dtype; float32: 1e-4)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    if backend:
        group.add_argument(
            "--backend",
            choices=ONNX_BACKENDS,
            help="what runs the ONNX file: half rounds every half tensor as a GPU does, reference is ONNX's slow "
            "evaluator (default onnxruntime, after half for a file in half precision; reference where onnxruntime is "
            "not installed)",
        )
    return group


def add_output(
    parser: argparse.ArgumentParser, default: str, ending: Callable[[Mapping[str, Any]], str] | None = None
) -> None:
    """The output of a verb that writes MODEL in another form; `ending` tells it from the other options."""
    parser.add_argument("-o", "--output", type=output_file, help=f"default: MODEL with the ending {default}")
    parser.set_defaults(ending=ending or (lambda given: default))


def add_output_control(parser: argparse.ArgumentParser) -> None:
    """What is printed, and where else it goes."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="PATH", type=output_file, help="also write what was found, as JSON")
    level = group.add_mutually_exclusive_group()
    level.add_argument("-v", "--verbose", action="store_true", help="more detail: each layer, each sample")
    level.add_argument("-q", "--quiet", action="store_true", help="errors only")
