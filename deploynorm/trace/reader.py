"""One trace of a network, asked about the network's modules: who calls which operator, and who reads what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

_aten = torch.ops.aten


def aten_operators(names: str) -> frozenset[object]:
    """All forms of torch's operators of these names, those in place too: "add cat" has aten.add_.Tensor."""
    forms = [form for name in names.split() for form in (name, f"{name}_") if hasattr(_aten, form)]
    packets = [getattr(_aten, form) for form in forms]
    return frozenset(getattr(packet, overload) for packet in packets for overload in packet.overloads())


LINEAR_OPERATORS = dict.fromkeys(aten_operators("linear"), 2) | {
    operator: 2 + spatial
    for spatial in (1, 2, 3)
    for operator in aten_operators(f"conv{spatial}d conv_transpose{spatial}d")
}
"""Linear layers and convolutions -> rank of an output with the batch on axis 0 and the channels on axis 1."""


class TraceReader:
    """Answers questions about a network as it was when it was traced, once or several times.

    A call is an operator that a module's own forward calls: those of its children are theirs.
    """

    def __init__(self, model: nn.Module, *programs: ExportedProgram) -> None:
        by_path = dict(model.named_modules(remove_duplicate=False))
        tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
        self._module: dict[fx.Node, nn.Module] = {}
        self._calls: dict[nn.Module, list[fx.Node]] = {}
        self._not_activations: set[fx.Node] = set()
        nodes: dict[int, list[fx.Node]] = {}
        for program in programs:
            signature = program.graph_signature
            stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
            for node in program.graph.nodes:
                if node.op == "placeholder" and node.name not in signature.user_inputs:
                    self._not_activations.add(node)
                    if stored.get(node.name) in tensors:
                        nodes.setdefault(id(tensors[stored[node.name]]), []).append(node)
                stack = node.meta.get("nn_module_stack")
                if node.op == "call_function" and stack:
                    # torch may mark the second call of a module as "path@1".
                    module = by_path.get(list(stack.values())[-1][0].split("@")[0])
                    if module is not None:
                        self._module[node] = module
                        self._calls.setdefault(module, []).append(node)
        # By module and name, since a parameter may be replaced once the network is traced.
        self._stored = {
            (module, name): nodes.get(id(tensor), [])
            for module in model.modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
        }

    @property
    def called(self) -> Iterable[nn.Module]:
        """The modules that are called, in order of their first calls."""
        return self._calls

    def calls(self, module: nn.Module) -> list[fx.Node]:
        """The operators that the module's own forward calls, in order."""
        return self._calls.get(module, [])

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module whose own forward calls the operator."""
        return self._module.get(node)

    def normalization(self, node: fx.Node) -> nn.Module | None:
        """The module whose forward calls this batch normalization; None where the operator is another."""
        return self.module(node) if node.target is _aten.batch_norm.default else None

    def input_shapes(self, module: nn.Module) -> list[torch.Size]:
        """Shape of the first operand of each call of the module."""
        return [call.args[0].meta["val"].shape for call in self.calls(module)]  # type: ignore[union-attr]

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The activations that an operator reads: of a normalization what it normalizes, else all but parameters."""
        nodes = node.all_input_nodes[:1] if self.normalization(node) else node.all_input_nodes
        return [x for x in nodes if x not in self._not_activations and isinstance(x.meta.get("val"), Tensor)]

    @staticmethod
    def readers(node: fx.Node) -> list[fx.Node]:
        """The operators that read the values of an output, and not only its size."""
        return [user for user in node.users if user.target is not _aten.sym_size.int]

    def stored(self, module: nn.Module, name: str) -> list[fx.Node]:
        """The placeholders of a parameter or buffer that the module holds under this name."""
        return self._stored.get((module, name), [])

    def readers_of(self, module: nn.Module, name: str) -> list[fx.Node]:
        """The operators that read a parameter or buffer of the module, whoever calls them."""
        return [user for node in self.stored(module, name) for user in node.users]

    def foreign_reader(self, module: nn.Module) -> str | None:
        """The name of an operator outside the module's own forward that reads one of its parameters or buffers."""
        for name in (*module._parameters, *module._buffers):
            for node in self.readers_of(module, name):
                if self.module(node) is not module:
                    return operator_name(node)
        return None


def operator_name(node: fx.Node) -> str:
    """The operator in a user's words: `add` for aten.add_.Tensor."""
    if node.op in ("output", "placeholder"):
        return f"the network's {'output' if node.op == 'output' else 'input'}"
    target = node.target
    name = target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else str(target)
    return name.rstrip("_")


def walk(
    calls: Iterable[fx.Node], step: Callable[[fx.Node], list[fx.Node]], through: Collection[object]
) -> Iterator[fx.Node]:
    """Where a walk through a trace ends, nearest first.

    It starts at `calls`, `step` gives the operators next to one (its readers, or its inputs), and it goes on behind
    those whose kind is in `through`.
    """
    seen: set[fx.Node] = set()
    waiting = [node for call in calls for node in step(call)]
    while waiting:
        node = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node.target in through:
            waiting += step(node)
        else:
            yield node


def has_hooks(module: nn.Module, *, backward: bool = False) -> bool:
    """Whether hooks run around the module's forward or, with `backward`, for a layer to be trained, its backward."""
    hooks = [module._forward_hooks, module._forward_pre_hooks]
    if backward:
        hooks += [module._backward_hooks, module._backward_pre_hooks]
    return any(hooks)
