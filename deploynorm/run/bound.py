"""PyTorch's tensors in a call of ONNX Runtime, bound by their addresses: no copies on either side."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploynorm.dtypes import numpy_dtype
from deploynorm.errors import InputError
from deploynorm.inputs import TensorSpec
from deploynorm.run.onnxruntime import BFLOAT16, element_type

_ALIGNMENT = 256  # bytes, of memory on a GPU that ONNX Runtime allocates itself, on which its kernels may rely


def check_tensor(where: str, spec: TensorSpec, value: Any, *, device: torch.device) -> None:
    """Raises InputError unless it is a tensor of the input's type on that device."""
    fix: str
    if not isinstance(value, Tensor):
        got, expected, fix = type(value).__name__, "a torch.Tensor", "pass tensors, or call infer for arrays"
    elif value.device != device:
        got, expected, fix = str(value.device), str(device), f"move it with .to({str(device)!r})"
    elif value.dtype != getattr(torch, spec.dtype, None):
        got, expected, fix = str(value.dtype), spec.dtype, f"convert it with .to(torch.{spec.dtype})"
    elif value.layout != torch.strided:
        got, expected, fix = str(value.layout), "a dense tensor", "convert it with .to_dense()"
    elif value.numel() and not _address(value):
        got, expected, fix = f"{type(value).__name__} without memory", "a tensor that holds values", "run it untraced"
    else:
        return
    raise InputError(where, f"input {spec.name!r} is none that can be bound", got=got, expected=expected, fix=fix)


def _address(tensor: Tensor) -> int:
    """Of its values; 0 for a tensor that stands for another while PyTorch traces or transforms a function."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def bind(binding: Any, name: str, tensor: Tensor) -> Tensor:
    """Binds an input to a tensor's memory, or to that of a copy where its elements lie apart; returns what is bound."""
    tensor = tensor.detach().resolve_neg().contiguous()  # the sign of a conjugate's imaginary part is not in memory
    if tensor.is_cuda and tensor.data_ptr() % _ALIGNMENT:
        tensor = tensor.clone()
    kind = BFLOAT16 if tensor.dtype == torch.bfloat16 else numpy_dtype(str(tensor.dtype).removeprefix("torch.")).type
    held = tensor if tensor.numel() else tensor.new_empty(1)  # an empty one has no address, which is asked for
    binding.bind_input(name, tensor.device.type, tensor.device.index or 0, kind, tuple(tensor.shape), held.data_ptr())
    return held


def outputs_of(binding: Any, device: torch.device, session: Any) -> list[Tensor]:
    """The outputs of the last run, in ONNX Runtime's memory, which lasts as long as the tensors do."""
    return [_tensor(value, device, session) for value in binding.get_outputs()]


def _tensor(value: Any, device: torch.device, session: Any) -> Tensor:
    dtype: torch.dtype = getattr(torch, str(element_type(value.data_type())))
    shape = tuple(value.shape())
    if not prod(shape):
        return torch.empty(shape, dtype=dtype, device=device)
    # As bytes, since the interfaces have no bfloat16.
    memory = _Memory(value, session, prod(shape) * dtype.itemsize, device.type)
    shared = torch.from_numpy(np.asarray(memory)) if device.type == "cpu" else torch.as_tensor(memory, device=device)
    return shared.view(dtype).reshape(shape)


class _Memory:
    """An output's bytes, as NumPy or CUDA programs take them from each other. What is made of it keeps it alive."""

    def __init__(self, value: Any, session: Any, size: int, device: str) -> None:
        self._kept = value, session
        facts = {"shape": (size,), "typestr": "|u1", "data": (value.data_ptr(), False), "version": 3}
        setattr(self, "__array_interface__" if device == "cpu" else "__cuda_array_interface__", facts)
