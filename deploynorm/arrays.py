"""Between NumPy's arrays and torch's tensors, which cannot convert each other's bfloat16."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """A tensor on the CPU with a copy of the array: torch refuses negative strides and read-only memory."""
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: Tensor) -> npt.NDArray[Any]:
    """An array with a copy of the tensor, wherever that is: an output may be a view of what changes later."""
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.view(torch.int16).numpy(force=True).view(ml_dtypes.bfloat16), order="C")
    return np.array(tensor.numpy(force=True), order="C")
