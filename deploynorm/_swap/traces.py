"""Runs and traces a network, and tells which of its modules called which operator and who reads the result."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from deploynorm import trace as tracing  # as a module: it may be on its way in already, for it takes our layers
from deploynorm.errors import InputError, ModelError

__all__ = ["Observed", "Trace", "observe", "operator_name"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Observed:
    """A network as it ran on the example inputs.

    Attributes:
        modules: The modules of the copy that ran, by path; a shared one under its first.
        traces: In evaluation mode and in training mode.
        untraced: Why there is none; nothing is provable then.
    """

    modules: dict[str, nn.Module]
    traces: tuple[Trace, ...] = ()
    untraced: str = ""


class Trace:
    """One trace of a network, asked about its modules."""

    def __init__(self, model: nn.Module, program: ExportedProgram, forwards: Counter[nn.Module]) -> None:
        self._forwards = forwards
        by_path = dict(model.named_modules(remove_duplicate=False))
        self._module: dict[fx.Node, nn.Module] = {}
        self._calls: dict[nn.Module, list[fx.Node]] = {}
        for node in program.graph.nodes:
            stack = node.meta.get("nn_module_stack")
            if node.op != "call_function" or not stack:
                continue
            # torch may mark the second call of a module as "path@1".
            module = by_path.get(list(stack.values())[-1][0].split("@")[0])
            if module is not None:
                self._module[node] = module
                self._calls.setdefault(module, []).append(node)
        signature = program.graph_signature
        self._parameters = {
            node for node in program.graph.nodes if node.op == "placeholder" and node.name not in signature.user_inputs
        }
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._readers = {
            id(tensors[names[node.name]]): list(node.users)
            for node in program.graph.nodes
            if node.op == "placeholder" and names.get(node.name) in tensors
        }

    def calls(self, module: nn.Module) -> list[fx.Node]:
        """The operators that the module's own forward called."""
        return self._calls.get(module, [])

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module whose forward called the operator itself."""
        return self._module.get(node)

    def normalization(self, node: fx.Node) -> nn.Module | None:
        """The module whose forward called a batch normalization, or None where the operator is another."""
        return self._module.get(node) if node.target is _aten.batch_norm.default else None

    def all_calls_seen(self, relu: nn.Module) -> bool:
        """Whether the layer's forward ran as often as it was called; code may call `forward` past `__call__`."""
        return self._forwards[relu] == len(self.calls(relu))

    def strange_reader(self, module: nn.Module) -> str | None:
        """An operator outside the module's own forward that reads one of its parameters or buffers."""
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            for node in self._readers.get(id(tensor), []):
                if self.module(node) is not module:
                    return operator_name(node)
        return None

    def input_shapes(self, norm: nn.Module) -> list[torch.Size]:
        """The shape of what a normalization reads at each call."""
        return [call.args[0].meta["val"].shape for call in self.calls(norm)]  # type: ignore[union-attr]

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """What an operator computes with: for a normalization what it normalises, else every tensor but parameters."""
        nodes = node.all_input_nodes[:1] if self.normalization(node) else node.all_input_nodes
        return [
            source for source in nodes if source not in self._parameters and isinstance(source.meta.get("val"), Tensor)
        ]

    @staticmethod
    def readers(node: fx.Node) -> list[fx.Node]:
        """The operators that read the values of an output, and not its size alone."""
        return [user for user in node.users if user.target is not _aten.sym_size.int]


def observe(model: nn.Module, example_inputs: Sequence[Tensor], relus: Iterable[str]) -> Observed:
    """Runs and traces a copy of the network, in evaluation and in training mode; the batch size stays free.

    Args:
        model: Any network; it is left untouched.
        example_inputs: Positional inputs of forward.
        relus: Paths of the ReLUs: their calls are counted, and the traces show who reads what one in place changes.

    Raises:
        InputError: An example input is not a tensor.
        ModelError: The network cannot be copied, or does not run on the example inputs.
    """
    for position, example in enumerate(example_inputs):
        if not isinstance(example, Tensor):
            raise InputError("swap", f"example input {position} is not a tensor", got=type(example).__name__)
    twin = tracing.inference_copy(model)
    modules = dict(twin.named_modules())
    watched = [relu for path in relus if isinstance(relu := modules.get(path), nn.ReLU)]
    examples = [example.detach().cpu().clone() for example in example_inputs]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the network's own code warns of, it will say again in training
        try:
            twin(*examples)
        except Exception as error:
            raise ModelError(
                f"swap of {type(model).__name__}",
                f"the network does not run on the example inputs: {type(error).__name__}: {tracing.first_line(error)}",
                got="inputs of shape " + ", ".join(str(tuple(example.shape)) for example in examples),
                fix="pass the tensors that its forward takes",
            ) from error
        traces = _trace_both_modes(twin, examples, watched)
    return Observed(modules, untraced=traces) if isinstance(traces, str) else Observed(modules, traces)


