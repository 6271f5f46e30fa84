"""Filter response normalization on the kernels of plugins/kernels: frn.h through ctypes.

Nothing of PyTorch is compiled in: one library, which `pip install` builds, serves every version of PyTorch and Python.
It runs on PyTorch's own threads, and on the current stream of the tensors' GPU where it was built with CUDA.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from deploynorm import libraries
from deploynorm.errors import BackendError
from deploynorm.layers._handwritten import dense
from deploynorm.libraries.kernels import TYPES, Backward, Forward, open_kernels


class _OpenMP(ctypes.Structure):
    """OpenMP of plugins/torch/openmp.cpp."""

    _fields_ = (("parallel", ctypes.c_void_p), ("threads", ctypes.c_int32))


class _Library:
    """The library's functions, and the threads of PyTorch that they run on."""

    def __init__(self, path: Path) -> None:
        self.functions = open_kernels(path, "deploynorm_frn_cpu", "deploynorm_frn_backward_cpu")
        self.parallel_for = ctypes.cast(self.functions.deploynorm_openmp_parallel_for, ctypes.c_void_p)
        self.parallel = _openmp()
        self.has_cuda = hasattr(self.functions, "deploynorm_frn_cuda")

    def threads(self) -> tuple[object, object]:
        """A deploynorm_parallel_for and its host."""
        threads = torch.get_num_threads()
        if threads == 1 or self.parallel is None:
            return None, None
        return self.parallel_for, ctypes.byref(_OpenMP(self.parallel, threads))


def available(device: torch.device) -> bool:
    """Whether there are kernels for tensors on this device."""
    if LIBRARY is None:
        return False
    return device.type == "cpu" or (device.type == "cuda" and LIBRARY.has_cuda)


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y and rstd, as _handwritten.forward. BackendError if the kernel failed."""
    library = _opened()
    x = dense(x)
    y = torch.empty_like(x)
    rstd = torch.empty(x.shape[:2], dtype=gamma.dtype, device=x.device)
    parameters = [parameter.contiguous() for parameter in (gamma, beta, tau, eps)]
    if residual is not None:
        residual = _like(x, residual)
    tensors = (x, y, residual, *parameters, rstd)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    call = ctypes.byref(Forward(*_sizes(x), *pointers))
    if x.device.type == "cpu":
        _check(library.functions.deploynorm_frn_cpu(call, *library.threads(), None), x)
    else:
        _launch("deploynorm_frn_cuda", call, x)
    return y, rstd


def backward(
    dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gamma, beta, tau and eps, as _handwritten.backward. BackendError if the kernel failed."""
    library = _opened()
    x = dense(x)
    dx = torch.empty_like(x)
    dy = _like(x, dy)
    parameters = [parameter.contiguous() for parameter in (rstd, gamma, beta, tau)]
    gradients = [torch.empty(gamma.shape, dtype=gamma.dtype, device=x.device) for _ in range(4)]
    pointers = [tensor.data_ptr() for tensor in (dy, x, *parameters, dx, *gradients)]
    call = ctypes.byref(Backward(*_sizes(x), *pointers))
    if x.device.type == "cpu":
        kernels = library.functions
        scratch = _scratch(kernels.deploynorm_frn_backward_cpu_workspace(call), x.device)
        _check(kernels.deploynorm_frn_backward_cpu(call, scratch.data_ptr(), *library.threads(), None), x)
    else:
        _launch("deploynorm_frn_backward_cuda", call, x)
    dgamma, dbeta, dtau, deps = gradients
    return dx, dgamma, dbeta, dtau, deps


def _like(x: Tensor, other: Tensor) -> Tensor:
    """The other tensor in the layout of x, which is dense."""
    return other if other.stride() == x.stride() else torch.empty_like(x).copy_(other)


def _sizes(x: Tensor) -> tuple[int, int, int, int, int]:
    samples, channels = x.shape[:2]
    block = 1 if x.is_contiguous() else channels
    return samples, channels, math.prod(x.shape[2:]), block, TYPES[str(x.dtype).removeprefix("torch.")]


def _scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _launch(kernel: str, call: object, x: Tensor) -> None:
    """Runs a CUDA kernel of the library on the current stream of x's GPU."""
    functions = _opened().functions
    with torch.cuda.device(x.device):
        scratch = _scratch(getattr(functions, f"{kernel}_workspace")(call), x.device)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _check(getattr(functions, kernel)(call, scratch.data_ptr() or None, stream, None), x)


def _check(code: int, x: Tensor) -> None:
    if code != 0:
        problem = f"the FRN kernel failed with code {code}"
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        raise BackendError("deploynorm.layers", problem, got=got, fix="deploynorm doctor")


def _opened() -> _Library:
    assert LIBRARY is not None, "available() comes first"
    return LIBRARY


def _open() -> _Library | None:
    path = libraries.find_library(libraries.TORCH_LIBRARY)
    if path is None:
        return None
    try:
        return _Library(path)
    except (OSError, AttributeError) as error:
        warnings.warn(f"{path} cannot be used ({error}); FRN runs in plain PyTorch, slower", stacklevel=2)
        return None


def _openmp() -> int | None:
    """GOMP_parallel of the OpenMP library that PyTorch has loaded; looked up through PyTorch, whichever it is."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


# Opened at import and not at the first call: torch.compile cannot trace that.
LIBRARY = _open()
