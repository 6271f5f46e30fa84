"""Decides for each ReLU of a network whether it goes into the FRN before it, or becomes a TLU layer of its own.

The decision is made on the traced graphs, by data flow, and never on names or on the order in which modules are
defined: a ReLU module may be called in many places, and what a normalization gives may be read twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import fx, nn

from deploynorm._swap.observing import Observed
from deploynorm.trace import TraceReader, has_hooks, operator_name, walk

__all__ = ["CARRIES", "RELU", "Activations", "SeparateTlu", "Thresholds", "decide"]

_aten = torch.ops.aten

RELU = (_aten.relu.default, _aten.relu_.default)

Thresholds = Literal["own", "all", "none"]
"""Which ReLUs become TLUs: only those that are a normalization's own, all that a normalization reaches, or none."""

CARRIES = frozenset(
    {
        _aten.add.Tensor,
        _aten.add_.Tensor,
        _aten.mul.Tensor,
        _aten.mul_.Tensor,
        _aten.cat.default,
        _aten.dropout.default,
        _aten.dropout_.default,
        _aten.feature_dropout.default,
        _aten.feature_dropout_.default,
        _aten.avg_pool1d.default,
        _aten.avg_pool2d.default,
        _aten.avg_pool3d.default,
        _aten.adaptive_avg_pool1d.default,
        _aten.adaptive_avg_pool2d.default,
        _aten.adaptive_avg_pool3d.default,
        _aten.max_pool1d.default,
        _aten.max_pool2d.default,
        _aten.max_pool3d.default,
    }
)
"""Operators that pass on a shift of their input, and leave the channels on their axis."""

_MAY_ALIAS = frozenset(
    {
        _aten.relu_.default,
        _aten.add_.Tensor,
        _aten.mul_.Tensor,
        _aten.dropout.default,
        _aten.dropout_.default,
        _aten.feature_dropout.default,
        _aten.feature_dropout_.default,
    }
)
"""Operators whose result may lie in the memory of their first input."""


class SeparateTlu(NamedTuple):
    """A TLU layer that takes the place of a ReLU."""

    channels: int
    norms: list[nn.Module]
    """The normalizations whose values reach it."""


@dataclass
class Activations:
    """What becomes of the ReLU modules.

    Attributes:
        absorbed: ReLU -> the normalizations whose own it is.
        tlus: ReLU -> the TLU layer that takes its place.
        stays: ReLU -> why it stays.
    """

    absorbed: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    tlus: dict[nn.Module, SeparateTlu] = field(default_factory=dict)
    stays: dict[nn.Module, str] = field(default_factory=dict)


class _Call(NamedTuple):
    """One call of a ReLU: the normalization that it alone reads, or the reason why there is none."""

    norm: nn.Module | None
    reason: str = ""


def decide(
    observed: Observed, relus: Iterable[nn.ReLU], norms: Collection[nn.Module], thresholds: Thresholds
) -> Activations:
    """Decides on every ReLU module.

    1. A ReLU stays where no thresholds are asked for, where the network is not traced, and where it is a subclass,
       has hooks, is not reached, or has its `forward` called directly.
    2. It is a normalization's own, and is absorbed, where in every trace each of its calls is the only reader of a
       call of a normalization, and each call of that normalization is read by such a ReLU alone. A module that is
       called behind several normalizations is the own of each, as long as it is called nowhere else.
    3. It stays where it changes in place a value that others read.
    4. With thresholds="all" it becomes a TLU layer where the values of a normalization reach it, directly or through
       additions, products, concatenation and pooling, and where it has one place in the network.
    5. Every other ReLU stays.

    Args:
        observed: The traces of the network, in both modes.
        relus: Its nn.ReLU modules, subclasses among them.
        norms: The normalizations that become FRN.
        thresholds: Which ReLUs may become TLUs at all.
    """
    traces = observed.traces
    found = Activations()
    calls: dict[nn.ReLU, list[_Call]] = {}
    for relu in relus:
        if reason := _unfit(relu, observed, thresholds):  # case 1
            found.stays[relu] = reason
        else:
            calls[relu] = [_read(call, trace, norms) for trace in traces for call in trace.calls(relu)]
    own = _own(calls, traces)
    for relu in calls:
        if relu in own:  # case 2
            found.absorbed[relu] = list(dict.fromkeys(call.norm for call in calls[relu] if call.norm is not None))
        elif any(_changes_what_others_read(relu, call) for trace in traces for call in trace.calls(relu)):  # case 3
            found.stays[relu] = "it changes in place a value that others read"
        elif thresholds == "all" and (tlu := _separate_tlu(relu, traces, norms)):  # case 4
            found.tlus[relu] = tlu
        else:  # case 5
            found.stays[relu] = _why(relu, calls[relu], traces)
    return found


