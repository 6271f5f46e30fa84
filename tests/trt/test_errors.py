"""TensorRT's words in ours. The texts are those of TensorRT-RTX 1.7, and for the others of users' reports."""

from __future__ import annotations

import pytest

from deploynorm.contract import DOMAIN, OP_TYPE
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError
from deploynorm.trt.errors import Message, explain, words

KNOWN: dict[str, tuple[str, type[DeployNormError], str]] = {
    "our plugin, TensorRT 10 and later": (
        f"IPluginRegistry::getCreator: Error Code 4: API Usage Error (Cannot find plugin: {OP_TYPE}, version: 1, "
        f"namespace:{DOMAIN}.)",
        BackendError,
        "holds our FRN plugin, which TensorRT 11.4.0 has not loaded",
    ),
    "another plugin": (
        "IPluginRegistry::getCreator: Error Code 4: Cannot find plugin: ROIAlign_X, version: 1, namespace:.",
        BackendError,
        "holds a plugin that TensorRT 11.4.0 has not loaded",
    ),
    "a plugin, when an engine is read": (
        "Error Code 1: Serialization (Serialization assertion creator failed.Cannot deserialize plugin since "
        "corresponding IPluginCreator not found in Plugin Registry)",
        BackendError,
        "holds a plugin that TensorRT 11.4.0 has not loaded",
    ),
    "an operator": (
        'Nonsense n0: creator && "Plugin not found, are the plugin name, version, and namespace correct?"',
        ModelError,
        "holds an operator that TensorRT 11.4.0 does not know",
    ),
    "another version": (
        "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is not compatible with "
        "this version of TensorRT, expecting library version 11.4.0 got 10.9.0, please rebuild.)",
        BackendError,
        "is not an engine of TensorRT 11.4.0",
    ),
    "another version, by its tag": (
        "Error Code 1: Serialization (Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version "
        "tag does not match. Note: Current Version: 239, Serialized Engine Version: 240)",
        BackendError,
        "is not an engine of TensorRT 11.4.0",
    ),
    "another GPU": (
        "Error Code 6: API Usage Error (The engine plan file is generated on an incompatible device, expecting compute "
        "8.9 got compute 8.6, please rebuild.)",
        BackendError,
        "was built for another kind of GPU",
    ),
    "a damaged plan": (
        "Error Code 1: Serialization (Serialization assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not "
        "match)",
        ModelError,
        "is not an engine of TensorRT 11.4.0, or is damaged",
    ),
    "a shape outside the profile": (
        "IExecutionContext::setInputShape: Error Code 3: API Usage Error (Set dimension [9,3,224,224] for tensor x "
        "does not satisfy any optimization profiles. Valid range for profile 0: [1,3,224,224]..[8,3,224,224].)",
        InputError,
        "is outside the shapes that the engine was built for",
    ),
    "bfloat16 on Turing": (
        "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for "
        "target(s) sm75, because the model contains HW-specific datatypes: b16.)",
        InputError,
        "holds bfloat16, which GPUs of compute capability 7.5 do not have",
    ),
    "float8 before Ada": (
        "Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for target(s) sm86, because the model "
        "contains HW-specific datatypes: fp8_e4m3.)",
        InputError,
        "holds float8, which GPUs have from compute capability 8.9 on",
    ),
    "a float32 product on Turing": (
        "Error Code 1: Myelin ([pass.cpp:337: check_turing_op_compatibility] Cannot compile operation 'node_linear' "
        "for Turing (SM75): FP32 GEMM is not supported.)",
        InputError,
        "does not have in this type for GPUs of compute capability 7.5",
    ),
    "a quantized bias": (
        "DequantizeLinear b: Invalid Node - b ITensor::getDimensions: Error Code 4: API Usage Error (b: input has type "
        "Int32 but must have type FP8, FP4, Int4, Int8, or UInt8. In checkType at /_src/optimizer/common/nodeBase.cpp:"
        "456)",
        ModelError,
        "dequantizes an int32 tensor, as a quantized bias is",
    ),
    "external data": (
        "Failed to import initializer: In node -1 with name: and operator: (importInitializers): UNSUPPORTED_NODE",
        ModelError,
        "its external data cannot be read",
    ),
    "memory": ("Error Code 1: Cuda Runtime (out of memory)", BackendError, "needs more memory than the GPU has left"),
    "no driver": (
        "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/common/dispatch/"
        "checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime version))",
        BackendError,
        "needs an NVIDIA GPU with a driver that is new enough, and TensorRT 11.4.0 finds none here",
    ),
    "no driver, of a builder": (
        "CUDA initialization failure with error: 35. Please check your CUDA installation",
        BackendError,
        "needs an NVIDIA GPU with a driver that is new enough",
    ),
    "anything else": ("something is amiss", ModelError, "TensorRT 11.4.0 cannot take it. Got something is amiss"),
}


@pytest.mark.parametrize(("text", "kind", "message"), KNOWN.values(), ids=KNOWN)
def test_words_of_tensorrt_are_reported_in_ours(text: str, kind: type[DeployNormError], message: str) -> None:
    error = explain("model.onnx", "TensorRT 11.4.0", [Message("ERROR", text)])
    assert type(error) is kind
    assert str(error).startswith("model.onnx: ")
    assert message in str(error)
    assert "/_src/" not in str(error)
    assert "\n" not in str(error)


def test_a_missing_driver_is_not_reported_where_something_else_failed() -> None:
    """Without a driver TensorRT-RTX tells of it beside every other error."""
    driver, shape, other = (KNOWN[name][0] for name in ("no driver", "bfloat16 on Turing", "anything else"))
    assert "bfloat16" in explain("x", "TensorRT", [Message("ERROR", driver), Message("ERROR", shape)]).problem
    for said in ([Message("ERROR", other), Message("ERROR", driver)], f"{other} {driver}"):
        error = explain("x", "TensorRT", said)
        assert (type(error), error.problem, error.got) == (ModelError, "TensorRT cannot take it", other)


def test_errors_come_before_warnings_and_each_once() -> None:
    texts = [("WARNING", "w"), ("ERROR", "b."), ("INTERNAL_ERROR", "a\n  c"), ("ERROR", "b.")]
    heard = [Message(*text) for text in texts]
    assert words(heard) == "b; a c"
    assert words(heard[:1]) == "w"
    assert words([Message("INFO", "i")]) == ""
    assert "no message from TensorRT" in str(explain("x", "TensorRT", []))
