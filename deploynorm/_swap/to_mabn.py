"""Plans the way from batch normalization to MABN, and from convolutions to CenConv."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from deploynorm._swap.activations import CARRIES
from deploynorm._swap.layers import CENTRED, MABN, Memo, carried_over, centred, like
from deploynorm._swap.plan import Network, Plan, planned, unchanged
from deploynorm._swap.report import Outcome
from deploynorm.trace import LINEAR_OPERATORS, TraceReader, has_hooks, operator_name, walk

__all__ = ["plan_mabn"]

_aten = torch.ops.aten

_CARRIES = CARRIES | {
    _aten.chunk.default,
    _aten.contiguous.default,
    _aten.flatten.using_ints,
    _aten.pad.default,
    _aten.permute.default,
    _aten.reshape.default,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.view.default,
    operator.getitem,
}
"""Operators of CARRIES, and those that move values about."""

_CENTRED_STAYS = _CARRIES - {_aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default}
"""Those of _CARRIES that keep a mean of zero: a maximum is mostly above zero."""


def plan_mabn(network: Network) -> Iterator[Plan]:
    """What becomes of each convolution, and then of each normalization that is swapped.

    1. A convolution becomes CenConv where its output goes only to normalizations that are swapped, and where nothing
       speaks against it: no traces, hooks, a parametrized weight or one that others read, a class that has no CenConv,
       or a fan-in of 1.
    2. Every other convolution stays; a linear layer is reported only where a swapped normalization reads it.
    3. A normalization becomes MABN. It is "swapped" where it reads only layers that are centred, else "partly".
    """
    plain: set[nn.Module] = set()
    for path, layer in network.layers.items():
        if not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)) or isinstance(layer, tuple(CENTRED.values())):
            continue
        seen = network.seen(path)
        ends = dict.fromkeys(end for trace in network.traces for end in _ends(seen, trace, network.seen_norms))
        norms = [end for end in ends if isinstance(end, nn.Module)]
        reason = _not_alone(network, norms, [end for end in ends if isinstance(end, str)])
        reason = reason or _unfit(layer, seen, network.traces)
        if not reason:  # case 1
            yield _plan_conv(layer, path, f"goes to {', '.join(map(network.name, norms))}")
            continue
        plain.add(seen)
        if norms or not isinstance(layer, nn.Linear):  # case 2
            yield unchanged(path, layer, reason)
    for path in network.norms:  # case 3
        yield _plan_norm(network, path, plain)


def _plan_conv(conv: nn.Module, path: str, detail: str) -> Plan:
    assert isinstance(conv, nn.modules.conv._ConvNd)
    return planned(path, conv, "swapped", CENTRED[type(conv)].__name__, detail, lambda memo: centred(conv, memo))


def _plan_norm(network: Network, path: str, plain: Collection[nn.Module]) -> Plan:
    (norm, rank), seen = network.norms[path], network.seen(path)
    kind = MABN[rank]

    def build(memo: Memo) -> nn.Module:
        options = {"eps": norm.eps, "affine": norm.affine, **like(norm, network.model)}
        if norm.momentum is not None:  # a cumulative average, which MABN has not
            options["momentum"] = norm.momentum
        options |= network.options
        return carried_over(norm, kind(norm.num_features, **options), memo)

    sources = dict.fromkeys(source for trace in network.traces for source in _sources(seen, trace))
    names = [source if isinstance(source, str) else network.name(source) for source in sources]
    off_zero = [name for name, source in zip(names, sources, strict=True) if isinstance(source, str) or source in plain]
    outcome: Outcome = "partly"
    if not network.traces:
        detail = "nothing before it is centred: the network is not traced"
    elif not sources:
        detail = "nothing before it is centred: it is not reached from the example inputs"
    elif off_zero:
        detail = f"the mean of its input may be off zero: it reads {' and '.join(off_zero)}, which is not centred"
    else:
        outcome, detail = "swapped", f"behind {', '.join(names)}"
    if norm.momentum is None and "momentum" not in network.options:
        detail += "; the momentum is MABN's own, since the BatchNorm has none"
    return planned(path, norm, outcome, kind.__name__, detail, build)


def _ends(conv: nn.Module, trace: TraceReader, norms: Collection[nn.Module]) -> Iterator[nn.Module | str]:
    """Where the output of a layer goes: to normalizations that are swapped, and to other operators, by name."""
    calls = [call for call in trace.calls(conv) if call.target in LINEAR_OPERATORS]
    for node in walk(calls, trace.readers, _CARRIES):
        norm = trace.normalization(node)
        yield norm if norm is not None and norm in norms else operator_name(node)


def _sources(norm: nn.Module, trace: TraceReader) -> Iterator[nn.Module | str]:
    """Where the input of a normalization comes from: from layers, and from operators that are no layer's, by name."""
    for node in walk(trace.calls(norm), trace.inputs, _CENTRED_STAYS):
        module = trace.module(node) if node.target in LINEAR_OPERATORS else None
        is_layer = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        yield module if module is not None and is_layer else operator_name(node)


def _not_alone(network: Network, norms: Collection[nn.Module], others: Collection[str]) -> str:
    """Why the output of a layer does not go only to MABN; empty where it does."""
    if not network.traces:
        return "the network is not traced"
    if not norms:
        return f"it goes to {' and '.join(others)}" if others else "it is not reached from the example inputs"
    return f"it goes to {' and '.join(others)} too" if others else ""


def _unfit(conv: nn.Module, seen: nn.Module, traces: Iterable[TraceReader]) -> str:
    """Why a layer that only MABN reads cannot be centred; empty where it can be."""
    name = type(conv).__name__
    if has_hooks(conv, backward=True):
        return "it has hooks"
    if parametrize.is_parametrized(conv):
        return "its weight is parametrized"
    if type(conv) not in CENTRED:
        parent = next((kind.__name__ for kind in CENTRED if isinstance(conv, kind)), None)
        return f"a {name} may do more than a {parent}" if parent else f"there is no centred {name}"
    assert isinstance(conv, nn.modules.conv._ConvNd)
    readers = [reader for trace in traces if (reader := trace.foreign_reader(seen)) is not None]
    if readers:
        return f"its weight is read elsewhere too, by {readers[0]}"
    if conv.in_channels // conv.groups * math.prod(conv.kernel_size) == 1:
        return "a fan-in of 1 leaves nothing after centring"
    return ""
