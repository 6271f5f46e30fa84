"""The errors of TensorRT, as ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from deploynorm.contract import OP_TYPE
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError

__all__ = ["Message", "explain", "words"]


class Message(NamedTuple):
    """What TensorRT said."""

    severity: str
    """INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE."""

    text: str


class _Known(NamedTuple):
    """A message of TensorRT that we foresee, known by its text; `{name}` is filled in."""

    text: str
    kind: type[DeployNormError]
    problem: str
    fix: str


_BUILD_ANEW = "build it here, from the ONNX file: deploynorm build MODEL.onnx"

_KNOWN: Final = (
    _Known(
        rf"[Cc]annot find plugin: {OP_TYPE}|could not find plugin:? {OP_TYPE}",
        BackendError,
        "holds our FRN plugin, which {name} has not loaded",
        "deploynorm plugins build --cuda, and in your own code deploynorm.trt.load_plugin",
    ),
    _Known(
        "[Cc]annot find plugin|could not find plugin|IPluginCreator not found",
        BackendError,
        "holds a plugin that {name} has not loaded",
        "pass the library that brings it with --plugins",
    ),
    _Known(
        r"Plugin not found, are the plugin name|No importer registered for op",
        ModelError,
        "holds an operator that {name} does not know",
        "pass the plugin library that brings it with --plugins, or export standard operators",
    ),
    _Known(
        "plan file is not compatible with this version|[Vv]ersion tag does not match"
        "|incompatible serialization version",
        BackendError,
        "is not an engine of {name}: another version or flavour built it, or it is not an engine at all",
        _BUILD_ANEW,
    ),
    _Known(
        "generated on an incompatible device|incompatible device|not compatible with the (current|target) (device|GPU)"
        "|compute capability .* (not|isn't) supported",
        BackendError,
        "was built for another kind of GPU",
        _BUILD_ANEW + ", with TensorRT-RTX for several: --compute-capability 8.6 --compute-capability 8.9",
    ),
    _Known(
        "magicTag|[Mm]agic tag|plan file .*(corrupt|truncated)|Serialization assertion|read past the end|checksum",
        ModelError,
        "is not an engine of {name}, or is damaged",
        _BUILD_ANEW,
    ),
    _Known(
        "host code|HostCode|host executable code",
        InputError,
        "holds code for the processor (a plugin library or a lean runtime), which loading it would run",
        "pass trust_engine=True (--trust-engine) for a file from a source you trust",
    ),
    _Known(
        "does not satisfy any optimization profiles|exceed min ~ max range|outside (of )?(the )?profile"
        "|Static dimension mismatch",
        InputError,
        "is outside the shapes that the engine was built for",
        "feed another shape, or build with other --min-shapes and --max-shapes",
    ),
    _Known(
        r"HW-specific datatypes: b16",
        InputError,
        "holds bfloat16, which GPUs of compute capability 7.5 do not have",
        "leave 7.5 out, or export with --dtype float16",
    ),
    _Known(
        r"Cannot compile operation .* for Turing",
        InputError,
        "holds an operator that {name} does not have in this type for GPUs of compute capability 7.5",
        "leave 7.5 out, or export with --dtype float16",
    ),
    _Known(
        "[Ff]ailed to import initializer|Failed to (open|read) (external )?(weights )?file",
        ModelError,
        "its external data cannot be read",
        "keep the data file beside the model, and pass the model as a path",
    ),
    _Known(
        r"[Oo]ut of memory|OutOfMemory|insufficient memory|Insufficient (GPU )?memory",
        BackendError,
        "needs more memory than the GPU has left",
        "smaller --max-shapes, or end other programs on the GPU",
    ),
    _Known(
        r"Unable to load library: libnvinfer_lean",
        BackendError,
        "cannot be made version compatible: {name} has no lean runtime",
        "leave --version-compatible out",
    ),
    _Known(
        r"cudaError 35|error:? 35\b|driver version is insufficient|no CUDA-capable device|cudaError 100|error:? 100\b"
        "|initialization failure",
        BackendError,
        "needs an NVIDIA GPU with a driver that is new enough, and {name} finds none here",
        "install the driver; only TensorRT-RTX also builds without a GPU, with --compute-capability",
    ),
)
"""In order: the first that matches counts. A missing driver comes last, because without one TensorRT-RTX reports it
beside every other error."""


def explain(where: str, name: str, said: Sequence[Message] | str) -> DeployNormError:
    """What TensorRT (`name`, with its version) said of a file or function when it failed, as one of our errors."""
    text = said if isinstance(said, str) else words(said)
    for known in _KNOWN:
        if re.search(known.text, text):
            return known.kind(where, known.problem.format(name=name), got=text or None, fix=known.fix)
    return ModelError(where, f"{name} cannot take it", got=text or "no message from TensorRT")


def words(heard: Sequence[Message]) -> str:
    """The errors, else the warnings, each once, without the places in TensorRT's own sources."""
    for severities in (("INTERNAL_ERROR", "ERROR"), ("WARNING",)):
        texts = [_plain(message.text) for message in heard if message.severity in severities]
        if texts:
            return "; ".join(dict.fromkeys(texts))
    return ""


def _plain(text: str) -> str:
    text = " ".join(text.split())
    text = re.sub(r"^\[?\w+\.cpp::\w+::\d+\]? ", "", text)
    text = re.sub(r"\s*In (?:node -1 with name: and operator: )?\w+ at /\S+?:\d+", "", text)
    return text.rstrip(". ")
