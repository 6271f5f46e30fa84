"""What a layer computes of maps, channel by channel, read off its trace: FRN, or a scale and a shift."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from deploynorm.errors import ModelError
from deploynorm.trace import Examples, Sizes, trace

Array = npt.NDArray[Any]

_OPSET = 20
_SIZES = (7, 5, 3)
"""Of the axes of space, the last ones first: of an odd size each, and other than most numbers of channels."""


_INPUT = re.compile(r"L\['inputs'\]\[(\d+)\]")
"""Of layers side by side, as torch.export names it in what it assumes."""

AT_OTHER_SIZES = "it computes something else at other sizes"
STATEFUL = "it changes its own state in a call"


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


class Tried(NamedTuple):
    """A layer that is asked for its numbers, in evaluation mode and in float64, and the input that it takes."""

    layer: nn.Module
    channels: int
    rank: int
    channels_last: bool


def numbers_of(tried: Sequence[Tried]) -> list[Numbers | UnrecognizedError]:
    """The numbers of each layer, or why there are none.

    The layers are traced side by side, since a translation to ONNX costs more than what is translated, and the walk of
    the pass `fuse` says which formula of its input each output is: once for x as it is (FRN), and once for an x that is
    taken for normalized already (a scale, a shift, a threshold).
    """
    if not tried:
        return []
    # What these import takes long, and most networks have no layers of others.
    from deploynorm._export.translation import to_onnx
    from deploynorm.foreign import loose_frn
    from deploynorm.rewrite.intake import prepared

    inputs = [
        torch.randn(shape_for(each.channels, each.rank, channels_last=each.channels_last), dtype=torch.float64)
        for each in tried
    ]
    side_by_side = _SideBySide([each.layer for each in tried]).eval()
    try:
        program = trace(side_by_side, Examples.of("adopt", side_by_side, inputs), "none", deterministic=False)
        graph = prepared(to_onnx(program, _OPSET)[0]).graph
    except ModelError as error:
        if len(tried) > 1:
            return [numbers for each in tried for numbers in numbers_of([each])]
        return [UnrecognizedError(f"it cannot be traced alone ({error.problem})")]
    if len(graph.inputs) != len(tried) or len(graph.outputs) != len(tried):
        return [UnrecognizedError("it is no function of one tensor")] * len(tried)
    near = {layer.name.split(".")[1] for layer in loose_frn(graph) if layer.name.startswith("layers.")}
    walks = _Walks(graph)
    found: list[Numbers | UnrecognizedError] = []
    for place, each in enumerate(tried):
        try:
            found.append(_numbers(walks, place, each))
        except UnrecognizedError as error:
            found.append(UnrecognizedError(str(error), near=str(place) in near))
    return found


def for_all_sizes(tried: Sequence[Tried]) -> list[str]:
    """For each layer why a trace of it may not hold for maps of other sizes, or for another call; empty where it does.

    torch.export tells what it assumed of sizes that it was to leave open.
    """
    if not tried:
        return []
    shapes = [shape_for(each.channels, each.rank, channels_last=each.channels_last) for each in tried]
    axes = [[*range(each.rank - 1)] if each.channels_last else [0, *range(2, each.rank)] for each in tried]
    side_by_side = _SideBySide([each.layer for each in tried]).eval()
    examples = Examples.of("adopt", side_by_side, [torch.randn(shape, dtype=torch.float64) for shape in shapes])
    places = [(place, axis) for place, of in enumerate(axes) for axis in of]
    sizes = Sizes(tuple(shapes), tuple({place: 1} for place in places))
    try:
        program = trace(side_by_side, examples, None, sizes=sizes, deterministic=False)
    except ModelError as error:
        if len(tried) > 1:
            return [why for each in tried for why in for_all_sizes([each])]
        return [f"it cannot be traced for all sizes ({error.problem})"]
    found = [""] * len(tried)
    for guard in program._guards_code or ():
        for place in map(int, _INPUT.findall(guard)):
            found[place] = f"{AT_OTHER_SIZES} ({_INPUT.sub('x', guard).replace('.size()', '.shape')})"
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    for place, axis in places:
        if not isinstance(inputs[place].meta["val"].shape[axis], torch.SymInt):
            found[place] = f"{AT_OTHER_SIZES} (it takes x.shape[{axis}] for a number)"
    for name in program.graph_signature.buffers_to_mutate.values():
        found[int(name.split(".")[1])] = STATEFUL
    return found


class _SideBySide(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


class _Walks:
    """The formulas of a graph's outputs, each of one input."""

    def __init__(self, graph: ir.Graph) -> None:
        from deploynorm.rewrite.values import Values

        self._graph = graph
        self._values = Values(_OPSET)
        self._order = {node: place for place, node in enumerate(graph)}

    def formula(self, place: int, space: frozenset[int], start: Any) -> tuple[Any, str]:
        """The formula of an output where it is the operator's, else None and the reason."""
        from deploynorm.rewrite.operators import RULES
        from deploynorm.rewrite.walk import Walk

        x, y = self._graph.inputs[place], self._graph.outputs[place]
        walk = Walk(self._values, x, space, self._order, RULES, start=start)
        formula = walk.formulas.get(y)
        if formula is None:
            return None, next(iter(walk.refused.values()), "its output does not depend on its input")
        if not formula.finished or formula.layout != walk.formulas[x].layout:
            return None, "its output is not x times the mean of its square to the power -0.5"
        if start.exponent == 0 and not (formula.eps > 0).all():
            return None, "its epsilon is not positive"
        return formula, ""


def _numbers(walks: _Walks, place: int, tried: Tried) -> Numbers:
    from deploynorm.rewrite.formula import Formula

    space = frozenset(range(1, tried.rank - 1) if tried.channels_last else range(2, tried.rank))
    frn, why = walks.formula(place, space, Formula((), power=1))
    affine, _ = walks.formula(place, space, Formula((), power=1, exponent=-0.5))
    formula = frn or affine
    if formula is None:
        raise UnrecognizedError(why)
    given = (formula.scale, formula.shift, formula.tau, formula.eps)
    if tried.rank == 3 and all(np.ndim(each) == 0 for each in given):
        raise UnrecognizedError("of three axes only a parameter for each of them could tell the channels")
    scale, shift, tau, eps = (np.broadcast_to(np.asarray(each, np.float64), tried.channels) for each in given)
    return Numbers(scale, shift, tau, None if frn is None else eps, tried.channels_last)


def same_numbers(a: Array, b: Sequence[float] | Array | float, rtol: float = 1e-6) -> bool:
    """Whether they are equal but for rounding in float32."""
    return bool(np.allclose(a, b, rtol=rtol, atol=1e-12))


def shortest(number: float) -> float:
    """The number, or where it is one of float32 the shortest that rounds to it: 1e-05 and not 9.999999747378752e-06."""
    rounded = np.float32(number)
    return float(str(rounded)) if float(rounded) == number else float(number)
