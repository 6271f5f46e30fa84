"""Runs and traces a copy of the network to be swapped, in evaluation and in training mode."""

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

from deploynorm.errors import ModelError
from deploynorm.trace import TraceReader, find_sizes, first_line, inference_copy, narrowed_axes, trace

__all__ = ["Observed", "observe"]


@dataclass(frozen=True)
class Observed:
    """A network as it ran on the example inputs.

    Attributes:
        modules: The modules of the copy that ran, by path; a shared one under its first.
        traces: In evaluation mode and in training mode.
        bypassed: ReLUs whose `forward` is called directly somewhere, so that a trace does not show whose call it is.
        untraced: Why there are no traces; nothing can be proved then.
    """

    modules: dict[str, nn.Module]
    traces: tuple[TraceReader, ...] = ()
    bypassed: frozenset[nn.Module] = frozenset()
    untraced: str = ""


class _UnprovableError(Exception):
    """The traces do not show all that the network may do."""


def observe(model: nn.Module, examples: Sequence[Tensor], relus: Iterable[str]) -> Observed:
    """Runs and traces a copy of the network, in evaluation and in training mode; the batch size stays dynamic.

    Args:
        model: Any network; it is left untouched.
        examples: Positional inputs of forward.
        relus: Paths of the ReLUs: their calls are counted, and the traces show who reads what one in place changes.

    Raises:
        ModelError: The network cannot be copied, or does not run on the example inputs.
    """
    twin = inference_copy(model)
    modules = dict(twin.named_modules())
    watched = [relu for path in relus if isinstance(relu := modules.get(path), nn.ReLU)]
    examples = [example.detach().cpu().clone() for example in examples]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the network's own code will warn again in training
        try:
            twin(*examples)
        except Exception as error:
            raise ModelError(
                f"swap of {type(model).__name__}",
                f"the network does not run on the example inputs: {type(error).__name__}: {first_line(error)}",
                got="inputs of shape " + ", ".join(str(tuple(example.shape)) for example in examples),
                fix="pass the tensors that its forward takes",
            ) from error
        try:
            return Observed(modules, *_trace_both_modes(twin, examples, watched))
        except _UnprovableError as reason:
            return Observed(modules, untraced=str(reason))


def _trace_both_modes(
    model: nn.Module, examples: Sequence[Tensor], relus: Sequence[nn.ReLU]
) -> tuple[tuple[TraceReader, ...], frozenset[nn.Module]]:
    """The traces, and the ReLUs that are bypassed; raises _UnprovableError with the reason where there are none."""
    sizes = find_sizes(model, examples)
    if "batch" in sizes.kinds and any(len(example) == 1 for example in examples if example.dim()):
        # A trace takes a size of 1 for a constant.
        examples = [torch.cat([example, example[:1]]) if example.dim() else example for example in examples]
    traces: list[TraceReader] = []
    bypassed: set[nn.Module] = set()
    for mode in ("evaluation", "training"):
        if mode == "training":
            _train_but_for_norms(model)
        try:
            forwards = _count_forwards(model, examples, relus)
            with _not_in_place(relus):
                program = trace(model, examples, fixed=("spatial",), sizes=sizes)
        except ModelError as error:
            raise _UnprovableError(f"it cannot be traced in {mode} mode ({error.problem})") from error
        except Exception as error:  # the network's own code fails here, with any type
            reason = f"it does not run in {mode} mode ({type(error).__name__}: {first_line(error)})"
            raise _UnprovableError(reason) from error
        if any(isinstance(module, fx.GraphModule) for module in program.graph_module.children()):
            raise _UnprovableError("parts of it run under conditions or in loops (torch.cond and the like)")
        narrowed = [axis.text for axis in narrowed_axes(program)]
        if narrowed := narrowed or (_fixed_batches(program) if "batch" in sizes.kinds else []):
            raise _UnprovableError(f"it may branch on the batch size ({'; '.join(narrowed)})")
        reader = TraceReader(model, program)
        traces.append(reader)
        bypassed |= {relu for relu in relus if forwards[relu] != len(reader.calls(relu))}
    return tuple(traces), frozenset(bypassed)


def _fixed_batches(program: ExportedProgram) -> list[str]:
    """The inputs for whose batch size alone a trace holds: where code makes a plain number of it, as len(x) does."""
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    batches = [(node.name, node.meta["val"].shape[0]) for node in inputs if node.meta["val"].dim()]
    return [
        f"axis 0 of {name}: {size} alone"
        for name, size in batches
        if isinstance(size, int) or size.node.maybe_as_int() is not None
    ]


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
    """A ReLU in place is traced out of place, so that the trace shows who reads its input after it has run."""
    in_place = [relu for relu in relus if relu.inplace]
    for relu in in_place:
        relu.inplace = False
    try:
        yield
    finally:
        for relu in in_place:
            relu.inplace = True
