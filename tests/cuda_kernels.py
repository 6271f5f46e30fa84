"""The CUDA kernels through their C interface, plugins/kernels/frn.h, on a GPU or in the emulation on the CPU.

kernel = CudaKernel(library, "cuda")            # or emulated.build_kernels(folder), "cpu"
y = kernel(x, gamma, beta, tau, eps, layout="nhwc", variant="registers")      # x is (N, C, D1..Dk); so is y

Every call lays x out as the kernel takes it, between guard bytes that it looks at afterwards, and sees to it that the
kernel has left its inputs alone. What a call leaves unwritten in y is found: y begins as NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from cases import NormCase, make_inputs, tolerance, want
from kernels import TYPES, Call, from_lanes, to_lanes

from deploynorm.contract import INPUTS

Array = npt.NDArray[Any]

Layout = Literal["nchw", "nhwc", "nhwc8"]

LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc", "nhwc8")
VARIANTS = ("packed", "registers", "two_passes", "split")

# Where the kernels' code turns: a plane or row beside a multiple of a pack, a warp, a block, and what a block holds.
SPATIAL = (1, 2, 3, 7, 8, 9, 31, 33, 49, 127, 196, 255, 257, 1023, 1025, 2048, 2049, 4097)
CHANNELS = (1, 2, 3, 7, 8, 9, 13, 16, 33, 40, 64, 257)

GUARD = 256
"""Bytes around each tensor: what cudaMalloc aligns to, and more than a pack of any kernel."""

INVALID_VALUE = 1
"""cudaErrorInvalidValue."""


class Guarded:
    """Bytes on a device, with more around them that nobody may write.

    Attributes:
        content: What goes in.
        shift: Bytes by which it stands off the alignment of its allocation.
    """

    def __init__(self, content: Array, device: str, shift: int = 0) -> None:
        self.content = np.ascontiguousarray(content)
        self._start = GUARD + shift
        before = np.resize(np.arange(1, 252, dtype=np.uint8), self._start + self.content.nbytes + GUARD)
        before[self._start : self._start + self.content.nbytes] = self.content.reshape(-1).view(np.uint8)
        self._before = before
        self._memory = torch.from_numpy(before.copy()).to(device)

    @property
    def pointer(self) -> int:
        return self._memory.data_ptr() + self._start

    def read(self) -> Array:
        """What is there now; nothing around it may have changed."""
        now, end = self._memory.cpu().numpy(), self._start + self.content.nbytes
        for part in (slice(0, self._start), slice(end, None)):
            changed = np.flatnonzero(now[part] != self._before[part])
            assert not len(changed), f"byte {(part.start or 0) + changed[0] - self._start} was written"
        inside = now[self._start : end].copy()
        return inside.view(self.content.dtype).reshape(self.content.shape)

    def check_unchanged(self, name: str) -> None:
        assert np.array_equal(self.read().view(np.uint8), self.content.view(np.uint8)), f"{name} was written"


def to_layout(x: Array, layout: Layout, fill: float = np.nan) -> Array:
    """(N, C, D1..Dk) as the kernel takes it; rows of nhwc8 are filled up to whole eights."""
    if layout == "nchw":
        return np.ascontiguousarray(x).reshape(*x.shape[:2], prod(x.shape[2:]), 1)
    channels = x.shape[1]
    rows = to_lanes(x, channels) if channels else x.reshape(x.shape[0], 1, prod(x.shape[2:]), 0)
    if layout == "nhwc8":
        rows = np.pad(rows, [(0, 0)] * 3 + [(0, -channels % 8)], constant_values=fill)
    return rows


def from_layout(y: Array, layout: Layout, shape: tuple[int, ...]) -> Array:
    """The inverse of to_layout. What fills up the rows must be zero."""
    if layout == "nchw":
        return y.reshape(shape)
    assert not y[..., shape[1] :].any(), "the padding of a row is not zero"
    return from_lanes(y[..., : shape[1]], shape)


class CudaKernel:
    """The library's kernels.

    Attributes:
        variants: All that there are.
    """

    def __init__(self, library: Path, device: Literal["cpu", "cuda"]) -> None:
        self.device = device
        self._library = ctypes.CDLL(str(library))
        names = self._library.deploynorm_cuda_variants
        names.restype = ctypes.POINTER(ctypes.c_char_p)
        found = names()
        self.variants: list[str] = []
        while found[len(self.variants)] is not None:
            self.variants.append(found[len(self.variants)].decode())
        self._frn = self._library.deploynorm_frn_cuda
        self._frn.restype = ctypes.c_int
        self._frn.argtypes = (ctypes.POINTER(Call), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
        self._workspace = self._library.deploynorm_frn_cuda_workspace
        self._workspace.restype = ctypes.c_size_t
        self._workspace.argtypes = (ctypes.POINTER(Call),)

    def workspace_bytes(self, call: Call) -> int:
        return int(self._workspace(ctypes.byref(call)))

    def call(self, call: Call, *, workspace: int | None = None, stream: int = 0, variant: str | None = None) -> int:
        """As it stands in frn.h; nothing is checked."""
        name = None if variant is None else variant.encode()
        return int(self._frn(ctypes.byref(call), workspace, stream, name))

    def __call__(
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        tau: Array,
        eps: Array,
        *,
        layout: Layout = "nchw",
        in_place: bool = False,
        variant: str | None = None,
        workspace: bool = True,
        shifts: tuple[int, int] = (0, 0),
    ) -> Array | None:
        """y, of x's shape and type; None where the variant does not take these sizes.

        Args:
            x: (N, C, D1..Dk).
            gamma: (C,), as are beta, tau and eps.
            beta: See above.
            tau: See above.
            eps: See above.
            layout: Of x and y in memory.
            in_place: Whether y is written over x.
            variant: None leaves it to the library.
            workspace: Whether the scratch memory is there that the library asks for.
            shifts: Elements by which x and y stand off the alignment of their allocations.
        """
        laid = to_layout(x, layout)
        size = laid.itemsize
        source = Guarded(laid, self.device, shifts[0] * size)
        target = source if in_place else Guarded(np.full_like(laid, np.nan), self.device, shifts[1] * size)
        parameters: Mapping[str, Guarded] = {
            name: Guarded(values, self.device)
            for name, values in (("gamma", gamma), ("beta", beta), ("tau", tau), ("eps", eps))
        }
        call = Call(
            x.shape[0],
            x.shape[1],
            prod(x.shape[2:]),
            1 if layout == "nchw" else laid.shape[3],
            TYPES[x.dtype],
            x=source.pointer,
            y=target.pointer,
            **{name: guarded.pointer for name, guarded in parameters.items()},
        )
        scratch = Guarded(np.full(self.workspace_bytes(call), 0xFF, np.uint8), self.device)
        pointer = scratch.pointer if workspace else None  # where no bytes are asked for, to what nobody may write
        code = self.call(call, workspace=pointer, variant=variant)
        if self.device == "cuda":
            torch.cuda.synchronize()
        if variant is not None and code == INVALID_VALUE:
            target.check_unchanged("y, of a call that was refused,")
            return None
        assert code == 0, f"CUDA error {code}"
        for name, guarded in parameters.items():
            guarded.check_unchanged(name)
        if not in_place:
            source.check_unchanged("x")
        scratch.read()
        return from_layout(target.read(), layout, x.shape)


def sized(dtype: str, samples: int, channels: int, spatial: int) -> NormCase:
    return NormCase(f"sized_{samples}x{channels}x{spatial}", (samples, channels, spatial), dtype, eps="per_channel")


def check(kernel: CudaKernel, case: NormCase, **how: object) -> bool:
    """Whether the variant takes these sizes; the numbers must be right if it does."""
    inputs = make_inputs(case)
    y = kernel(*(inputs[name] for name in INPUTS), **how)  # type: ignore[arg-type]
    if y is None:
        return False
    assert y.dtype == inputs[INPUTS[0]].dtype
    np.testing.assert_allclose(y.astype(np.float64), want(case), **tolerance(case).kwargs())
    return True
