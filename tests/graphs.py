"""Small ONNX graphs that several test files run."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from deploynorm.contract import (
    ADD_OP_TYPE,
    DOMAIN,
    INPUTS,
    NODE_ATTRIBUTES,
    OP_TYPE,
    OPERATORS,
    OUTPUT,
    PARAMETERS,
    RESIDUAL,
    VERSION,
)
from deploynorm.lowering import function_proto

__all__ = ["CHANNELS", "OPSET", "frn_model", "frn_parameters", "one_node"]

CHANNELS = 4
OPSET = 20
IR_VERSION = 10

ELEMENT_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float64": onnx.TensorProto.DOUBLE,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}


def frn_parameters(dtype: str = "float32") -> dict[str, np.ndarray]:
    """gamma, beta, tau and eps of `frn_model(dtype)`: every channel another one, one of them without a threshold."""
    wide = np.float64 if dtype == "float64" else np.float32
    values = ([1.0, -0.5, 2.0, 0.25], [0.0, 0.5, -1.0, 0.1], [0.0, -0.25, -np.inf, 0.2], [1e-6, 1e-5, 1e-4, 1e-3])
    return {name: np.array(value, wide) for name, value in zip(PARAMETERS, values, strict=True)}


def frn_model(
    dtype: str = "float32",
    *,
    body: onnx.FunctionProto | Literal[True] | None = None,
    parameters: dict[str, np.ndarray] | None = None,
    shape: tuple[int | str, ...] = ("N", CHANNELS, "H", "W"),
    residual: bool = False,
) -> onnx.ModelProto:
    """One node of our operator over an input X, with `body` as its function; True is the one that export writes.

    With `residual` it is the operator that adds one, the second input of the graph.
    """
    op_type = ADD_OP_TYPE if residual else OP_TYPE
    if body is True:
        half = dtype in ("float16", "bfloat16")
        body = function_proto(OPSET, op_type, half=half, maps=len(shape) == 4 and not half)
    parameters = frn_parameters(dtype) if parameters is None else parameters
    node = onnx.helper.make_node(op_type, OPERATORS[op_type], [OUTPUT], domain=DOMAIN, **NODE_ATTRIBUTES)
    tensors = (INPUTS[0], RESIDUAL) if residual else INPUTS[:1]
    graph = onnx.helper.make_graph(
        [node],
        "frn",
        [onnx.helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], shape) for name in tensors],
        [onnx.helper.make_tensor_value_info(OUTPUT, ELEMENT_TYPES[dtype], shape)],
        [onnx.numpy_helper.from_array(value, name) for name, value in parameters.items()],
    )
    imports = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    functions = [] if body is None else [body]
    return onnx.helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=IR_VERSION)


def one_node(
    op_type: str,
    inputs: dict[str, tuple[str, tuple[int | str | None, ...] | None]],
    output: tuple[str, tuple[int | str | None, ...] | None],
) -> onnx.ModelProto:
    """A graph of one standard operator; inputs and the output `y` are given as (dtype, shape)."""
    node = onnx.helper.make_node(op_type, list(inputs), ["y"])
    values = [
        onnx.helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], shape)
        for name, (dtype, shape) in (*inputs.items(), ("y", output))
    ]
    graph = onnx.helper.make_graph([node], op_type, values[:-1], values[-1:])
    imports = [onnx.helper.make_opsetid("", OPSET)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)


UNREADABLE = {
    "not there": None,
    "empty": b"",
    "text": b"this is not a model" * 20,
    "cut short": frn_model(body=True).SerializeToString()[:-40],
}
"""Contents of files that are no models; None for a file that is not there."""
