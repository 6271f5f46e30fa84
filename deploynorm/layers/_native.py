"""Filter response normalization on the kernels of plugins/kernels: frn.h through ctypes.

Nothing of PyTorch is compiled in: one library, which `pip install` builds, serves every version of PyTorch and Python.
It runs on PyTorch's own threads, and on the current stream of the tensors' GPU where it was built with CUDA.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from deploynorm import libraries
from deploynorm.errors import BackendError
from deploynorm.layers._handwritten import dense

__all__ = ["available", "backward", "forward"]

_TYPES: Final = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""Type of x -> deploynorm_type."""

_SIZES: Final = [(name, ctypes.c_int64) for name in ("samples", "channels", "spatial", "lanes")]


class _Forward(ctypes.Structure):
    """struct deploynorm_frn."""

    _fields_ = (
        *_SIZES,
        ("type", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "y", "residual", "gamma", "beta", "tau", "eps", "rstd")),
    )


class _Backward(ctypes.Structure):
    """struct deploynorm_frn_backward."""

    _fields_ = (
        *_SIZES,
        ("type", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("dy", "x", "rstd", "gamma", "beta", "tau")),
        *((name, ctypes.c_void_p) for name in ("dx", "dgamma", "dbeta", "dtau", "deps")),
    )


class _OpenMP(ctypes.Structure):
    """struct deploynorm_openmp of plugins/torch/openmp.h."""

    _fields_ = (("parallel", ctypes.c_void_p), ("threads", ctypes.c_int32))


class _Library:
    """The library's functions, and the threads of PyTorch that they run on."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer = ctypes.c_void_p
        self.cpu_forward = library.deploynorm_frn_cpu
        self.cpu_forward.argtypes = (pointer, pointer, pointer, pointer)
        self.cpu_workspace = library.deploynorm_frn_backward_cpu_workspace
        self.cpu_backward = library.deploynorm_frn_backward_cpu
        self.cpu_backward.argtypes = (pointer, pointer, pointer, pointer, pointer)
        self.parallel_for = ctypes.cast(library.deploynorm_openmp_parallel_for, pointer)
        self.parallel = _openmp()
        self.has_cuda = hasattr(library, "deploynorm_frn_cuda")
        workspaces = [self.cpu_workspace]
        if self.has_cuda:
            self.cuda_forward_workspace = library.deploynorm_frn_cuda_workspace
            self.cuda_forward = library.deploynorm_frn_cuda
            self.cuda_backward_workspace = library.deploynorm_frn_backward_cuda_workspace
            self.cuda_backward = library.deploynorm_frn_backward_cuda
            for function in (self.cuda_forward, self.cuda_backward):
                function.argtypes = (pointer, pointer, pointer, pointer)
            workspaces += [self.cuda_forward_workspace, self.cuda_backward_workspace]
        for workspace in workspaces:
            workspace.argtypes, workspace.restype = (pointer,), ctypes.c_size_t

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


def forward(x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """y, and rstd (N, C), 1 / sqrt(mean(x**2) + eps). All parameters are (C,), in x's compute type.

    Raises:
        BackendError: The kernel failed.
    """
    library = _opened()
    x = dense(x)
    y = torch.empty_like(x)
    rstd = torch.empty(x.shape[:2], dtype=gamma.dtype, device=x.device)
    parameters = [parameter.contiguous() for parameter in (gamma, beta, tau, eps)]
    pointers = [tensor.data_ptr() for tensor in (x, y)] + [None] + [tensor.data_ptr() for tensor in (*parameters, rstd)]
    call = ctypes.byref(_Forward(*_sizes(x), *pointers))
    if x.device.type == "cpu":
        code = library.cpu_forward(call, *library.threads(), None)
    else:
        with _on(x.device):
            scratch = _scratch(library.cuda_forward_workspace(call), x.device)
            code = library.cuda_forward(call, scratch.data_ptr() or None, _stream(x.device), None)
    _check(code, x)
    return y, rstd


def backward(
    dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gamma, beta, tau and eps; the formulas are in plugins/kernels/frn.h.

    Raises:
        BackendError: The kernel failed.
    """
    library = _opened()
    x = dense(x)
    dx = torch.empty_like(x)
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    parameters = [parameter.contiguous() for parameter in (rstd, gamma, beta, tau)]
    gradients = [torch.empty(gamma.shape, dtype=gamma.dtype, device=x.device) for _ in range(4)]
    pointers = [tensor.data_ptr() for tensor in (dy, x, *parameters, dx, *gradients)]
    call = ctypes.byref(_Backward(*_sizes(x), *pointers))
    if x.device.type == "cpu":
        scratch = _scratch(library.cpu_workspace(call), x.device)
        code = library.cpu_backward(call, scratch.data_ptr(), *library.threads(), None)
    else:
        with _on(x.device):
            scratch = _scratch(library.cuda_backward_workspace(call), x.device)
            code = library.cuda_backward(call, scratch.data_ptr(), _stream(x.device), None)
    _check(code, x)
    dgamma, dbeta, dtau, deps = gradients
    return dx, dgamma, dbeta, dtau, deps


def _sizes(x: Tensor) -> tuple[int, int, int, int, int]:
    samples, channels = x.shape[:2]
    lanes = 1 if x.is_contiguous() else channels
    return samples, channels, math.prod(x.shape[2:]), lanes, _TYPES[x.dtype]


def _scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _on(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _check(code: int, x: Tensor) -> None:
    if code != 0:
        raise BackendError(
            "deploynorm.layers",
            f"the FRN kernel failed with code {code}",
            got=f"{tuple(x.shape)} {x.dtype} on {x.device}",
            fix="deploynorm doctor",
        )


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
