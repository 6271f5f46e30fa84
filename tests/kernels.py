"""The CPU kernel through its C interface, plugins/kernels/frn.h, with NumPy and nothing else of ours.

kernel = Kernel(library)
y = kernel(x, gamma, beta, tau, eps, block=8, variant="avx2")     # x is (N, C, D1..Dk); so is y

Every call lays x out as the kernel takes it, between guard bytes that it looks at afterwards, and sees to it that the
kernel has left its inputs alone. Runs under sanitizers too, in a Python that has no torch.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from frn_gradient import Gradients

from deploynorm.libraries.kernels import PARALLEL_FOR, TYPES, Backward, Forward, open_kernels

Array = npt.NDArray[Any]
Into = Literal["y", "x", "residual"]

PARAMETERS = ("gamma", "beta", "tau", "eps")
PARAMETER_GRADIENTS = Gradients._fields[1:]

GUARD = 256
"""Bytes around each tensor: what cudaMalloc aligns to, and more than a vector of any kernel."""

_PATTERN = np.resize(np.arange(1, 252, dtype=np.uint8), 2 * GUARD)


class Guarded:
    """A copy of an array between bytes that nobody may write."""

    def __init__(self, content: Array, shift: int = 0, device: str = "cpu") -> None:
        """Puts it `shift` elements off the alignment of its allocation, on the CPU or with torch on a "cuda" device."""
        self.content = np.ascontiguousarray(content)
        start = GUARD + shift * self.content.itemsize
        inside = self.content.reshape(-1).view(np.uint8)
        self._inside = slice(start, start + self.content.nbytes)
        self._before = np.concatenate([_PATTERN[:start], inside, _PATTERN[:GUARD]])
        self._memory: Any = self._before.copy()
        if device != "cpu":
            import torch

            self._memory = torch.from_numpy(self._memory).to(device)

    @property
    def pointer(self) -> int:
        memory = self._memory
        address = memory.ctypes.data if isinstance(memory, np.ndarray) else memory.data_ptr()
        return int(address) + self._inside.start

    def _now(self) -> Array:
        return self._memory if isinstance(self._memory, np.ndarray) else self._memory.cpu().numpy()

    def forget(self) -> None:
        """What is not written again is NaN."""
        self._memory[self._inside] = 0xFF

    def read(self) -> Array:
        return self._now()[self._inside].copy().view(self.content.dtype).reshape(self.content.shape)

    def check(self, name: str, written: bool = False) -> None:
        """That nothing around the tensor was written, nor the tensor itself unless it may be."""
        changed = self._now() != self._before
        if written:
            changed[self._inside] = False
        assert not changed.any(), f"{name}: byte {changed.argmax() - self._inside.start} of it was written"


def check_all(tensors: Mapping[str, Guarded], written: Collection[str]) -> None:
    for name, tensor in tensors.items():
        tensor.check(name, written=name in written)


class ParallelFor:
    """A host's threads, in Python: runs the tasks in this order, and remembers how many there were.

    With threads above 0 on as many real ones: ctypes lets go of Python's lock while a task runs.
    """

    def __init__(self, order: Callable[[range], Iterable[int]] = iter, threads: int = 0) -> None:
        self.counts: list[int] = []

        def run(host: int | None, count: int, task: Callable[[int | None, int], None], data: int | None) -> None:
            self.counts.append(count)
            with ThreadPoolExecutor(threads) if threads else nullcontext() as pool:
                each: Callable[..., Iterable[None]] = pool.map if pool else map
                for _ in each(lambda index: task(data, index), order(range(count))):
                    pass

        self.function = PARALLEL_FOR(run)


def shuffled(indices: range) -> list[int]:
    return random.Random(0).sample(indices, len(indices))


def to_blocks(x: Array, block: int) -> Array:
    """(N, C, D1..Dk) as (N, C / block, D1 * .. * Dk, block), with C filled up to a multiple of block."""
    x = pad_channels(x, block)
    samples, channels = x.shape[:2]
    blocks = x.reshape(samples, channels // block, block, prod(x.shape[2:]))
    return np.ascontiguousarray(np.moveaxis(blocks, 2, 3))


def from_blocks(y: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of to_blocks."""
    return np.ascontiguousarray(np.moveaxis(y, 3, 2)).reshape(shape)


def pad_channels(x: Array, block: int, value: float = 0.0) -> Array:
    """Channels (axis 1, or 0 of a parameter) filled up to a multiple of block."""
    axis = min(1, x.ndim - 1)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return np.pad(x, widths, constant_values=value)


def variant_names(names: Any) -> list[str]:
    """Of an array that ends with a null pointer."""
    return [name.decode() for name in itertools.takewhile(lambda name: name is not None, names)]