def _trace_both_modes(
    model: nn.Module, examples: Sequence[Tensor], relus: Sequence[nn.ReLU]
) -> tuple[Trace, ...] | str:
    """The traces, or why there is none that shows all that the network may do."""
    sizes = tracing.find_sizes(model, examples)
    if "batch" in sizes.kinds and any(len(example) == 1 for example in examples if example.dim()):
        # A trace takes a size of 1 for a constant.
        examples = [torch.cat([example, example[:1]]) if example.dim() else example for example in examples]
    traces = []
    for mode in ("evaluation", "training"):
        if mode == "training":
            _train_but_for_norms(model)
        try:
            forwards = _count_forwards(model, examples, relus)
            with _not_in_place(relus):
                program = tracing.trace(model, examples, fixed=("spatial",), sizes=sizes)
        except ModelError as error:
            return f"it cannot be traced in {mode} mode ({error.problem})"
        except Exception as error:  # the network's own code fails here, with any type
            return f"it does not run in {mode} mode ({type(error).__name__}: {tracing.first_line(error)})"
        if any(isinstance(module, fx.GraphModule) for module in program.graph_module.children()):
            return "parts of it run under conditions or in loops (torch.cond and the like)"
        narrowed = [axis.told for axis in tracing.narrowed_axes(program)]
        if narrowed := narrowed or (_fixed_batches(program) if "batch" in sizes.kinds else []):
            return f"it may take other ways for other batch sizes ({'; '.join(narrowed)})"
        traces.append(Trace(model, program, forwards))
    return tuple(traces)


def _fixed_batches(program: ExportedProgram) -> list[str]:
    """The inputs for whose batch size alone a trace holds: where code makes a plain number of it, as len(x) does."""
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    batches = [(node.name, node.meta["val"].shape[0]) for node in inputs if node.meta["val"].dim()]
    return [
        f"axis 0 of {name}: {size} alone"
        for name, size in batches
        if isinstance(size, int) or size.node.maybe_as_int() is not None
    ]


def operator_name(node: fx.Node) -> str:
    """The operator in a user's words: `add` for aten.add_.Tensor."""
    if node.op in ("output", "placeholder"):
        return f"the network's {'output' if node.op == 'output' else 'input'}"
    target = node.target
    name = target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else str(target)
    return name.rstrip("_")


def _train_but_for_norms(model: nn.Module) -> None:
    """Training mode, in which normalization does not refuse a batch of one or wait for other processes."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False


def _count_forwards(model: nn.Module, examples: Sequence[Tensor], layers: Iterable[nn.Module]) -> Counter[nn.Module]:
    """Runs the network and counts how often each layer's forward ran, however it was called."""
    counts: Counter[nn.Module] = Counter()
    with _each_forward_counted(layers, counts):
        model(*examples)
    return counts


@contextmanager
def _each_forward_counted(layers: Iterable[nn.Module], counts: Counter[nn.Module]) -> Iterator[None]:
    def counted(layer: nn.Module) -> Any:
        def forward(*args: Any) -> Any:
            counts[layer] += 1
            return type(layer).forward(layer, *args)

        return forward

    layers = list(layers)
    for layer in layers:
        layer.forward = counted(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _not_in_place(relus: Iterable[nn.ReLU]) -> Iterator[None]:
    """A trace shows what is read behind a ReLU in place as its result, whether it was read so or past it."""
    in_place = [relu for relu in relus if relu.inplace]
    for relu in in_place:
        relu.inplace = False
    try:
        yield
    finally:
        for relu in in_place:
            relu.inplace = True
