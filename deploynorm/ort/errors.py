"""The errors of ONNX Runtime, as ours."""

from __future__ import annotations

import re
from typing import Final

from deploynorm.contract import DOMAIN, OP_TYPE
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError
from deploynorm.ort.runtime import import_onnxruntime

_KNOWN: Final[tuple[tuple[str, type[DeployNormError], str, str], ...]] = (
    (
        rf"{DOMAIN}:\w*{OP_TYPE}\S* is not a registered function/op",
        ModelError,
        f"holds {DOMAIN}::{OP_TYPE} without its function body, and the operator library was not registered",
        "run `deploynorm plugins build` and use deploynorm.ort.session or deploynorm.ort.register(options), or export "
        "again without --no-function; `deploynorm rewrite --restore ORIGINAL` puts back a body that a tool has dropped",
    ),
    (
        "is not a registered function/op|No Op registered for",
        ModelError,
        "holds an operator that onnxruntime {version} does not know",
        "pass the library that brings it with --plugins, or a newer onnxruntime",
    ),
    (
        "Domain already set in registry",
        InputError,
        "was opened with session options that have our operator library twice",
        "register it with deploynorm.ort.register(options) only, which knows what it has registered",
    ),
    (
        r"was rewritten for a processor with blocks of \d+ channels",
        BackendError,
        "was rewritten for another machine or another onnxruntime",
        "",
    ),
    (
        "Unsupported model IR version|is under development and support for this is limited|unknown model IR version",
        BackendError,
        "is newer than onnxruntime {version} reads",
        "upgrade onnxruntime, or export with a lower --opset",
    ),
    (
        "INVALID_PROTOBUF|No graph was found in the protobuf",
        ModelError,
        "not an ONNX file, or cut short",
        "export it again",
    ),
    (
        "[Ee]xternal data",
        ModelError,
        "its external data cannot be read",
        "keep the data file beside the model, and pass the model as a path",
    ),
    (
        "Could not find an implementation for",
        BackendError,
        "holds an operator that onnxruntime {version} lacks for this type and provider",
        "run it on another provider, or export it in float32",
    ),
    (
        r"Type 'tensor\(\w+\)' of input parameter .* is invalid|no kernel def matches node inputs",
        ModelError,
        "holds an operator of a type that onnxruntime {version} or the plugin library does not take",
        "export it in float32, or build the plugin library for that type",
    ),
)
"""Errors that we foresee: a pattern of their text, our class, the problem and the fix; `{version}` is filled in.

Our own libraries give the fix themselves.
"""


def explain(where: str, error: Exception) -> DeployNormError:
    """The error of ONNX Runtime as one of ours."""
    version = import_onnxruntime().__version__
    got, _, own_fix = plain(error).partition(". Fix: ")
    for pattern, kind, problem, fix in _KNOWN:
        if re.search(pattern, str(error)):
            return kind(where, problem.format(version=version), got=got, fix=fix or own_fix)
    return ModelError(where, f"onnxruntime {version} cannot run the model", got=got, fix=own_fix or None)


def plain(error: Exception) -> str:
    """ONNX Runtime's text without its codes, the path, its source lines and its line breaks."""
    codes = r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:)?"
    text = re.sub(codes, "", " ".join(str(error).split()))
    return re.sub(r"/onnxruntime_src/.*?\) (?=[A-Z])", "", text).rstrip(". ")
