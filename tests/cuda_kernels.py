"""The CUDA kernels through their C interface, plugins/kernels/frn.h, on a GPU or in the emulation on the CPU.

kernel = CudaKernel(library, "cuda")            # or emulated.build_kernels(folder), "cpu"
y = kernel(x, gamma, beta, tau, eps, layout="nhwc", variant="registers")      # x is (N, C, D1..Dk); so is y
dx, dgamma, dbeta, dtau, deps = kernel.backward(dy, x, rstd, gamma, beta, tau, layout="nhwc")

Every call lays its tensors out as the kernel takes them, between guard bytes that it looks at afterwards, and sees to
it that the kernel has left its inputs alone. What a call leaves unwritten is found: outputs begin as NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import references
import torch
from cases import NormCase, make_inputs, make_rstd
from frn_gradient import Gradients
from kernels import (
    PARAMETER_GRADIENTS,
    PARAMETERS,
    Array,
    Guarded,
    check_all,
    from_blocks,
    pad_channels,
    to_blocks,
    variant_names,
)
from references import backward_inputs, check_forward, inputs_of
from tolerances import RSTD

from deploynorm.libraries.kernels import TYPES, Backward, Forward, open_kernels

Layout = Literal["nchw", "nhwc", "nhwc8"]

LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc", "nhwc8")
BACKWARD_LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")
VARIANTS = ("runs", "registers", "clusters", "two_passes", "split")

# Where the kernels' code turns: a plane or row beside a multiple of a pack, a warp, a block, and what a block holds.
SPATIAL = (1, 2, 3, 7, 8, 9, 31, 33, 49, 127, 196, 255, 257, 1023, 1025, 2048, 2049, 4097)
CHANNELS = (1, 2, 3, 7, 8, 9, 13, 16, 33, 40, 64, 257)

INVALID_VALUE = 1
"""cudaErrorInvalidValue."""


def to_layout(x: Array, layout: Layout) -> Array:
    """(N, C, D1..Dk) as the kernel takes it; rows of nhwc8 are filled up to whole eights with NaN."""
    if layout == "nchw":
        return np.ascontiguousarray(x).reshape(*x.shape[:2], prod(x.shape[2:]), 1)
    channels = x.shape[1]
    if layout == "nhwc8":
        x = pad_channels(x, 8, np.nan)
    return to_blocks(x, x.shape[1]) if channels else x.reshape(x.shape[0], 1, prod(x.shape[2:]), 0)


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

    @cached_property
    def variants(self) -> Sequence[str]:
        """Names of all that there are; the forward kernels have the list."""
        return variant_names(self.functions.deploynorm_cuda_variants())

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
        scratch = Guarded(np.full(self.workspace_bytes(call), 0xFF, np.uint8), device=self.device)
        pointer = scratch.pointer if workspace else None  # where no bytes are asked for, to what nobody may write
        code = self.call(call, workspace=pointer, variant=variant)
        if self.device == "cuda":
            torch.cuda.synchronize()
        scratch.check("workspace", written=True)
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
        residual: Array | None = None,
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
            x: (N, C, D1..Dk), as is residual; the parameters are (C,).
            layout: Of x, residual and y in memory.
            in_place: Whether y is written over x, or over the residual where there is one.
            rstd: Written over with 1 / sqrt(mean(x^2) + eps), (N, C), for the backward pass.
            variant: None leaves it to the library.
            workspace: Whether the scratch memory is there that the library asks for.
            shifts: Elements by which x and y stand off the alignment of their allocations; the residual as y does.
        """
        laid = to_layout(x, layout)
        tensors = {"x": Guarded(laid, shifts[0], self.device)}
        if residual is not None:
            tensors["residual"] = Guarded(to_layout(residual, layout), shifts[1], self.device)
        if not in_place:
            tensors["y"] = Guarded(np.full_like(laid, np.nan), shifts[1], self.device)
        given = dict(zip(PARAMETERS, (gamma, beta, tau, eps), strict=True))
        if rstd is not None:
            given["rstd"] = np.full_like(rstd, np.nan)
        tensors |= {name: Guarded(array, device=self.device) for name, array in given.items()}
        pointers = {name: tensor.pointer for name, tensor in tensors.items()}
        into = list(tensors)[0 if residual is None else 1] if in_place else "y"
        call = Forward(*_sizes(x, laid, layout), **({"y": pointers[into]} | pointers))
        taken = self._run(call, workspace, variant)
        check_all(tensors, (into, "rstd") if taken else ())
        if not taken:
            return None
        if rstd is not None:
            rstd[...] = tensors["rstd"].read()
        return from_layout(tensors[into].read(), layout, x.shape)

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
        """The gradients, as __call__ has y: in_place writes dx over dy, and shifts are of dy, x and dx."""
        laid = {"dy": to_layout(dy, layout), "x": to_layout(x, layout)}
        laid["dx"] = np.full_like(laid["x"], np.nan)
        tensors = {name: Guarded(laid[name], shift, self.device) for name, shift in zip(laid, shifts, strict=True)}
        given = {"rstd": rstd, "gamma": gamma, "beta": beta, "tau": tau}
        given |= dict.fromkeys(PARAMETER_GRADIENTS, np.full_like(gamma, np.nan))
        tensors |= {name: Guarded(array, device=self.device) for name, array in given.items()}
        pointers = {name: tensor.pointer for name, tensor in tensors.items()}
        dx = "dy" if in_place else "dx"
        call = Backward(*_sizes(x, laid["x"], layout), **(pointers | {"dx": pointers[dx]}))
        taken = self._run(call, True, variant)
        check_all(tensors, (dx, *PARAMETER_GRADIENTS) if taken else ())
        if not taken:
            return None
        parameters = (tensors[name].read() for name in PARAMETER_GRADIENTS)
        return Gradients(from_layout(tensors[dx].read(), layout, x.shape), *parameters)


