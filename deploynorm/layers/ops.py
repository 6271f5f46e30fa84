"""Filter response normalization as operators of torch.library.

    frn_forward(x, gamma, beta, tau, eps, residual=None) -> (y, rstd)
    frn_backward(dy, x, rstd, gamma, beta, tau) -> gradients
        what training runs: the native kernels where they are built, else _handwritten.py
    filter_response_norm(x, gamma, beta, tau, eps) -> y
    filter_response_norm_add(x, gamma, beta, tau, eps, residual) -> y
        what exporters see: the operators of deploynorm/contract.py

x and residual are (N, C, ...); the parameters are (C,), in x's compute type (float32, or float64 for float64); rstd is
(N, C). y and the gradient of x have the layout of x where this is dense, be it (N, C, ...) or (N, ..., C), else they
are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from deploynorm.contract import DOMAIN, INPUTS, TORCH_ADD_OP, TORCH_OP
from deploynorm.errors import InputError
from deploynorm.layers import _handwritten, _native
from deploynorm.layers._composed import composed, for_exporters, recorded, transformed
from deploynorm.layers._precision import cast, compute_dtype, per_channel

_FORWARD = f"{DOMAIN}::frn_forward"
_BACKWARD = f"{DOMAIN}::frn_backward"

# Flexible: torch.compile may hand x over in the layout of its convolutions, and not transpose it first.
_TAGS = (torch.Tag.flexible_layout,)

torch.library.define(
    _FORWARD,
    "(Tensor x, Tensor gamma, Tensor beta, Tensor tau, Tensor eps, Tensor? residual=None) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    _BACKWARD,
    "(Tensor dy, Tensor x, Tensor rstd, Tensor gamma, Tensor beta, Tensor tau)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _forward(
    x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_operands(x, gamma, beta, tau, eps, residual=residual)
    if _native.available(x.device):
        return _native.forward(x, gamma, beta, tau, eps, residual)
    return _handwritten.forward(x, gamma, beta, tau, eps, residual)


torch.library.impl(_FORWARD, "default", _forward)


def _forward_shapes(
    x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_operands(x, gamma, beta, tau, eps, residual=residual)
    return torch.empty_like(_handwritten.dense(x)), gamma.new_empty(x.shape[:2])


torch.library.register_fake(_FORWARD, _forward_shapes)


def _backward(
    dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_operands(x, gamma, beta, tau)
    _check_gradient(dy, x, rstd, gamma)
    if _native.available(x.device):
        return _native.backward(dy, x, rstd, gamma, beta, tau)
    return _handwritten.backward(dy, x, rstd, gamma, beta, tau)


torch.library.impl(_BACKWARD, "default", _backward)


def _backward_shapes(
    dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dgamma, dbeta, dtau, deps = (torch.empty_like(gamma) for _ in range(4))
    return torch.empty_like(_handwritten.dense(x)), dgamma, dbeta, dtau, deps


torch.library.register_fake(_BACKWARD, _backward_shapes)


def _gradients(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, gamma, beta, tau, eps, rstd, *with_residual = ctx.saved_tensors
    if not with_residual:
        return *_gradients_of_frn(dy, x, gamma, beta, tau, eps, rstd), None
    # The threshold is passed by the output, as in TLU; what passes it is the gradient of FRN and of the residual.
    [y] = with_residual
    kept = above(dy, y, per_channel(tau, y))
    axes = (0, *range(2, y.dim()))
    dtau = dy.sum(axes, dtype=tau.dtype) - kept.sum(axes, dtype=tau.dtype)
    unbounded = torch.full_like(tau, -math.inf)
    dx, dgamma, dbeta, _dtau, deps = _gradients_of_frn(kept, x, gamma, beta, unbounded, eps, rstd)
    return dx, dgamma, dbeta, dtau, deps, kept


def _gradients_of_frn(dy: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, gamma, beta, tau and eps, from these and rstd."""
    inputs, rstd = saved[:-1], saved[-1]
    if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated itself
        aliases = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(composed(*aliases), aliases, dy, create_graph=True)
    x, gamma, beta, tau, _ = inputs
    gradients: tuple[Tensor, ...] = torch.ops.deploynorm.frn_backward.default(dy, x, rstd, gamma, beta, tau)
    return gradients


def above(dy: Tensor, y: Tensor, bound: Tensor) -> Tensor:
    """dy where the output y of a maximum is above its bound (or NaN), and 0 elsewhere."""
    # The difference of two numbers is zero only if they are equal, also where it is subnormal.
    kept: Tensor = torch.ops.aten.threshold_backward.default(dy, y - cast(bound, y.dtype), 0)
    return kept


