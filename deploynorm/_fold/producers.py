"""Decides which convolution or linear layer each batch normalization can fold into.

The decision is made on the graph that torch.export sees, by parameters and data flow, and never on names or on the
order in which modules are defined.
"""

from __future__ import annotations

from typing import get_args

from torch import fx, nn

from deploynorm.trace import LINEAR_OPERATORS, TraceReader, has_hooks, operator_name

Foldable = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
"""The layers that take over a scale and a shift per output channel."""


class NotFoldableError(Exception):
    """A normalization cannot be folded; its text is the reason in the report."""


class Producers:
    """Finds the layers that can take over the batch normalizations of a traced network.

    A normalization folds where each of these holds, for every one of its calls:

    1. It is called by its own forward, and nothing else reads its parameters or statistics.
    2. It reads a convolution, transposed convolution or linear layer, directly or through normalizations that have
       been folded.
    3. That layer is a module of torch.nn with the forward of its class, its weight is stored, and it has no hooks.
    4. The layer is called once, nothing else reads its parameters, and nothing else reads its output.
    5. The layer's channels are on axis 1, which the normalization scales.
    """

    def __init__(self, trace: TraceReader) -> None:
        self._trace = trace
        self._folded: set[fx.Node] = set()

    def mark_folded(self, norm: nn.Module) -> None:
        """Notes that a normalization is gone: one behind it reads the layer before it from now on."""
        self._folded.update(self._trace.calls(norm))

    def of(self, norm: nn.Module) -> list[Foldable]:
        """The layers that can take over a BatchNorm layer in evaluation mode, one for each call.

        Each is called once, and the normalization alone reads its output.

        Raises:
            NotFoldableError: There are none.
        """
        if reader := self._trace.foreign_reader(norm):  # case 1
            raise NotFoldableError(f"its parameters or statistics are used outside its own forward, by {reader}")
        found = [self._producer(call) for call in self._trace.calls(norm)]
        if not found:
            raise NotFoldableError("it is not reached from the network's inputs")
        if len(set(found)) < len(found):  # case 4
            raise NotFoldableError("the layer before it is called several times")
        return found

    def _producer(self, call: fx.Node) -> Foldable:
        trace = self._trace
        source = call.args[0]
        assert isinstance(source, fx.Node)
        while source in self._folded and len(trace.readers(source)) == 1:  # case 2
            source = source.args[0]
            assert isinstance(source, fx.Node)
        name = operator_name(source)
        if source.target not in LINEAR_OPERATORS:
            origin = name if source.op == "placeholder" else f"the output of {name}"
            raise NotFoldableError(f"it normalizes {origin}, not that of a convolution or linear layer")
        layer = trace.module(source)
        if layer is None or not isinstance(layer, Foldable):  # case 3
            raise NotFoldableError(f"the {name} before it is a functional call, not a layer")
        if source.args[1] not in trace.stored(layer, "weight"):
            raise NotFoldableError(f"the weight of the {name} before it is computed, not stored")
        if layer.bias is not None and not trace.stored(layer, "bias"):
            raise NotFoldableError("the bias of the layer before it is computed, not stored")
        if not _is_stock(layer):
            raise NotFoldableError(f"the layer before it is a {type(layer).__name__} with a forward of its own")
        if has_hooks(layer):
            raise NotFoldableError("the layer before it has hooks")
        if (count := len(trace.readers_of(layer, "weight"))) > 1:  # case 4
            raise NotFoldableError(f"the layer before it is called {count} times")
        if reader := trace.foreign_reader(layer):
            raise NotFoldableError(f"the bias of the layer before it is read elsewhere too, by {reader}")
        if (count := len(trace.readers(source))) > 1:
            raise NotFoldableError(f"the output of the layer before it is used {count} times")
        if source.meta["val"].dim() != LINEAR_OPERATORS[source.target]:  # case 5
            raise NotFoldableError("the layer before it has its channels on another axis")
        return layer


def _is_stock(layer: Foldable) -> bool:
    base = next(kind for kind in get_args(Foldable) if isinstance(layer, kind))
    same_forward = type(layer).forward is base.forward
    return same_forward and getattr(type(layer), "_conv_forward", None) is getattr(base, "_conv_forward", None)
