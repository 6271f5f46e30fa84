"""Reads from a traced network which convolution or linear layer each batch normalization can fold into.

The decision is made on the graph that torch.export sees, by parameters and data flow, and never on names or on the
order in which modules are defined.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import fx, nn
from torch.export import ExportedProgram

__all__ = ["Foldable", "LayerGraph", "Refusal", "has_hooks"]

_aten = torch.ops.aten

# Operator -> rank of its output with a batch axis. A linear layer has its channels on axis 1 in this rank alone.
_RANKS = {
    _aten.linear.default: 2,
    _aten.conv1d.default: 3,
    _aten.conv1d.padding: 3,
    _aten.conv_transpose1d.default: 3,
    _aten.conv2d.default: 4,
    _aten.conv2d.padding: 4,
    _aten.conv_transpose2d.input: 4,
    _aten.conv3d.default: 5,
    _aten.conv3d.padding: 5,
    _aten.conv_transpose3d.input: 5,
}

Foldable = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
"""The layers that take over a scale and a shift per output channel."""


@dataclass(frozen=True)
class Refusal:
    """Why a normalization stays as it is, in words that stand after its name."""

    reason: str


class LayerGraph:
    """A traced network, asked about its modules.

    Args:
        model: The network.
        program: Its trace.
    """

    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        self._model = model
        self._position = {node: position for position, node in enumerate(program.graph.nodes)}
        self._folded: set[fx.Node] = set()
        signature = program.graph_signature
        self._placeholders: dict[int, list[fx.Node]] = {}
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._tensor_of: dict[str, str] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in names:
                self._tensor_of[node.name] = names[node.name]
                tensor = _get_tensor(model, names[node.name])
                self._placeholders.setdefault(id(tensor), []).append(node)

    def in_order(self, norms: Iterable[nn.Module]) -> list[nn.Module]:
        """The normalizations in the order in which they are first called; those never called come last."""

        def first_call(norm: nn.Module) -> int:
            return min((self._position[call] for call in self._calls(norm, "running_var")), default=len(self._position))

        return sorted(norms, key=first_call)

    def mark_folded(self, norm: nn.Module) -> None:
        """Tells that a normalization is gone, so that one after it may see the layer before it."""
        self._folded.update(self._calls(norm, "running_var"))

    def producers(self, norm: nn.Module) -> list[Foldable] | Refusal:
        """The layers that can take over a batch normalization, one for each time it is called.

        Args:
            norm: A BatchNorm layer in evaluation mode.

        Returns:
            Layers of torch.nn, each called once, whose only consumer is the normalization; or why there are none.
        """
        calls = self._calls(norm, "running_var")
        if not calls:
            return Refusal("it is not reached from the network's inputs")
        found = []
        for call in calls:
            producer = self._producer(norm, call)
            if isinstance(producer, Refusal):
                return producer
            found.append(producer)
        if len(set(found)) < len(found):
            return Refusal("the layer before it is called several times")
        return found

    def _producer(self, norm: nn.Module, call: fx.Node) -> Foldable | Refusal:
        if call.target is not _aten.batch_norm.default or self._module_of(call) is not norm:
            return Refusal(f"its statistics are used outside its own forward, by {_name(call)}")
        source = call.args[0]
        assert isinstance(source, fx.Node)
        while source in self._folded and len(source.users) == 1:
            source = source.args[0]
            assert isinstance(source, fx.Node)
        if source.target not in _RANKS:
            origin = "the network's input" if source.op == "placeholder" else f"the output of {_name(source)}"
            return Refusal(f"it normalises {origin}, not that of a convolution or linear layer")
        weight = source.args[1]
        assert isinstance(weight, fx.Node)
        layer = self._module_of(source)
        if layer is None or not isinstance(layer, Foldable):
            return Refusal(f"the {_name(source)} before it is a functional call, not a layer")
        path = self._tensor_of.get(weight.name)
        if path is None or _get_tensor(self._model, path) is not layer._parameters.get("weight"):
            return Refusal(f"the weight of the {_name(source)} before it is computed, not stored")
        if not _is_stock(layer):
            return Refusal(f"the layer before it is a {type(layer).__name__} with a forward of its own")
        if has_hooks(layer):
            return Refusal("the layer before it has hooks")
        if len(self._calls(layer, "weight")) > 1:
            return Refusal(f"the layer before it is called {len(self._calls(layer, 'weight'))} times")
        if len(source.users) > 1:
            return Refusal(f"the output of the layer before it is used {len(source.users)} times")
        if source.meta["val"].dim() != _RANKS[source.target]:
            return Refusal("the layer before it has its channels on another axis")
        return layer

    def _calls(self, module: nn.Module, tensor: str) -> list[fx.Node]:
        """The operators that read a parameter or buffer of the module."""
        value = getattr(module, tensor)
        if value is None:
            return []
        nodes = self._placeholders.get(id(value), [])
        return [user for node in nodes for user in node.users]

    def _module_of(self, node: fx.Node) -> nn.Module | None:
        """The module whose forward called the operator itself."""
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return None
        path, _ = list(stack.values())[-1]
        # torch marks the second call of a module as "path@1".
        return self._model.get_submodule(path.split("@")[0])


def has_hooks(module: nn.Module) -> bool:
    """Whether code of the user's runs around the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_stock(layer: Foldable) -> bool:
    base = next(kind for kind in get_args(Foldable) if isinstance(layer, kind))
    same_forward = type(layer).forward is base.forward
    return same_forward and getattr(type(layer), "_conv_forward", None) is getattr(base, "_conv_forward", None)


def _get_tensor(model: nn.Module, path: str) -> torch.Tensor:
    owner, _, name = path.rpartition(".")
    tensor = getattr(model.get_submodule(owner), name)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _name(node: fx.Node) -> str:
    """The operator in a user's words: `add` for aten.add.Tensor."""
    if node.op == "output":
        return "the network's output"
    target = node.target
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else str(target)
