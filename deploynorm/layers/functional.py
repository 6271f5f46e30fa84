"""The layers as pure tensor functions, and FRN as the operator that exporters see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deploynorm.contract import DOMAIN, INPUTS, TORCH_OP
from deploynorm.errors import InputError

__all__ = ["center_weight", "filter_response_norm", "normalize_by_second_moment", "tlu"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of `dtype` tensors are taken: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype) that leaves no trace in an exported graph where there is nothing to convert."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """Views a (C,) or () parameter so that it broadcasts over x (N, C, ...), in x's compute type."""
    return cast(parameter, compute_dtype(x.dtype)).reshape((1, -1) + (1,) * (x.dim() - 2))


def filter_response_norm(x: Tensor, weight: Tensor, bias: Tensor, tau: Tensor | None, eps: float | Tensor) -> Tensor:
    """Filter response normalization and thresholded linear unit of each sample and channel.

        nu2 = mean(x**2 over all axes >= 2);  y = weight * x / sqrt(nu2 + eps) + bias;  z = max(y, tau)

    Args:
        x: (N, C, ...) floating point, any strides. With (N, C) every value is its own mean.
        weight: gamma, (C,).
        bias: beta, (C,).
        tau: Threshold (C,), or None for no TLU.
        eps: Effective epsilon, greater than 0: a number, or a tensor () or (C,).

    Returns:
        Tensor of x's shape and dtype.

    Numerics: squares, mean and affine are in float32 (float64 for float64 x) and rounded once, so float16
        inputs of any size are safe. At a tie y == tau the gradient goes to y and none to tau (eq. 4).
    Source: Singh & Krishnan, arXiv:1911.09737, eq. 1 to 3. Their eq. 7 lacks a factor 1/N; autograd has it.
    """
    if torch.compiler.is_exporting():
        return _exported(x, weight, bias, tau, eps)
    return _composed(x, weight, bias, tau, eps)


def tlu(x: Tensor, tau: Tensor) -> Tensor:
    """Thresholded linear unit: max(x, tau) with one threshold per channel.

    Args:
        x: (N, C, ...).
        tau: (C,).

    Returns:
        Tensor of x's shape and dtype. At a tie the gradient goes to x; a NaN in x stays NaN.

    Source: Singh & Krishnan, arXiv:1911.09737, eq. 3 and 4.
    """
    # clamp, not maximum: maximum splits the gradient at a tie in two, where eq. 4 gives all of it to x.
    return torch.clamp(x, min=cast(per_channel(tau, x), x.dtype))


def normalize_by_second_moment(
    x: Tensor, second_moment: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """MABN in evaluation: y = weight * x / sqrt(second_moment + eps) + bias, per channel.

    Args:
        x: (N, C, ...).
        second_moment: E[x^2], (C,), float32 or float64.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: Added to the second moment.

    Returns:
        Tensor of x's shape and dtype.

    Source: Yan et al., ICLR 2020, arXiv:2001.06838, Algorithm 1 (inference). It is batch normalization with
        mean zero, and runs as such: one pass over x, and every exporter and runtime knows the operator.
    """
    dtype = compute_dtype(x.dtype)
    second_moment = cast(second_moment, dtype)
    return F.batch_norm(
        x,
        torch.zeros_like(second_moment),
        second_moment,
        None if weight is None else cast(weight, dtype),
        None if bias is None else cast(bias, dtype),
        training=False,
        momentum=0.0,
        eps=eps,
    )


def center_weight(weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """Weight centralisation: W - mean(W), the mean taken over the fan-in of each output filter.

    Args:
        weight: (out, in/groups, ...), or (in, out/groups, ...) when transposed.
        groups: Needed for a transposed convolution alone, whose fan-in is split over the first axis.
        transposed: Whether the weight is that of a transposed convolution.

    Returns:
        Tensor of weight's shape and dtype; the mean is taken in float32 (float64 for float64).

    Source: Yan et al., arXiv:2001.06838, section 4.3; megvii-model/MABN, MABN.py, CenConv2d.
    """
    w = cast(weight, compute_dtype(weight.dtype))
    if transposed:
        grouped = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
        fan_in = (1, *range(3, grouped.dim()))
        centred = (grouped - grouped.mean(fan_in, keepdim=True)).reshape(w.shape)
    else:
        centred = w - w.mean(tuple(range(1, w.dim())), keepdim=True)
    return cast(centred, weight.dtype)


def _composed(x: Tensor, weight: Tensor, bias: Tensor, tau: Tensor | None, eps: float | Tensor) -> Tensor:
    v = cast(x, compute_dtype(x.dtype))
    spatial = tuple(range(2, x.dim()))
    square = v.square()
    # Not mean(): over maps of no size it is 0/0, and that reaches the gradients of the parameters.
    nu2 = square.sum(spatial, keepdim=True) / max(math.prod(x.shape[2:]), 1) if spatial else square
    epsilon = per_channel(eps, x) if isinstance(eps, Tensor) else eps
    # gamma times the inverse root first: one multiplication fewer for every element of x.
    y = v * (per_channel(weight, x) * torch.rsqrt(nu2 + epsilon)) + per_channel(bias, x)
    if tau is not None:
        y = tlu(y, tau)
    return cast(y, x.dtype)


def _exported(x: Tensor, weight: Tensor, bias: Tensor, tau: Tensor | None, eps: float | Tensor) -> Tensor:
    """The same as one call of the operator, with its five tensors as contract.py names them."""
    dtype = compute_dtype(x.dtype)
    channels = weight.shape[0]
    if tau is None:
        tau = torch.full((channels,), -math.inf, dtype=dtype, device=x.device)
    if not isinstance(eps, Tensor):
        eps = torch.full((channels,), eps, dtype=dtype, device=x.device)
    if eps.dim() == 0:
        eps = eps.expand(channels)
    y: Tensor = frn_op(x, *(cast(p, dtype) for p in (weight, bias, tau, eps)))
    return y


@torch.library.custom_op(f"{DOMAIN}::{TORCH_OP}", mutates_args=())
def frn_op(x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor) -> Tensor:
    """`filter_response_norm` as an operator of its own, so that a traced graph holds one node for it."""
    _check_operands(x, gamma, beta, tau, eps)
    # contiguous: an operator's output must have the strides that its fake kernel promises.
    return _composed(x, gamma, beta, tau, eps).contiguous()


@frn_op.register_fake
def _(x: Tensor, gamma: Tensor, beta: Tensor, tau: Tensor, eps: Tensor) -> Tensor:
    _check_operands(x, gamma, beta, tau, eps)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check_operands(x: Tensor, *parameters: Tensor) -> None:
    if x.dim() < 2 or any(parameter.shape != x.shape[1:2] for parameter in parameters):
        raise InputError(
            f"{DOMAIN}::{TORCH_OP}",
            "shapes do not fit",
            got=", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(INPUTS, (x, *parameters), strict=True)),
            expected="X (N, C, ...) and (C,) for the others",
        )


def _save_inputs(ctx: Any, inputs: Sequence[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        return torch.autograd.grad(_composed(*inputs), inputs, grad)


frn_op.register_autograd(_backward, setup_context=_save_inputs)
