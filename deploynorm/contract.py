"""The contract of the one operator that deploynorm adds to ONNX.

    Y = max(gamma * X * rsqrt(mean(X^2 over all axes >= 2) + eps) + beta, tau)

Every host (PyTorch, ONNX, ONNX Runtime, TensorRT) takes the names from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

__all__ = [
    "BLOCKED_OP_TYPE",
    "BLOCK_ATTRIBUTE",
    "DOMAIN",
    "DTYPES",
    "INPUTS",
    "LOWERINGS",
    "MAX_OPSET",
    "METADATA_CPU",
    "METADATA_IMAGE",
    "METADATA_LABELS",
    "METADATA_SIZES",
    "MIN_OPSET",
    "Lowering",
    "NODE_ATTRIBUTES",
    "OP_TYPE",
    "OUTPUT",
    "PARAMETERS",
    "TORCH_OP",
    "VERSION",
]

DOMAIN: Final = "deploynorm"
"""ONNX domain, torch.library namespace and TensorRT plugin namespace.

It has no dot, because quickly deployable TensorRT plugin ids and torch namespaces refuse one."""

OP_TYPE: Final = "FilterResponseNormalization"
"""ONNX operator type, function name and TensorRT plugin name."""

VERSION: Final = 1
"""Version of the ONNX domain and, as a string, of the TensorRT plugin."""

BLOCKED_OP_TYPE: Final = "BlockedFilterResponseNormalization"
"""The operator on ONNX Runtime's blocked layout, which only `rewrite --optimize-for-cpu` writes."""

BLOCK_ATTRIBUTE: Final = "block"
"""Its attribute: the channels of a block."""

TORCH_OP: Final = "filter_response_norm"
"""Name under the torch.library namespace `DOMAIN`."""

INPUTS: Final = ("X", "gamma", "beta", "tau", "eps")
"""X is (N, C, D1..Dk) with k >= 0; the four parameters are (C,), none of them optional.

eps is the effective value, greater than 0 (`1e-6 + |eps_l|` or `|eps|`). No TLU: tau = -inf."""

PARAMETERS: Final = INPUTS[1:]

OUTPUT: Final = "Y"
"""Shape and type of X."""

DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
"""Types of X. The parameters are float32, or float64 when X is; so is all arithmetic, rounded once."""

NODE_ATTRIBUTES: Final = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""Attributes on every exported node. TensorRT (10.7 and later) looks up its plugin by them; the operator reads none."""

MIN_OPSET: Final = 18
MAX_OPSET: Final = 23
"""Opsets of the default ONNX domain that export accepts."""

METADATA_IMAGE: Final = "deploynorm.image"
"""metadata_props key: how an image becomes the input, as JSON of shape (C, H, W), mean and std."""

METADATA_LABELS: Final = "deploynorm.labels"
"""metadata_props key: the class names, as a JSON list."""

METADATA_CPU: Final = "deploynorm.optimized_for_cpu"
"""metadata_props key: which machine and ONNX Runtime a file was rewritten for, as JSON."""

METADATA_SIZES: Final = "deploynorm.sizes"
"""metadata_props key: which sizes the network was found to take, as JSON (`deploynorm.inputs.sizes_to_dict`)."""

Lowering = Literal["custom", "rmsnorm", "primitives"]
"""A form of the operator's nodes in a graph; deploynorm.lowering has a writer for each."""

LOWERINGS: Final[Mapping[Lowering, str]] = {
    "custom": "as one node a layer, with its body beside it",
    "rmsnorm": "on RMSNormalization, opset 23",
    "primitives": "in primitive operators",
}