def _sizes(x: Array, laid: Array, layout: Layout) -> tuple[int, int, int, int, int]:
    """samples, channels, spatial, block and type of x, which is laid out like this."""
    block = 1 if layout == "nchw" else laid.shape[3]
    return x.shape[0], x.shape[1], prod(x.shape[2:]), block, TYPES[x.dtype.name]


def sized(dtype: str, samples: int, channels: int, spatial: int, *, residual: bool = False) -> NormCase:
    shape = (samples, channels, spatial)
    return NormCase(f"sized_{samples}x{channels}x{spatial}", shape, dtype, eps="per_channel", residual=residual)


def variants_to_check(kernel: CudaKernel, case: NormCase) -> Sequence[str]:
    """All; in the emulation, where a large plane takes seconds, of such a one in a single type."""
    return VARIANTS if kernel.device == "cuda" or prod(case.shape) < 10**5 or case.dtype == "float32" else ()


def check(
    kernel: CudaKernel,
    case: NormCase,
    variants: Sequence[str | None] = (None,),
    *,
    statistics: bool = True,
    **how: object,
) -> int:
    """How many of the variants take these sizes; y must be right of all that do, and rstd with statistics."""
    expected = make_rstd(case)
    taken = 0
    for variant in variants:
        rstd = np.empty_like(expected) if statistics else None
        y = kernel(*inputs_of(case).values(), rstd=rstd, variant=variant, **how)  # type: ignore[arg-type]
        if y is not None:
            taken += 1
            check_forward(y, case, f"{variant}")
            if rstd is not None and y.size:
                np.testing.assert_allclose(rstd, expected, **RSTD[expected.dtype.name].kwargs())
    return taken


def check_backward(kernel: CudaKernel, case: NormCase, variants: Sequence[str | None] = (None,), **how: object) -> int:
    """As check, of the gradients."""
    taken = 0
    for variant in variants:
        got = kernel.backward(*backward_inputs(case), variant=variant, **how)  # type: ignore[arg-type]
        if got is not None:
            taken += 1
            references.check_backward(got, case)
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
