"""The contract of the operators that deploynorm adds to ONNX: FRN, and FRN to which a residual is added.

    Y = max(gamma * X * rsqrt(mean(X^2 over all axes >= 2) + eps) + beta [+ residual], tau)

Every host (PyTorch, ONNX, ONNX Runtime, TensorRT) takes the names from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple, TypeAlias

DOMAIN: Final = "deploynorm"
"""ONNX domain, torch.library namespace and TensorRT plugin namespace.

It has no dot, because quickly deployable TensorRT plugin ids and torch namespaces refuse one."""

OP_TYPE: Final = "FilterResponseNormalization"
"""ONNX operator type, function name and TensorRT plugin name."""

ADD_OP_TYPE: Final = "FilterResponseNormalizationAdd"
"""The same with the residual, an operator of its own: TensorRT's plugins have no optional inputs."""

VERSION: Final = 1
"""Version of the ONNX domain and, as a string, of the TensorRT plugin."""

BLOCKED_OP_TYPE: Final = "BlockedFilterResponseNormalization"
"""The operator on ONNX Runtime's blocked layout, which only `rewrite --optimize-for-cpu` writes."""

BLOCK_ATTRIBUTE: Final = "block"
"""Its attribute: the channels of a block."""

TORCH_OP: Final = "filter_response_norm"
TORCH_ADD_OP: Final = "filter_response_norm_add"
TORCH_OPS: Final[Mapping[str, str]] = {TORCH_OP: OP_TYPE, TORCH_ADD_OP: ADD_OP_TYPE}
"""The operators by their names under the torch.library namespace `DOMAIN`."""

INPUTS: Final = ("X", "gamma", "beta", "tau", "eps")
"""X is (N, C, D1..Dk) with k >= 0; the four parameters are (C,), none of them optional.

eps is the effective value, greater than 0 (`1e-6 + |eps_l|` or `|eps|`). No TLU: tau = -inf."""

PARAMETERS: Final = INPUTS[1:]

RESIDUAL: Final = "residual"
"""Shape and type of X; nothing is broadcast. Added in the type of the arithmetic, before the threshold."""

OPERATORS: Final[Mapping[str, tuple[str, ...]]] = {OP_TYPE: INPUTS, ADD_OP_TYPE: (*INPUTS, RESIDUAL)}
"""The inputs of each operator, by its type."""

OUTPUT: Final = "Y"
"""Shape and type of X."""

DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
"""Types of X. The parameters are float32, or float64 when X is; so is all arithmetic, rounded once."""

NODE_ATTRIBUTES: Final = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""Attributes on every exported node. TensorRT (10.7 and later) looks up its plugin by them; the operator reads none."""

MIN_OPSET: Final = 18
MAX_OPSET: Final = 23
"""Opsets of the default ONNX domain that export accepts; `LOWERINGS` may begin elsewhere."""

PRODUCER: Final = "deploynorm"
"""Name of the producer in the files that we write."""

METADATA_IMAGE: Final = "deploynorm.image"
METADATA_LABELS: Final = "deploynorm.labels"
METADATA_SIZES: Final = "deploynorm.sizes"
METADATA_CPU: Final = "deploynorm.optimized_for_cpu"
"""metadata_props keys; each value is JSON. How an image becomes the input (`ImageSpec.to_dict`); the class names; which
sizes the network takes (`deploynorm.inputs.sizes_to_dict`); for which machine a file was rewritten."""


class LoweringRow(NamedTuple):
    """One row of `LOWERINGS`.

    Attributes:
        writer: The function that writes it, as `deploynorm.packages.load` finds it.
        min_opset: The first opset that has its operators.
        summary: What it is, for --help.
    """

    writer: str
    min_opset: int
    summary: str


LOWERINGS: Final[Mapping[str, LoweringRow]] = {
    "custom": LoweringRow(
        "deploynorm.lowering.write_custom", MIN_OPSET, "as one node a layer, with its body beside it"
    ),
    "rmsnorm": LoweringRow(
        "deploynorm.lowering.write_rmsnorm", 23, "on RMSNormalization, opset 23, which onnxruntime 1.24 and later takes"
    ),
    "primitives": LoweringRow("deploynorm.lowering.write_primitives", 13, "in primitive operators"),
}
"""The forms of the operator's nodes in a graph. A new one takes one row here and its writer."""

Lowering: TypeAlias = str
"""A name in `LOWERINGS`."""
