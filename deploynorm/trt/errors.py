"""The errors of TensorRT, as ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from deploynorm.contract import OP_TYPE
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError


class Message(NamedTuple):
    """What TensorRT said."""

    severity: str  # INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE
    text: str


_BUILD_ANEW = "build it here, from the ONNX file: deploynorm build MODEL.onnx"

_KNOWN: Final[tuple[tuple[str, type[DeployNormError], str, str], ...]] = (
    (
        rf"[Cc]annot find plugin: {OP_TYPE}|could not find plugin:? {OP_TYPE}",
        BackendError,
        "holds our FRN plugin, which {name} has not loaded",
        "deploynorm plugins build --cuda, and in your own code deploynorm.trt.load_plugin",
    ),
    (
        "[Cc]annot find plugin|could not find plugin|IPluginCreator not found",
        BackendError,
        "holds a plugin that {name} has not loaded",
        "pass the library that brings it with --plugins",
    ),
    (
        r"Plugin not found, are the plugin name|No importer registered for op",
        ModelError,
        "holds an operator that {name} does not know",
        "pass the plugin library that brings it with --plugins, or export standard operators",
    ),
    (
        "plan file is not compatible with this version|[Vv]ersion tag does not match"
        "|incompatible serialization version",
        BackendError,
        "is not an engine of {name}: another version or flavour built it, or it is not an engine at all",
        _BUILD_ANEW,
    ),
    (
        "generated on an incompatible device|incompatible device|not compatible with the (current|target) (device|GPU)"
        "|compute capability .* (not|isn't) supported",
        BackendError,
        "was built for another kind of GPU",
        _BUILD_ANEW + ", with TensorRT-RTX for several: --compute-capability 8.6 --compute-capability 8.9",
    ),
    (
        "magicTag|[Mm]agic tag|plan file .*(corrupt|truncated)|Serialization assertion|read past the end|checksum",
        ModelError,
        "is not an engine of {name}, or is damaged",
        _BUILD_ANEW,
    ),
    (
        "host code|HostCode|host executable code",
        InputError,
        "holds code for the processor (a plugin library or a lean runtime), which loading it would run",
        "pass trust_engine=True (--trust-engine) for a file from a source you trust",
    ),
    (
        "does not satisfy any optimization profiles|exceed min ~ max range|outside (of )?(the )?profile"
        "|Static dimension mismatch",
        InputError,
        "is outside the shapes that the engine was built for",
        "feed another shape, or build with other --min-shapes and --max-shapes",
    ),
    (
        r"HW-specific datatypes: b16",
        InputError,
        "holds bfloat16, which GPUs of compute capability 7.5 do not have",
        "leave 7.5 out, or export with --dtype float16",
    ),
    (
        r"HW-specific datatypes: fp8",
        InputError,
        "holds float8, which GPUs have from compute capability 8.9 on",
        "leave the earlier ones out, or quantize to int8",
    ),
    (
        r"Cannot compile operation .* for Turing",
        InputError,
        "holds an operator that {name} does not have in this type for GPUs of compute capability 7.5",
        "leave 7.5 out, or export with --dtype float16",
    ),
    (
        r"input has type Int32 but must have type",
        ModelError,
        "dequantizes an int32 tensor, as a quantized bias is, and {name} dequantizes 8 bits and less alone",
        "quantize it without biases; in onnxruntime.quantization extra_options={'QuantizeBias': False}",
    ),
    (
        "[Ff]ailed to import initializer|Failed to (open|read) (external )?(weights )?file",
        ModelError,
        "its external data cannot be read",
        "keep the data file beside the model, and pass the model as a path",
    ),
    (
        r"[Oo]ut of memory|OutOfMemory|insufficient memory|Insufficient (GPU )?memory",
        BackendError,
        "needs more memory than the GPU has left",
        "smaller --max-shapes, or end other programs on the GPU",
    ),
    (
        r"Unable to load library: libnvinfer_lean",
        BackendError,
        "cannot be made version compatible: {name} has no lean runtime",
        "leave --version-compatible out",
    ),
    (
        r"cudaError 35|error:? 35\b|driver version is insufficient|no CUDA-capable device|cudaError 100|error:? 100\b"
        "|initialization failure",
        BackendError,
        "needs an NVIDIA GPU with a driver that is new enough, and {name} finds none here",
        "install the driver; only TensorRT-RTX also builds without a GPU, with --compute-capability",
    ),
)
"""Texts of TensorRT that we foresee, with our error, problem (`{name}` is filled in) and fix. In order: the first that
matches counts. A missing driver comes last, as it is told of beside other errors too."""

_NO_DRIVER_BESIDE: Final = re.compile(
    r"(; |\s)*(\[?\w+\.cpp::\w+::\d+\]? )?Error Code 1: Cuda Runtime \([^()]*\(cudaError 35: [^()]*\)\)"
)
"""What TensorRT-RTX says beside every other error where there is no driver."""


def explain(where: str, name: str, said: Sequence[Message] | str) -> DeployNormError:
    """What TensorRT (`name`, with its version) said of a file or function when it failed, as one of our errors."""
    text = _plain(said) if isinstance(said, str) else words(said)
    text = _NO_DRIVER_BESIDE.sub("", text).lstrip("; ") or text
    for pattern, kind, problem, fix in _KNOWN:
        if re.search(pattern, text):
            return kind(where, problem.format(name=name), got=text or None, fix=fix)
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