def _unfit(relu: nn.Module, observed: Observed, thresholds: Thresholds) -> str:
    """Why a ReLU stays whatever stands around it; empty where nothing rules it out."""
    if thresholds == "none":
        return "no thresholds were asked for"
    if not observed.traces:
        return "the network is not traced"
    if type(relu) is not nn.ReLU:
        return f"a {type(relu).__name__} may do more than a ReLU"
    if has_hooks(relu, backward=True):
        return "it has hooks"
    if not any(trace.calls(relu) for trace in observed.traces):
        return "it is not reached from the example inputs"
    if relu in observed.bypassed:
        return "its forward is called directly, which bypasses the module"
    return ""


def _read(call: fx.Node, trace: TraceReader, norms: Collection[nn.Module]) -> _Call:
    source = call.args[0]
    assert isinstance(source, fx.Node)
    norm = trace.normalization(source)
    if norm is None or norm not in norms:
        return _Call(None, f"it reads {operator_name(source)}")
    others = [operator_name(reader) for reader in trace.readers(source) if reader is not call]
    return _Call(None, f"what it reads is read by {' and '.join(others)} too") if others else _Call(norm)


def _own(calls: Mapping[nn.ReLU, list[_Call]], traces: Sequence[TraceReader]) -> set[nn.ReLU]:
    """The ReLUs of case 2: each reads only normalizations, and none of these is called elsewhere without its ReLU."""
    own = {relu for relu in calls if all(call.norm is not None for call in calls[relu])}
    while True:
        read = {call.norm for relu in own for call in calls[relu] if call.norm is not None}
        whole = {norm for norm in read if all(reader in own for reader in _relus_behind(norm, traces))}
        left = {relu for relu in own if not all(call.norm in whole for call in calls[relu])}
        if not left:
            return own
        own -= left


def _relus_behind(norm: nn.Module, traces: Sequence[TraceReader]) -> Iterator[nn.Module | None]:
    """For each call of a normalization the ReLU module that alone reads it, or None."""
    for trace in traces:
        for call in trace.calls(norm):
            readers = trace.readers(call)
            yield trace.module(readers[0]) if len(readers) == 1 and readers[0].target in RELU else None


def _separate_tlu(relu: nn.Module, traces: Sequence[TraceReader], norms: Collection[nn.Module]) -> SeparateTlu | None:
    """The TLU of case 4 for the place of the ReLU, or None where there is none."""
    channels: set[object] = set()
    reached: dict[nn.Module, None] = {}
    for trace in traces:
        calls = trace.calls(relu)
        before = [_norms_before(call, trace, norms) for call in calls]
        if any(set(found) != set(before[0]) for found in before):
            return None
        # A block that runs several times runs its normalizations and its ReLU equally often.
        if any(len(trace.calls(norm)) != len(calls) for found in before for norm in found):
            return None
        # Stochastic depth hides a normalization in training, so one trace that shows it is enough.
        for found in before:
            reached |= dict.fromkeys(found)
        channels |= {shape[1] if len(shape) > 1 else None for shape in (call.meta["val"].shape for call in calls)}
    count = channels.pop() if len(channels) == 1 else None
    return SeparateTlu(count, list(reached)) if reached and isinstance(count, int) else None


def _changes_what_others_read(relu: nn.ReLU, call: fx.Node) -> bool:
    """Whether it writes in place into values that others read too, who would miss it from a layer that does not."""
    node = call
    while relu.inplace and (node is call or node.target in _MAY_ALIAS):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if len(TraceReader.readers(source)) > 1:
            return True
        node = source
    return False


def _norms_before(call: fx.Node, trace: TraceReader, norms: Collection[nn.Module]) -> list[nn.Module]:
    """The normalizations whose values reach an operator with only operators of CARRIES between."""
    ends = (trace.normalization(node) for node in walk([call], lambda node: node.all_input_nodes, CARRIES))
    return list(dict.fromkeys(norm for norm in ends if norm is not None and norm in norms))


def _why(relu: nn.Module, calls: Sequence[_Call], traces: Sequence[TraceReader]) -> str:
    reasons = dict.fromkeys(call.reason for call in calls if call.reason)
    why = next(iter(reasons), "the normalization before it is called elsewhere without it")
    times = max(len(trace.calls(relu)) for trace in traces)
    return f"it is called {times} times, and once {why}" if times > 1 else why
