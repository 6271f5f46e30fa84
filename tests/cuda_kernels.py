"""The CUDA kernels through their C interface, plugins/kernels/frn.h, on a GPU or in the emulation on the CPU.

kernel = CudaKernel(library, "cuda")            # or emulated.build_kernels(folder), "cpu"
y = kernel(x, gamma, beta, tau, eps, layout="nhwc", variant="registers")      # x is (N, C, D1..Dk); so is y
dx, dgamma, dbeta, dtau, deps = kernel.backward(dy, x, rstd, gamma, beta, tau, layout="nhwc")

Every call lays its tensors out as the kernel takes them, between guard bytes that it looks at afterwards, and sees to
it that the kernel has left its inputs alone. What a call leaves unwritten is found: outputs begin as NaN.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from cases import NormCase, make_dy, make_inputs, make_rstd, tolerance, want
from frn_gradient import Gradients, check_gradients, gradients, sizes
from kernels import from_blocks, to_blocks
from tolerances import GRADIENT_ROUNDED, GRADIENT_SUMMED, RSTD

from deploynorm.contract import INPUTS
from deploynorm.libraries.kernels import TYPES, Backward, Forward, open_kernels

Array = npt.NDArray[Any]

Layout = Literal["nchw", "nhwc", "nhwc8"]

LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc", "nhwc8")
BACKWARD_LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")
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
    rows = to_blocks(x, channels) if channels else x.reshape(x.shape[0], 1, prod(x.shape[2:]), 0)
    if layout == "nhwc8":
        rows = np.pad(rows, [(0, 0)] * 3 + [(0, -channels % 8)], constant_values=fill)
    return rows


def from_layout(y: Array, layout: Layout, shape: tuple[int, ...]) -> Array:
    """The inverse of to_layout. What fills up the rows must be zero."""
    if layout == "nchw":
        return y.reshape(shape)
    assert not y[..., shape[1] :].any(), "the padding of a row is not zero"
    return from_blocks(y[..., : shape[1]], shape)


class CudaKernel:
    """The library's kernels."""

    def __init__(self, library: Path, device: Literal["cpu", "cuda"]) -> None:
        self.device = device
        self.functions = open_kernels(library)

    @property
    def variants(self) -> list[str]:
        """All that there are."""
        found = self.functions.deploynorm_cuda_variants()
        return [name.decode() for name in itertools.takewhile(lambda name: name is not None, found)]

    def workspace_bytes(self, call: Forward | Backward) -> int:
        forward = isinstance(call, Forward)
        name = "deploynorm_frn_cuda_workspace" if forward else "deploynorm_frn_backward_cuda_workspace"
        return int(getattr(self.functions, name)(ctypes.byref(call)))

    def call(
        self,
        call: Forward | Backward,
        *,
        workspace: int | None = None,
        stream: int = 0,
        variant: str | None = None,
    ) -> int:
        """As it stands in frn.h; nothing is checked."""
        name = "deploynorm_frn_cuda" if isinstance(call, Forward) else "deploynorm_frn_backward_cuda"
        text = None if variant is None else variant.encode()
        return int(getattr(self.functions, name)(ctypes.byref(call), workspace, stream, text))

    def _run(self, call: Forward | Backward, workspace: bool, variant: str | None) -> bool:
        """Whether the variant takes these sizes."""
        scratch = Guarded(np.full(self.workspace_bytes(call), 0xFF, np.uint8), self.device)
        pointer = scratch.pointer if workspace else None  # where no bytes are asked for, to what nobody may write
        code = self.call(call, workspace=pointer, variant=variant)
        if self.device == "cuda":
            torch.cuda.synchronize()
        scratch.read()
        if variant is not None and code == INVALID_VALUE:
            return False
        assert code == 0, f"CUDA error {code}"
        return True

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
        rstd: Array | None = None,
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
            rstd: Written over with 1 / sqrt(mean(x^2) + eps), (N, C), for the backward pass.
            variant: None leaves it to the library.
            workspace: Whether the scratch memory is there that the library asks for.
            shifts: Elements by which x and y stand off the alignment of their allocations.
        """
        laid = to_layout(x, layout)
        size = laid.itemsize
        source = Guarded(laid, self.device, shifts[0] * size)
        target = source if in_place else Guarded(np.full_like(laid, np.nan), self.device, shifts[1] * size)
        statistics = None if rstd is None else Guarded(np.full_like(rstd, np.nan), self.device)
        parameters: Mapping[str, Guarded] = {
            name: Guarded(values, self.device)
            for name, values in (("gamma", gamma), ("beta", beta), ("tau", tau), ("eps", eps))
        }
        call = Forward(
            *_sizes(x, laid, layout),
            x=source.pointer,
            y=target.pointer,
            rstd=None if statistics is None else statistics.pointer,
            **{name: guarded.pointer for name, guarded in parameters.items()},
        )
        if not self._run(call, workspace, variant):
            target.check_unchanged("y, of a call that was refused,")
            return None
        for name, guarded in parameters.items():
            guarded.check_unchanged(name)
        if not in_place:
            source.check_unchanged("x")
        if statistics is not None and rstd is not None:
            rstd[...] = statistics.read()
        return from_layout(target.read(), layout, x.shape)

    def backward(
        self,
        dy: Array,
        x: Array,
        rstd: Array,
        gamma: Array,
        beta: Array,
        tau: Array,
        *,
        layout: Layout = "nchw",
        in_place: bool = False,
        variant: str | None = None,
        shifts: tuple[int, int, int] = (0, 0, 0),
    ) -> Gradients | None:
        """The gradients; None where the variant does not take these sizes.

        Args:
            dy: (N, C, D1..Dk), as is x.
            x: See above.
            rstd: (N, C).
            gamma: (C,), as are beta and tau.
            beta: See above.
            tau: See above.
            layout: Of dy, x and dx in memory.
            in_place: Whether dx is written over dy.
            variant: None leaves it to the library.
            shifts: Elements by which dy, x and dx stand off the alignment of their allocations.
        """
        tensors = [to_layout(dy, layout), to_layout(x, layout)]
        tensors.append(np.full_like(tensors[0], np.nan))
        names = ("dy", "x", "dx")
        given = {
            name: Guarded(tensor, self.device, shift * tensor.itemsize)
            for name, tensor, shift in zip(names, tensors, shifts, strict=True)
        }
        given |= {
            name: Guarded(each, self.device)
            for name, each in (("rstd", rstd), ("gamma", gamma), ("beta", beta), ("tau", tau))
        }
        given |= {name: Guarded(np.full_like(gamma, np.nan), self.device) for name in Gradients._fields[1:]}
        pointers = {name: guarded.pointer for name, guarded in given.items()}
        if in_place:
            pointers["dx"] = pointers["dy"]
        taken = self._run(Backward(*_sizes(x, tensors[1], layout), **pointers), True, variant)
        written = ({"dy" if in_place else "dx", *Gradients._fields[1:]}) if taken else set()
        for name, guarded in given.items():
            if name not in written:
                guarded.check_unchanged(name)
        if not taken:
            return None
        dx = from_layout(given["dy" if in_place else "dx"].read(), layout, x.shape)
        return Gradients(dx, *(given[name].read() for name in Gradients._fields[1:]))


def _sizes(x: Array, laid: Array, layout: Layout) -> tuple[int, int, int, int, int]:
    """samples, channels, spatial, block and type of x, which is laid out like this."""
    block = 1 if layout == "nchw" else laid.shape[3]
    return x.shape[0], x.shape[1], prod(x.shape[2:]), block, TYPES[x.dtype.name]


def sized(dtype: str, samples: int, channels: int, spatial: int) -> NormCase:
    return NormCase(f"sized_{samples}x{channels}x{spatial}", (samples, channels, spatial), dtype, eps="per_channel")


def variants_to_check(kernel: CudaKernel, case: NormCase) -> Sequence[str]:
    """All; in the emulation, where a large plane takes seconds, of such a one in a single type."""
    return VARIANTS if kernel.device == "cuda" or prod(case.shape) < 10**5 or case.dtype == "float32" else ()


def check(kernel: CudaKernel, case: NormCase, *, statistics: bool = True, **how: object) -> bool:
    """Whether the variant takes these sizes; the numbers must be right if it does.

    Args:
        kernel: What is checked.
        case: The inputs.
        statistics: Whether rstd is asked for, and checked too.
        how: As CudaKernel takes it.
    """
    inputs = make_inputs(case)
    expected = make_rstd(case)
    rstd = np.empty_like(expected) if statistics else None
    y = kernel(*(inputs[name] for name in INPUTS), rstd=rstd, **how)  # type: ignore[arg-type]
    if y is None:
        return False
    assert y.dtype == inputs[INPUTS[0]].dtype
    np.testing.assert_allclose(y.astype(np.float64), want(case), **tolerance(case).kwargs())
    if rstd is not None and y.size:
        np.testing.assert_allclose(rstd, expected, **RSTD[expected.dtype.name].kwargs())
    return True


def check_backward(kernel: CudaKernel, case: NormCase, variants: Sequence[str | None] = (None,), **how: object) -> int:
    """How many of the variants take these sizes; the gradients must be right of all that do."""
    x, gamma, beta, tau, eps = make_inputs(case).values()
    dy, rstd = make_dy(case), make_rstd(case)
    expected = (dy, x, gamma, beta, tau, eps)
    right, size = gradients(*expected), sizes(*expected)
    taken = 0
    for variant in variants:
        got = kernel.backward(dy, x, rstd, gamma, beta, tau, variant=variant, **how)  # type: ignore[arg-type]
        if got is not None:
            taken += 1
            check_gradients(got, right, size, GRADIENT_SUMMED[gamma.dtype.name], GRADIENT_ROUNDED[case.dtype])
    return taken


def normalised(x: Array, scale: Array, beta: Array) -> Array:
    """scale * x + beta, (N, C, L) and (N, C) and (C,), by one rounding to the type of scale."""
    terms = zip(x.reshape(-1, x.shape[2]).tolist(), scale.reshape(-1).tolist(), beta.tolist() * x.shape[0], strict=True)
    rows = [[float(Fraction(v) * Fraction(s) + Fraction(b)) for v in row] for row, s, b in terms]
    return np.array(rows).reshape(x.shape).astype(scale.dtype)


def check_one_rounding(kernel: CudaKernel, dtype: str, **how: object) -> bool:
    """Whether the variant takes these sizes; y must be what check_ties takes it for, bit for bit, if it does."""
    x, gamma, beta, tau, eps = make_inputs(NormCase("one_rounding", (2, 64, 49), dtype, tlu=False)).values()
    rstd = np.empty(x.shape[:2], gamma.dtype)
    y = kernel(x, gamma, beta, tau, eps, rstd=rstd, **how)  # type: ignore[arg-type]
    if y is not None:
        np.testing.assert_array_equal(y, normalised(x, gamma * rstd, beta).astype(x.dtype))
    return y is not None


def check_ties(kernel: CudaKernel, dtype: str, variants: Sequence[str | None] = (None,), **how: object) -> None:
    """The backward pass has each element on the side of its threshold on which the forward pass had it, bit-exact.

    Each channel's threshold is the y of one of its elements, which gets the gradient then. All of dy is 1, so that the
    gradients by beta and tau are counts.
    """
    case = NormCase("ties", (1, 64, 49), dtype)
    x, gamma, beta, *_ = make_inputs(case).values()
    rstd = make_rstd(case)
    y = normalised(x, gamma * rstd, beta)[0]
    tau = y[np.arange(64), np.random.default_rng(0).integers(0, 49, 64)]
    reached = (y >= tau[:, None]).sum(axis=1)
    for variant in variants:
        given = (np.ones_like(x), x, rstd, gamma, beta, tau)
        got = kernel.backward(*given, variant=variant, **how)  # type: ignore[arg-type]
        if got is not None:
            np.testing.assert_array_equal(got.dbeta, reached, err_msg=f"{variant}")
            np.testing.assert_array_equal(got.dtau, 49 - reached, err_msg=f"{variant}")
