"""plugins/kernels/frn.h through ctypes: its structs, and a library's functions with their types.

Needs neither torch nor NumPy.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Final

TYPES: Final = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
"""Name of an element type -> deploynorm_type."""

TASK: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
PARALLEL_FOR: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, TASK, ctypes.c_void_p)

_SIZES: Final = tuple((name, ctypes.c_int64) for name in ("samples", "channels", "spatial", "channel_block"))
_TYPE: Final = ("type", ctypes.c_int32)


class Forward(ctypes.Structure):
    """struct deploynorm_frn."""

    _fields_ = (
        *_SIZES,
        _TYPE,
        *((name, ctypes.c_void_p) for name in ("x", "y", "residual", "gamma", "beta", "tau", "eps", "rstd")),
    )


class Backward(ctypes.Structure):
    """struct deploynorm_frn_backward."""

    _fields_ = (
        *_SIZES,
        _TYPE,
        *((name, ctypes.c_void_p) for name in ("dy", "x", "rstd", "gamma", "beta", "tau")),
        *((name, ctypes.c_void_p) for name in ("dx", "dgamma", "dbeta", "dtau", "deps")),
    )


_POINTER: Final = ctypes.c_void_p
_NAMES: Final = (ctypes.POINTER(ctypes.c_char_p), ())
_BYTES: Final = (ctypes.c_size_t, (_POINTER,))
_RUN: Final = (ctypes.c_int, (_POINTER, _POINTER, _POINTER, ctypes.c_char_p))

_FUNCTIONS: Final = {
    "deploynorm_cpu_variants": _NAMES,
    "deploynorm_frn_cpu": _RUN,
    "deploynorm_frn_backward_cpu_workspace": _BYTES,
    "deploynorm_frn_backward_cpu": (ctypes.c_int, (_POINTER, _POINTER, _POINTER, _POINTER, ctypes.c_char_p)),
    "deploynorm_cuda_variants": _NAMES,
    "deploynorm_frn_cuda_workspace": _BYTES,
    "deploynorm_frn_cuda": _RUN,
    "deploynorm_frn_backward_cuda_workspace": _BYTES,
    "deploynorm_frn_backward_cuda": _RUN,
}
"""Name -> what it returns, and its arguments."""


def open_kernels(library: Path, *required: str) -> ctypes.CDLL:
    """A library with the types of those functions of frn.h that it has: not every one has those of CUDA or of training.

    OSError where it is no library for this machine, AttributeError where it lacks a required function.
    """
    opened = ctypes.CDLL(str(library))
    for name, (result, arguments) in _FUNCTIONS.items():
        if hasattr(opened, name):
            function = getattr(opened, name)
            function.restype, function.argtypes = result, arguments
    for name in required:
        getattr(opened, name)
    return opened
