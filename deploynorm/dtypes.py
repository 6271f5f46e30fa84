"""The element types of networks and files, by the one name that NumPy, ONNX and torch share ("float16", ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

HALF: Final = ("float16", "bfloat16")
"""The half types, the coarser last."""

ONNX_HALF: Final[Mapping[int, str]] = {10: "float16", 16: "bfloat16"}
"""Their names by onnx.TensorProto.DataType, whose numbers onnx_ir.DataType shares; the coarser last."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype, from ml_dtypes for the types that NumPy itself does not have; TypeError where there is none."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes  # comes with onnx

        return np.dtype(getattr(ml_dtypes, name, name))
