"""The CPU kernel through its C interface, plugins/kernels/frn.h, with NumPy and nothing else of ours.

kernel = Kernel(library)
y = kernel(x, gamma, beta, tau, eps, block=8, variant="avx2")     # x is (N, C, D1..Dk); so is y

Every call lays x out as the kernel takes it, between guard bytes that it looks at afterwards, and sees to it that the
kernel has left its inputs alone. Runs under sanitizers too, in a Python that has no torch.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from frn_gradient import Gradients

from deploynorm.libraries.kernels import PARALLEL_FOR, TYPES, Backward, Forward, open_kernels

Array = npt.NDArray[Any]
Into = Literal["y", "x", "residual"]

GUARD = 64
"""Bytes around each tensor: a vector of the widest registers."""


@dataclass
class Guarded:
    """A copy of an array that ends where its memory is watched.

    Attributes:
        content: What goes in.
        shift: Elements by which it stands off the alignment of its allocation.
    """

    content: Array
    shift: int = 0
    memory: Array = field(init=False)
    before: Array = field(init=False)

    def __post_init__(self) -> None:
        self.content = np.ascontiguousarray(self.content)
        start = GUARD + self.shift * self.content.itemsize
        self.memory = np.resize(np.arange(1, 252, dtype=np.uint8), start + self.content.nbytes + GUARD)
        self.memory[start : start + self.content.nbytes] = self.content.reshape(-1).view(np.uint8)
        self.before = self.memory.copy()

    @property
    def pointer(self) -> int:
        return int(self.memory.ctypes.data) + GUARD + self.shift * self.content.itemsize

    def read(self) -> Array:
        start = GUARD + self.shift * self.content.itemsize
        inside = self.memory[start : start + self.content.nbytes].copy()
        return inside.view(self.content.dtype).reshape(self.content.shape)

    def check(self, name: str, written: bool) -> None:
        """That nothing around the tensor was written, nor the tensor itself unless it may be."""
        start = GUARD + self.shift * self.content.itemsize
        end = start + self.content.nbytes
        parts = [slice(0, start), slice(end, None)] if written else [slice(None)]
        for part in parts:
            changed = np.flatnonzero(self.memory[part] != self.before[part])
            assert not len(changed), f"{name}: byte {(part.start or 0) + changed[0] - start} of it was written"


class ParallelFor:
    """A host's threads, in Python: runs the tasks as `order` says, and remembers how many there were."""

    def __init__(self, order: Callable[[int, Callable[[int], None]], None]) -> None:
        self.counts: list[int] = []

        def run(host: int | None, count: int, task: Callable[[int | None, int], None], data: int | None) -> None:
            self.counts.append(count)
            order(count, lambda index: task(data, index))

        self.function = PARALLEL_FOR(run)

    @classmethod
    def one_after_the_other(cls) -> ParallelFor:
        return cls(lambda count, task: [task(index) for index in range(count)] and None)

    @classmethod
    def reversed(cls) -> ParallelFor:
        return cls(lambda count, task: [task(index) for index in reversed(range(count))] and None)

    @classmethod
    def shuffled(cls, seed: int) -> ParallelFor:
        def order(count: int, task: Callable[[int], None]) -> None:
            for index in np.random.default_rng(seed).permutation(count):
                task(int(index))

        return cls(order)

    @classmethod
    def threads(cls, number: int) -> ParallelFor:
        """Real ones: ctypes lets go of Python's lock while a task runs."""

        def order(count: int, task: Callable[[int], None]) -> None:
            indices = iter(range(count))
            lock = threading.Lock()

            def next_index() -> int | None:
                with lock:
                    return next(indices, None)

            def work() -> None:
                while (index := next_index()) is not None:
                    task(index)

            workers = [threading.Thread(target=work) for _ in range(number)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        return cls(order)


def to_blocks(x: Array, block: int) -> Array:
    """(N, C, D1..Dk) as (N, C / block, D1 * .. * Dk, block)."""
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


class Kernel:
    """The library's kernel.

    Attributes:
        variants: Names of the variants that this processor runs, the best first.
    """

    def __init__(self, library: Path) -> None:
        self.functions = open_kernels(library)
        self.variants = list(self._names(self.functions.deploynorm_cpu_variants()))

    @staticmethod
    def _names(names: Any) -> Iterator[str]:
        index = 0
        while names[index] is not None:
            yield names[index].decode()
            index += 1

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
        """The gradients; those of the parameters without what fills a block up.

        Args:
            dy: (N, C, D1..Dk), as is x.
            x: See above.
            rstd: (N, C).
            gamma: (C,), as are beta and tau.
            beta: See above.
            tau: See above.
            block: Channels side by side; C is filled up to a multiple of it.
            in_place: Whether dx is written over dy.
            variant: None leaves it to the library.
            parallel_for: None is the kernel's own loop.
            shift: Elements by which every tensor stands off its alignment.
        """
        padded = pad_channels(x, block)
        shape, channels = padded.shape, padded.shape[1]
        read = {
            "dy": Guarded(to_blocks(pad_channels(dy, block), block), shift),
            "x": Guarded(to_blocks(padded, block), shift),
            "rstd": Guarded(pad_channels(rstd, block, 1.0), shift),
        }
        read |= {
            name: Guarded(pad_channels(parameter, block, 1.0), shift)
            for name, parameter in (("gamma", gamma), ("beta", beta), ("tau", tau))
        }
        written = {"dx": read.pop("dy")} if in_place else {"dx": Guarded(np.full_like(read["x"].content, -7), shift)}
        written |= {
            name: Guarded(np.full(channels, -7, gamma.dtype), shift) for name in ("dgamma", "dbeta", "dtau", "deps")
        }
        pointers = {name: tensor.pointer for name, tensor in (read | written).items()}
        call = Backward(
            shape[0], channels, prod(shape[2:]), block, TYPES[x.dtype.name], **({"dy": pointers["dx"]} | pointers)
        )
        scratch = Guarded(np.full(self.workspace_bytes(call), 0xFF, np.uint8))
        assert self.call(call, scratch.pointer, variant=variant, parallel_for=parallel_for) == 0
        scratch.check("workspace", written=True)
        for name, tensor in (read | written).items():
            tensor.check(name, written=name in written)
        dx = from_blocks(written["dx"].read(), shape)[:, : x.shape[1]]
        parameters = (written[name].read()[: x.shape[1]] for name in ("dgamma", "dbeta", "dtau", "deps"))
        return Gradients(np.ascontiguousarray(dx), *parameters)

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
            x: (N, C, D1..Dk).
            gamma: (C,), as are beta, tau and eps.
            beta: See above.
            tau: See above.
            eps: See above.
            residual: As x.
            block: Channels side by side; C is filled up to a multiple of it.
            into: The tensor that y is written over; "y" is one of its own.
            variant: None leaves it to the library.
            parallel_for: None is the kernel's own loop.
            shift: Elements by which every tensor stands off its alignment.
            rstd: (N, C), written into where it is given.
        """
        padded = pad_channels(x, block)
        # A channel that is only there to fill a block counts for nothing, whatever its parameters.
        parameters = [pad_channels(p, block, 1.0) for p in (gamma, beta, tau, eps)]
        shape = padded.shape
        tensors = {"x": Guarded(to_blocks(padded, block), shift)}
        if residual is not None:
            tensors["residual"] = Guarded(to_blocks(pad_channels(residual, block), block), shift)
        if into == "y":
            tensors["y"] = Guarded(np.full_like(tensors["x"].content, -7), shift)
        tensors |= {
            name: Guarded(p, shift) for name, p in zip(("gamma", "beta", "tau", "eps"), parameters, strict=True)
        }
        if rstd is not None:
            tensors["rstd"] = Guarded(np.full(shape[:2], -7, gamma.dtype), shift)
        sizes = (shape[0], shape[1], prod(shape[2:]), block)
        pointers = {name: tensor.pointer for name, tensor in tensors.items()}
        call = Forward(*sizes, TYPES[x.dtype.name], **({"y": pointers[into]} | pointers))
        assert self.call(call, variant=variant, parallel_for=parallel_for) == 0
        for name, tensor in tensors.items():
            tensor.check(name, written=name in (into, "rstd"))
        if rstd is not None:
            rstd[...] = tensors["rstd"].read()[:, : x.shape[1]]
        y = from_blocks(tensors[into].read(), shape)
        return np.ascontiguousarray(y[:, : x.shape[1]])


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