def _save(ctx: Any, inputs: Sequence[Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    *operands, residual = inputs
    y, rstd = output
    # A layer that follows saves y too.
    ctx.save_for_backward(*operands, rstd, *(() if residual is None else (y,)))
    ctx.mark_non_differentiable(rstd)


torch.library.register_autograd(_FORWARD, _gradients, setup_context=_save)


class _FRN(torch.autograd.Function):
    """What register_autograd makes of frn_forward, with 60 microseconds less overhead per call, half (torch 2.13)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        y: Tensor
        with torch._C._AutoDispatchBelowAutograd():  # this is its autograd
            y, rstd = torch.ops.deploynorm.frn_forward.default(*inputs)
        _save(ctx, inputs, (y, rstd))
        return y

    backward = staticmethod(_gradients)


def frn(x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor, residual: Tensor | None = None) -> Tensor:
    """y; saves only x and one scalar per (sample, channel) for backward, and with a residual y."""
    y: Tensor
    if torch.compiler.is_compiling():
        y = torch.ops.deploynorm.frn_forward.default(x, gamma, beta, tau, eps, residual)[0]
    else:
        y = _FRN.apply(x, gamma, beta, tau, eps, residual)  # type: ignore[no-untyped-call]
    return y


_whole: ContextVar[bool] = ContextVar("exported operators stay whole", default=False)


@contextmanager
def kept_whole() -> Iterator[None]:
    """Where a network is traced or translated with the exported operators as they are.

    They then tell the shapes of their results alone, in place of computing them in ten operators of torch each: a trace
    of 51 layers does that 200 times.
    """
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def _exported(
    x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor, residual: Tensor | None = None
) -> Tensor:
    """An exported operator: the kernels where x has data, torch's own operators where a tracer asks what is in it."""
    # A program that torch.export made keeps its constants in their type when it is cast to another.
    gamma, beta, tau, eps = (cast(parameter, compute_dtype(x.dtype)) for parameter in (gamma, beta, tau, eps))
    # The residual's shape is left to the addition: to compare sizes that a trace leaves open would fix them.
    _check_operands(x, gamma, beta, tau, eps)
    if _whole.get() and isinstance(x, FakeTensor):
        return torch.empty_like(x)
    with_data = type(x) is Tensor and not recorded() and not transformed()  # torch.export has tensors of other classes
    compute = frn if with_data else for_exporters
    return compute(x, gamma, beta, tau, eps, residual)


def _define_exported(name: str, residual: str = "") -> torch._ops.OpOverload:
    """An operator that torch.export keeps whole, and that is taken apart for exporters that do not know it."""
    qualified = f"{DOMAIN}::{name}"
    torch.library.define(
        qualified, f"(Tensor x, Tensor gamma, Tensor beta, Tensor tau, Tensor eps{residual}) -> Tensor"
    )
    torch.library.impl(qualified, "CompositeImplicitAutograd", _exported)
    operator: torch._ops.OpOverload = getattr(getattr(torch.ops, DOMAIN), name).default
    return operator


filter_response_norm = _define_exported(TORCH_OP)
filter_response_norm_add = _define_exported(TORCH_ADD_OP, ", Tensor residual")


def _check_operands(x: Tensor, *parameters: Tensor, residual: Tensor | None = None) -> None:
    """Raises InputError where the kernels, which take addresses, would read beyond an end or on another device."""
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise _misfit(TORCH_OP, {"X": x, "residual": residual}, "a residual of X's shape and type")
    channels, dtype, device = x.shape[1:2], compute_dtype(x.dtype), x.device
    if x.dim() < 2 or any(p.shape != channels or p.dtype != dtype or p.device != device for p in parameters):
        given = dict(zip(INPUTS, (x, *parameters), strict=False))
        raise _misfit(TORCH_OP, given, f"X (N, C, ...), and (C,) {dtype} on {device} for the others")


def _check_gradient(dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor) -> None:
    """Checks what the backward kernels take beside the operands of the forward pass."""
    if dy.shape != x.shape or dy.dtype != x.dtype or rstd.shape != x.shape[:2] or rstd.dtype != gamma.dtype:
        given = {"dy": dy, "X": x, "rstd": rstd}
        raise _misfit("frn_backward", given, f"dy as X, and rstd (N, C) {gamma.dtype}")


def _misfit(operator: str, given: dict[str, Tensor], expected: str) -> InputError:
    got = ", ".join(f"{name} {tuple(each.shape)} {each.dtype} on {each.device}" for name, each in given.items())
    return InputError(f"{DOMAIN}::{operator}", "the operands do not fit", got=got, expected=expected)