class Kernel:
    """The library's kernel.

    Attributes:
        variants: Names of the variants that this processor runs, the best first.
    """

    def __init__(self, library: Path) -> None:
        self.functions = open_kernels(library)
        self.variants = variant_names(self.functions.deploynorm_cpu_variants())

    def call(
        self,
        call: Forward | Backward,
        workspace: int | None = None,
        *,
        variant: str | None = None,
        parallel_for: ParallelFor | None = None,
    ) -> int:
        """As it stands in frn.h; nothing is checked."""
        threads = None if parallel_for is None else ctypes.cast(parallel_for.function, ctypes.c_void_p)
        name = None if variant is None else variant.encode()
        if isinstance(call, Forward):
            return int(self.functions.deploynorm_frn_cpu(ctypes.byref(call), threads, None, name))
        return int(self.functions.deploynorm_frn_backward_cpu(ctypes.byref(call), workspace, threads, None, name))

    def workspace_bytes(self, call: Backward) -> int:
        return int(self.functions.deploynorm_frn_backward_cpu_workspace(ctypes.byref(call)))

    def __call__(
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        tau: Array,
        eps: Array,
        *,
        residual: Array | None = None,
        block: int = 1,
        into: Into = "y",
        variant: str | None = None,
        parallel_for: ParallelFor | None = None,
        shift: int = 0,
        rstd: Array | None = None,
    ) -> Array:
        """y, of x's shape and type.

        Args:
            x: (N, C, D1..Dk), as is residual; the other parameters are (C,).
            block: Channels side by side; C is filled up to a multiple of it.
            into: The tensor that y is written over; "y" is one of its own.
            variant: None leaves it to the library.
            parallel_for: None is the kernel's own loop.
            shift: Elements by which every tensor stands off its alignment.
            rstd: (N, C), written into where it is given.
        """
        shape = pad_channels(x, block).shape
        laid = {"x": to_blocks(x, block)} | ({} if residual is None else {"residual": to_blocks(residual, block)})
        if into == "y":
            laid["y"] = np.full_like(laid["x"], -7)
        # A channel that is only there to fill a block counts for nothing, whatever its parameters.
        laid |= {name: pad_channels(p, block, 1.0) for name, p in zip(PARAMETERS, (gamma, beta, tau, eps), strict=True)}
        if rstd is not None:
            laid["rstd"] = np.full(shape[:2], -7, gamma.dtype)
        tensors = {name: Guarded(array, shift) for name, array in laid.items()}
        pointers = {name: tensor.pointer for name, tensor in tensors.items()}
        sizes = (*shape[:2], prod(shape[2:]), block)
        call = Forward(*sizes, TYPES[x.dtype.name], **({"y": pointers[into]} | pointers))
        assert self.call(call, variant=variant, parallel_for=parallel_for) == 0
        check_all(tensors, (into, "rstd"))
        if rstd is not None:
            rstd[...] = tensors["rstd"].read()[:, : x.shape[1]]
        return np.ascontiguousarray(from_blocks(tensors[into].read(), shape)[:, : x.shape[1]])

    def backward(
        self,
        dy: Array,
        x: Array,
        rstd: Array,
        gamma: Array,
        beta: Array,
        tau: Array,
        *,
        block: int = 1,
        in_place: bool = False,
        variant: str | None = None,
        parallel_for: ParallelFor | None = None,
        shift: int = 0,
    ) -> Gradients:
        """The gradients of __call__, without what fills a block up; in_place writes dx over dy."""
        shape = pad_channels(x, block).shape
        laid = {"dy": to_blocks(dy, block), "x": to_blocks(x, block)}
        given = {"rstd": rstd, "gamma": gamma, "beta": beta, "tau": tau}
        laid |= {name: pad_channels(array, block, 1.0) for name, array in given.items()}
        laid |= dict.fromkeys(PARAMETER_GRADIENTS, np.full(shape[1], -7, gamma.dtype))
        dx = "dy" if in_place else "dx"
        if not in_place:
            laid["dx"] = np.full_like(laid["x"], -7)
        tensors = {name: Guarded(array, shift) for name, array in laid.items()}
        pointers = {name: tensor.pointer for name, tensor in tensors.items()}
        sizes = (*shape[:2], prod(shape[2:]), block)
        call = Backward(*sizes, TYPES[x.dtype.name], **({"dx": pointers[dx]} | pointers))
        tensors["workspace"] = Guarded(np.full(self.workspace_bytes(call), 0xFF, np.uint8))
        assert self.call(call, tensors["workspace"].pointer, variant=variant, parallel_for=parallel_for) == 0
        check_all(tensors, (dx, "workspace", *PARAMETER_GRADIENTS))
        parameters = (tensors[name].read()[: x.shape[1]] for name in PARAMETER_GRADIENTS)
        return Gradients(from_blocks(tensors[dx].read(), shape)[:, : x.shape[1]], *parameters)


@contextmanager
def exact_memory(*arrays: Array) -> Iterator[list[int]]:
    """Pointers to copies that end where their allocation ends, from malloc itself, which sanitizers watch."""
    c = ctypes.CDLL(None)
    c.malloc.restype = ctypes.c_void_p
    c.free.argtypes = (ctypes.c_void_p,)
    pointers: list[int] = []
    try:
        for array in arrays:
            content = np.ascontiguousarray(array)
            # malloc(0) may be null, which means something else to the kernel.
            pointers.append(c.malloc(ctypes.c_size_t(max(1, content.nbytes))))
            ctypes.memmove(pointers[-1], content.ctypes.data, content.nbytes)
        yield pointers
    finally:
        for pointer in pointers:
            c.free(pointer)
