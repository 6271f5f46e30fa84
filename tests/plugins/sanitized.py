"""Calls a library that was built with sanitizers; test_sanitizers.py runs it in a process of its own.

python sanitized.py LIBRARY cases FILE.npz         every call of the file, in memory that ends with the tensor
python sanitized.py LIBRARY fuzz SEED COUNT        calls of any size, type and layout
python sanitized.py LIBRARY gradients SEED COUNT   the same of the backward pass, which the library for training has
python sanitized.py LIBRARY past_the_end           a mistake of the caller, which the sanitizers have to find
python sanitized.py LIBRARY misaligned             another
"""

from __future__ import annotations

import ctypes
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16 by its name
import numpy as np
from kernels import Array, Kernel, ParallelFor, exact_memory, from_blocks, pad_channels, to_blocks

from deploynorm.libraries.kernels import TYPES, Backward, Forward

DTYPES = {name: np.dtype(name) for name in TYPES}


def run(
    kernel: Kernel, tensors: list[Array], block: int, variant: str, host: ParallelFor | None, into: str = "y"
) -> Array:
    """x, residual (or one without elements), gamma, beta, tau and eps through the kernel."""
    x, residual, *parameters = tensors
    added = residual.size > 0 or x.size == 0
    laid = [to_blocks(t, block) for t in ([x, residual] if added else [x])]
    padded = [pad_channels(p, block, 1.0) for p in parameters]
    samples, channels = x.shape[0], laid[0].shape[1] * block
    with exact_memory(*laid, *padded, np.full_like(laid[0], 7)) as pointers:
        named = dict(zip(["x", "residual"][: len(laid)], pointers, strict=False))
        named |= dict(zip(["gamma", "beta", "tau", "eps", "y"], pointers[len(laid) :], strict=True))
        named["y"] = named.get(into, named["y"])
        call = Forward(samples, channels, laid[0].shape[2], block, TYPES[x.dtype.name], **named)
        assert kernel.call(call, variant=variant, parallel_for=host) == 0
        y = np.empty_like(laid[0])
        if y.size:
            ctypes.memmove(y.ctypes.data, named["y"], y.nbytes)
    return from_blocks(y, (samples, channels, *x.shape[2:]))[:, : x.shape[1]]


def cases(kernel: Kernel, path: str) -> int:
    count = 0
    with np.load(path) as file:
        for name in file["names"]:
            dtype = DTYPES[str(file[f"{name}/dtype"])]
            x = file[f"{name}/x"].view(dtype)
            parameters = [file[f"{name}/{p}"] for p in ("gamma", "beta", "tau", "eps")]
            for variant in kernel.variants:
                for block in (1, max(1, x.shape[1]), 8, 16, 5):
                    y = run(kernel, [x, x[:0], *parameters], block, variant, None)
                    wanted, bound = file[f"{name}/want"], file[f"{name}/tolerance"]
                    where = f"{name}, {variant}, blocks of {block}"
                    np.testing.assert_allclose(y.astype(np.float64), wanted, *bound, err_msg=where)
                    count += 1
    return count


def any_bits(rng: np.random.Generator) -> tuple[Array, Array, type[np.floating[Any]]]:
    """Two tensors of any bits, of one shape and element type, and the type of their parameters."""
    shape = [*rng.integers(0, 4, 1), *rng.integers(1, 80, 1), *rng.integers(1, 40, rng.integers(0, 4))]
    if rng.random() < 0.05:
        shape = [1, int(rng.integers(1, 4)), int(rng.integers(30_000, 90_000))]
    while np.prod(shape) > 300_000:
        shape[int(np.argmax(shape))] //= 2
    dtype = list(DTYPES.values())[rng.integers(4)]
    raw = rng.integers(0, 256, (2, int(np.prod(shape)) * dtype.itemsize), dtype=np.uint8)
    first, second = (each.view(dtype).reshape(shape) for each in raw)
    return first, second, np.float64 if dtype == np.float64 else np.float32


def gradients(kernel: Kernel, seed: str, count: str) -> int:
    rng = np.random.default_rng(int(seed))
    for _ in range(int(count)):
        *raw, wide = any_bits(rng)
        samples, channels, *_ = raw[0].shape
        block = [1, channels, 8, int(rng.integers(1, 70))][rng.integers(4)]
        dy, x = (to_blocks(each, block) for each in raw)
        channels = x.shape[1] * block
        parameters = [rng.normal(size=channels).astype(wide) for _ in range(3)]
        rstd = (10 ** rng.uniform(-3, 3, (samples, channels))).astype(wide)
        written = [np.zeros_like(x), *(np.zeros(channels, wide) for _ in range(4))]
        sizes = (samples, channels, x.shape[2], block, TYPES[x.dtype.name])
        scratch = np.zeros(kernel.workspace_bytes(Backward(*sizes)), np.uint8)
        with exact_memory(dy, x, rstd, *parameters, *written, scratch) as pointers:
            call = Backward(*sizes, *pointers[:-1])
            if rng.random() < 0.5:
                call.dx = call.dy
            variant = kernel.variants[rng.integers(len(kernel.variants))]
            host = ParallelFor(threads=3) if rng.random() < 0.3 else None
            assert kernel.call(call, pointers[-1], variant=variant, parallel_for=host) == 0
    return int(count)


def fuzz(kernel: Kernel, seed: str, count: str) -> int:
    rng = np.random.default_rng(int(seed))
    for _ in range(int(count)):
        x, residual, wide = any_bits(rng)
        if rng.random() < 0.5:
            residual = residual[:0]
        channels = x.shape[1]
        parameters = [rng.normal(size=channels).astype(wide) for _ in range(3)]
        parameters.append((10 ** rng.uniform(-12, 1, channels)).astype(wide))
        block = [1, channels, 8, 16, 64, int(rng.integers(1, 70))][rng.integers(6)]
        into = ["y", "x", "residual" if residual.size else "y"][rng.integers(3)]
        host = ParallelFor(threads=3) if rng.random() < 0.3 else None
        run(kernel, [x, residual, *parameters], block, kernel.variants[rng.integers(len(kernel.variants))], host, into)
    return int(count)


def mistake(kernel: Kernel, *, positions: int, offset: int) -> None:
    """A float32 call of more positions than the memory has, or of a pointer between two elements."""
    x = np.zeros((1, 1, 5), np.float32)
    one = np.ones(1, np.float32)
    with exact_memory(x, np.zeros(64, np.float32), one, one, one, one) as pointers:
        tensors = (pointers[0] + offset, pointers[1], None, *pointers[2:])
        kernel.call(Forward(1, 1, positions, 1, TYPES[x.dtype.name], *tensors), variant="baseline")


WHAT = {
    "cases": cases,
    "fuzz": fuzz,
    "gradients": gradients,
    "past_the_end": partial(mistake, positions=6, offset=0),
    "misaligned": partial(mistake, positions=3, offset=1),
}

if __name__ == "__main__":
    library, what, *arguments = sys.argv[1:]
    print(WHAT[what](Kernel(Path(library)), *arguments), "calls")  # type: ignore[operator]
