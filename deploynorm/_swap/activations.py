"""Decides for each ReLU of a network whether it goes into the FRN before it, or becomes a TLU layer of its own.

The decision is made on the traced graphs, by data flow, and never on names or on the order in which modules are
defined: a ReLU module may be called in many places, and what a normalization gives may be read twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx, nn

from deploynorm._swap.observing import Observed
from deploynorm.trace import TraceReader, aten_operators, has_hooks, operator_name, walk

_aten = torch.ops.aten

RELU = aten_operators("relu")

Thresholds = Literal["own", "all", "none"]
"""Which ReLUs become TLUs: only those that are a normalization's own, all that a normalization reaches, or none."""

CARRIES = aten_operators(
    "add mul cat dropout feature_dropout avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
)
"""Operators that pass on a shift of their input, and leave the channels on their axis."""

_MAY_ALIAS = aten_operators("dropout feature_dropout") | {_aten.relu_.default, _aten.add_.Tensor, _aten.mul_.Tensor}
"""Operators whose result may lie in the memory of their first input."""


@dataclass
class Activations:
    """What becomes of the ReLU modules."""

    # ReLU -> the normalizations whose own it is
    absorbed: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    # ReLU -> the channels of the TLU layer that takes its place, and the normalizations that reach it
    tlus: dict[nn.Module, tuple[int, list[nn.Module]]] = field(default_factory=dict)
    # ReLU -> why it stays
    stays: dict[nn.Module, str] = field(default_factory=dict)


_Read = nn.Module | str
"""What one call of a ReLU reads: the normalization that it alone reads, or the reason why there is none."""


def decide(
    observed: Observed, relus: Iterable[nn.ReLU], norms: Collection[nn.Module], thresholds: Thresholds
) -> Activations:
    """Decides on every nn.ReLU module, subclasses among them, of a network in which `norms` become FRN.

    1. A ReLU stays where no thresholds are asked for, where the network is not traced, and where it is a subclass,
       has hooks, is not reached, or has its `forward` called directly.
    2. It is a normalization's own, and is absorbed, where in every trace each of its calls is the only reader of a
       call of a normalization, and each call of that normalization is read by such a ReLU alone. A module that is
       called behind several normalizations is the own of each, as long as it is called nowhere else.
    3. It stays where it changes in place a value that others read.
    4. With thresholds="all" it becomes a TLU layer where the values of a normalization reach it, directly or through
       additions, products, concatenation and pooling, and where it has one place in the network.
    5. Every other ReLU stays.
    """
    trace = observed.trace
    found = Activations()
    reads: dict[nn.ReLU, list[_Read]] = {}
    for relu in relus:
        if reason := _unfit(relu, observed, thresholds):  # case 1
            found.stays[relu] = reason
        else:
            reads[relu] = [_read(call, trace, norms) for call in trace.calls(relu)]
    own = _own(reads, trace)
    for relu, read in reads.items():
        if relu in own:  # case 2
            found.absorbed[relu] = list(dict.fromkeys(norm for norm in read if isinstance(norm, nn.Module)))
        elif relu in observed.in_place and any(map(_changes_what_others_read, trace.calls(relu))):  # case 3
            found.stays[relu] = "it changes in place a value that others read"
        elif thresholds == "all" and (tlu := _separate_tlu(relu, observed.traces, norms)):  # case 4
            found.tlus[relu] = tlu
        else:  # case 5
            reasons = [reason for reason in read if isinstance(reason, str)]
            why = reasons[0] if reasons else "the normalization before it is called elsewhere without it"
            times = max(len(single.calls(relu)) for single in observed.traces)
            found.stays[relu] = f"it is called {times} times, and once {why}" if times > 1 else why
    return found


def _unfit(relu: nn.Module, observed: Observed, thresholds: Thresholds) -> str:
    """Why a ReLU stays whatever stands around it; empty where nothing rules it out."""
    if thresholds == "none":
        return "no thresholds were asked for"
    if observed.untraced:
        return "the network is not traced"
    if type(relu) is not nn.ReLU:
        return f"a {type(relu).__name__} may do more than a ReLU"
    if has_hooks(relu, backward=True):
        return "it has hooks"
    if not observed.trace.calls(relu):
        return "it is not reached from the example inputs"
    if relu in observed.bypassed:
        return "its forward is called directly, which bypasses the module"
    return ""


def _read(call: fx.Node, trace: TraceReader, norms: Collection[nn.Module]) -> _Read:
    source = call.args[0]
    assert isinstance(source, fx.Node)
    norm = trace.normalization(source)
    if norm is None or norm not in norms:
        return f"it reads {operator_name(source)}"
    others = [operator_name(reader) for reader in trace.readers(source) if reader is not call]
    return f"what it reads is read by {' and '.join(others)} too" if others else norm


def _own(reads: Mapping[nn.ReLU, list[_Read]], trace: TraceReader) -> set[nn.ReLU]:
    """The ReLUs of case 2: each reads only normalizations, and none of these is called elsewhere without its ReLU."""
    own = {relu for relu, read in reads.items() if all(isinstance(norm, nn.Module) for norm in read)}
    while True:
        norms = {norm for relu in own for norm in reads[relu] if isinstance(norm, nn.Module)}
        whole = {norm for norm in norms if own.issuperset(_relus_behind(norm, trace))}
        left = {relu for relu in own if not whole.issuperset(reads[relu])}
        if not left:
            return own
        own -= left


def _relus_behind(norm: nn.Module, trace: TraceReader) -> Iterator[nn.Module | None]:
    """For each call of a normalization the ReLU module that alone reads it, or None."""
    for call in trace.calls(norm):
        readers = trace.readers(call)
        yield trace.module(readers[0]) if len(readers) == 1 and readers[0].target in RELU else None


def _separate_tlu(
    relu: nn.Module, traces: Sequence[TraceReader], norms: Collection[nn.Module]
) -> tuple[int, list[nn.Module]] | None:
    """The TLU of case 4 for the place of the ReLU, or None where there is none."""
    channels: set[object] = set()
    reached: dict[nn.Module, None] = {}
    for trace in traces:
        calls = trace.calls(relu)
        before = [_norms_before(call, trace, norms) for call in calls]
        if any(found.keys() != before[0].keys() for found in before):
            return None
        # A block that runs several times runs its normalizations and its ReLU equally often.
        if any(len(trace.calls(norm)) != len(calls) for found in before for norm in found):
            return None
        # Stochastic depth hides a normalization in training, so one trace that shows it is enough.
        for found in before:
            reached |= found
        shapes = [call.meta["val"].shape for call in calls]
        channels |= {shape[1] if len(shape) > 1 else None for shape in shapes}
    count = channels.pop() if len(channels) == 1 else None
    return (count, list(reached)) if reached and isinstance(count, int) else None


def _changes_what_others_read(call: fx.Node) -> bool:
    """Whether a ReLU in place writes into values that others read too, who would miss it from a layer that does not."""
    node = call
    while node is call or node.target in _MAY_ALIAS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if len(TraceReader.readers(source)) > 1:
            return True
        node = source
    return False


def _norms_before(call: fx.Node, trace: TraceReader, norms: Collection[nn.Module]) -> dict[nn.Module, None]:
    """The normalizations whose values reach an operator with only operators of CARRIES between."""
    ends = (trace.normalization(node) for node in walk([call], lambda node: node.all_input_nodes, CARRIES))
    return dict.fromkeys(norm for norm in ends if norm is not None and norm in norms)
