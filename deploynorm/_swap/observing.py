"""Runs and traces a copy of the network to be swapped, in evaluation and in training mode."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from deploynorm.errors import ModelError
from deploynorm.quiet import first_line
from deploynorm.trace import Examples, TraceReader, doubled, find_sizes, inference_copy, narrowed_axes, trace


@dataclass(frozen=True)
class Observed:
    """A network as its copy ran on the example inputs."""

    modules: dict[str, nn.Module]  # of the copy, by path; a shared one under its first
    # ReLUs that work in place. They are traced out of place, so that the trace shows who reads their input afterwards.
    in_place: Collection[nn.Module]
    traces: Sequence[TraceReader]  # in evaluation mode and in training mode; none where it cannot be traced
    trace: TraceReader  # both in one
    # ReLUs whose `forward` is called directly somewhere, so that a trace does not show whose call it is.
    bypassed: Collection[nn.Module] = ()
    untraced: str = ""  # why there are no traces; nothing can be proved then


class _UnprovableError(Exception):
    """The traces do not show all that the network may do."""


def observe(model: nn.Module, examples: Examples) -> Observed:
    """Runs and traces a copy of the network, in evaluation and in training mode; the batch size stays dynamic.

    Raises:
        ModelError: The network cannot be copied, or does not run on the example inputs.
    """
    twin = inference_copy(model)
    modules = dict(twin.named_modules())
    examples = examples.replaced(example.detach().cpu().clone() for example in examples)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the network's own code will warn again in training
        try:
            examples.run(twin)
        except Exception as error:
            problem = f"the network does not run on the example inputs: {type(error).__name__}: {first_line(error)}"
            got = "inputs of shape " + ", ".join(str(tuple(example.shape)) for example in examples)
            fix = "pass the tensors that its forward takes"
            raise ModelError(f"swap of {type(model).__name__}", problem, got=got, fix=fix) from error
        relus = [module for module in modules.values() if isinstance(module, nn.ReLU)]
        in_place = {relu for relu in relus if relu.inplace}
        for relu in relus:
            relu.inplace = False
        try:
            programs, bypassed = _trace_both_modes(twin, examples, relus)
        except _UnprovableError as reason:
            return Observed(modules, in_place, (), TraceReader(twin), untraced=str(reason))
    traces = [TraceReader(twin, program) for program in programs]
    return Observed(modules, in_place, traces, TraceReader(twin, *programs), bypassed)


def _trace_both_modes(
    model: nn.Module, examples: Examples, relus: Sequence[nn.ReLU]
) -> tuple[list[ExportedProgram], set[nn.Module]]:
    """The traces, and the ReLUs that are bypassed; raises _UnprovableError with the reason where there are none."""
    sizes = find_sizes(model, examples)
    examples = doubled(examples, sizes.places)
    programs: list[ExportedProgram] = []
    bypassed: set[nn.Module] = set()
    for mode in ("evaluation", "training"):
        if mode == "training":
            model.train()
            for module in model.modules():  # a normalization would refuse a batch of one, or wait for other processes
                module.training &= not isinstance(module, nn.modules.batchnorm._BatchNorm)
        try:
            forwards = _count_forwards(model, examples, relus)
            program = trace(model, examples, fixed=("spatial",), sizes=sizes, deterministic=False)
        except ModelError as error:
            raise _UnprovableError(f"it cannot be traced in {mode} mode ({error.problem})") from error
        except Exception as error:  # the network's own code fails here, with any type
            reason = f"it does not run in {mode} mode ({type(error).__name__}: {first_line(error)})"
            raise _UnprovableError(reason) from error
        if any(isinstance(module, fx.GraphModule) for module in program.graph_module.children()):
            raise _UnprovableError("parts of it run under conditions or in loops (torch.cond and the like)")
        narrowed = [*narrowed_axes(program)] or (_fixed_batches(program) if "batch" in sizes.kinds else [])
        if narrowed:
            raise _UnprovableError(f"it may branch on the batch size ({'; '.join(narrowed)})")
        programs.append(program)
        reader = TraceReader(model, program)
        bypassed |= {relu for relu in relus if forwards[relu] != len(reader.calls(relu))}
    return programs, bypassed


def _fixed_batches(program: ExportedProgram) -> list[str]:
    """The inputs for whose batch size alone a trace holds: where code makes a plain number of it, as len(x) does."""
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    batches = {node.name: node.meta["val"].shape[0] for node in inputs if node.meta["val"].dim()}
    fixed = {name: x for name, x in batches.items() if isinstance(x, int) or x.node.maybe_as_int() is not None}
    return [f"axis 0 of {name}: {size} alone" for name, size in fixed.items()]


def _count_forwards(model: nn.Module, examples: Examples, layers: Sequence[nn.Module]) -> Counter[nn.Module]:
    """Runs the network and counts how often each layer's forward ran, however it was called."""
    counts: Counter[nn.Module] = Counter()

    def forward(layer: nn.Module, *args: Any) -> Any:
        counts[layer] += 1
        return type(layer).forward(layer, *args)

    for layer in layers:
        layer.forward = partial(forward, layer)
    try:
        examples.run(model)
    finally:
        for layer in layers:
            del layer.forward
    return counts
