"""What a layer computes of maps, channel by channel, read off its trace: FRN, or a scale and a shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from deploynorm.errors import ModelError
from deploynorm.trace import Examples, trace

Array = npt.NDArray[Any]

_OPSET = 20
_SIZES = (7, 5, 3)
"""Of the axes of space, the last ones first: of an odd size each, and other than most numbers of channels."""


class UnrecognizedError(Exception):
    """A layer computes something else; its text says what is in the way. `near` where there is FRN in it."""

    def __init__(self, reason: str, *, near: bool = False) -> None:
        super().__init__(reason)
        self.near = near


class Numbers(NamedTuple):
    """max(scale * u + shift, tau) for each channel, where u is x * (mean(x^2) + eps)^-0.5; x itself without eps."""

    scale: Array
    shift: Array
    tau: Array
    eps: Array | None
    channels_last: bool


def shape_for(channels: int, rank: int, *, channels_last: bool) -> tuple[int, ...]:
    """Of a small input, in which no axis has the size of another."""
    space = [size if size != channels else size + 4 for size in _SIZES[: rank - 2]]
    return (2, *space, channels) if channels_last else (2, channels, *space)


def numbers_of(layer: nn.Module, channels: int, rank: int, *, channels_last: bool) -> Numbers:
    """The numbers of a layer in evaluation, which is cast to float64 for it.

    The layer is traced alone, translated to ONNX, and the walk of the pass `fuse` says which formula its output is:
    once for x as it is (FRN), and once for an x that is taken for normalized already (a scale, a shift, a threshold).

    Raises:
        UnrecognizedError: It is neither.
    """
    # What these import takes long, and most networks have no layers of others.
    from deploynorm._export.translation import to_onnx
    from deploynorm.foreign import loose_frn
    from deploynorm.rewrite.formula import Formula
    from deploynorm.rewrite.intake import prepared

    x = torch.randn(shape_for(channels, rank, channels_last=channels_last), dtype=torch.float64)
    try:
        program = trace(layer.double().eval(), Examples.of("adopt", layer, (x,)), "none", deterministic=False)
        graph = prepared(to_onnx(program, _OPSET)[0]).graph
    except ModelError as error:
        raise UnrecognizedError(f"it cannot be traced alone ({error.problem})") from error
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise UnrecognizedError("it is no function of one tensor")
    space = frozenset(range(1, rank - 1) if channels_last else range(2, rank))
    normalized = Formula((), power=1, exponent=-0.5)
    frn, why = _formula(graph, space, Formula((), power=1))
    affine, _ = _formula(graph, space, normalized)
    formula = frn or affine
    if formula is None:
        raise UnrecognizedError(why, near=bool(loose_frn(graph)))
    if rank == 3 and all(np.ndim(each) == 0 for each in (formula.scale, formula.shift, formula.tau, formula.eps)):
        raise UnrecognizedError("of three axes only a parameter for each of them could tell the channels")
    scale, shift, tau, eps = (
        np.broadcast_to(np.asarray(each, np.float64), channels)
        for each in (formula.scale, formula.shift, formula.tau, formula.eps)
    )
    return Numbers(scale, shift, tau, None if frn is None else eps, channels_last)


def _formula(graph: ir.Graph, space: frozenset[int], start: Any) -> tuple[Any, str]:
    """The formula of the graph's output where it is the operator's, else None and the reason."""
    from deploynorm.rewrite.operators import RULES
    from deploynorm.rewrite.values import Values
    from deploynorm.rewrite.walk import Walk

    x, y = graph.inputs[0], graph.outputs[0]
    order = {node: place for place, node in enumerate(graph)}
    walk = Walk(Values(_OPSET), x, space, order, RULES, start=start)
    formula = walk.formulas.get(y)
    if formula is None:
        return None, next(iter(walk.refused.values()), "its output does not depend on its input")
    if not formula.finished or formula.layout != walk.formulas[x].layout:
        return None, "its output is not x times the mean of its square to the power -0.5"
    if not (formula.eps > 0).all() and start.exponent == 0:
        return None, "its epsilon is not positive"
    return formula, ""


def same_numbers(a: Array, b: Sequence[float] | Array | float, rtol: float = 1e-6) -> bool:
    """Whether they are equal but for rounding in float32."""
    return bool(np.allclose(a, b, rtol=rtol, atol=1e-12))
