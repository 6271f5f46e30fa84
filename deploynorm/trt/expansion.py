"""The operator with a residual as our plugin, which has none, and what TensorRT has itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from deploynorm.contract import DOMAIN, INPUTS, NODE_ATTRIBUTES, OP_TYPE, PARAMETERS


def expanded(node: onnx.NodeProto, name: str) -> list[onnx.NodeProto]:
    """The nodes in the place of one with a residual, of any rank: FRN of that name and no threshold, Add and Max.

    In half precision the sum is then rounded before the threshold, and FRN's value before the sum.
    """

    def make(op_type: str, inputs: list[str], part: str, **attributes: Any) -> str:
        made.append(onnx.helper.make_node(op_type, inputs, [f"{name}_{part}"], f"{name}_{part}", **attributes))
        return f"{name}_{part}"

    made: list[onnx.NodeProto] = []
    x, residual = node.input[0], node.input[len(INPUTS)]
    tau = node.input[INPUTS.index("tau")]
    channels = make("Shape", [tau], "channels")
    one, minus_infinity = np.ones(1, np.int64), np.full(1, -np.inf, np.float32)
    none = make("ConstantOfShape", [channels], "none", value=onnx.numpy_helper.from_array(minus_infinity))
    spatial = make("Shape", [make("Shape", [x], "spatial", start=2)], "rank")
    ones = make("ConstantOfShape", [spatial], "ones", value=onnx.numpy_helper.from_array(one))
    column = make("Reshape", [tau, make("Concat", [channels, ones], "column_shape", axis=0)], "column")
    bound = make("CastLike", [column, x], "bound")
    parameters = dict(zip(PARAMETERS, node.input[1:], strict=False)) | {"tau": none}
    normed = make(OP_TYPE, [x, *parameters.values()], "normed", domain=DOMAIN, **NODE_ATTRIBUTES)
    made[-1].name = name
    make("Max", [make("Add", [normed, residual], "sum"), bound], "bounded")
    made[-1].output[0] = node.output[0]
    return made
