"""Plans the way from batch normalization to MABN, and from convolutions to CenConv."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from deploynorm._swap.activations import CARRIES
from deploynorm._swap.layers import (
    CENTRED,
    MABN,
    Memo,
    carried_over,
    centred,
    has_hooks,
    like,
)
from deploynorm._swap.plan import Network, Plan, left
from deploynorm._swap.report import Change, Outcome
from deploynorm._swap.traces import Trace, operator_name

__all__ = ["plan_mabn"]

_aten = torch.ops.aten

_CONVOLUTIONS = frozenset(
    {
        _aten.conv1d.default,
        _aten.conv1d.padding,
        _aten.conv2d.default,
        _aten.conv2d.padding,
        _aten.conv3d.default,
        _aten.conv3d.padding,
        _aten.conv_transpose1d.default,
        _aten.conv_transpose2d.input,
        _aten.conv_transpose3d.input,
        _aten.linear.default,
    }
)
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
"""The same, and operators that move values about."""
_CENTRED_STAYS = _CARRIES - {_aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default}
"""Those behind which the mean of what was centred is no further off: a maximum is mostly above zero."""


def plan_mabn(network: Network) -> Iterator[Plan]:
    """What becomes of each convolution, and then of each normalization that is swapped."""
    plain: set[nn.Module] = set()
    for path, layer in network.layers.items():
        if not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)) or isinstance(layer, tuple(CENTRED.values())):
            continue
        seen = network.seen(path)
        ends = dict.fromkeys(end for trace in network.traces for end in _ends(seen, trace, network.seen_norms))
        norms = [end for end in ends if isinstance(end, nn.Module)]
        reason = _not_alone(network, norms, [end for end in ends if isinstance(end, str)])
        reason = reason or _unfit(layer, seen, network.traces)
        if reason:
            plain.add(seen)
            if norms or not isinstance(layer, nn.Linear):  # a classifier needs no word
                yield left(path, layer, reason)
        else:
            yield _plan_conv(layer, path, f"goes to {', '.join(map(network.told, norms))}")
    for path in network.norms:
        yield _plan_norm(network, path, plain)


def _plan_conv(conv: nn.Module, path: str, detail: str) -> Plan:
    assert isinstance(conv, nn.modules.conv._ConvNd)
    change = Change(path, type(conv).__name__, "swapped", CENTRED[type(conv)].__name__, detail)
    return Plan(change, lambda memo: centred(conv, memo))


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
    told = [source if isinstance(source, str) else network.told(source) for source in sources]
    off_zero = [name for name, source in zip(told, sources, strict=True) if isinstance(source, str) or source in plain]
    outcome: Outcome = "partly"
    if not network.traces:
        detail = "nothing before it is centred: the network is not traced"
    elif not sources:
        detail = "nothing before it is centred: it is not reached from the example inputs"
    elif off_zero:
        detail = f"its input may be off zero: it reads {' and '.join(off_zero)}, which is not centred"
    else:
        outcome, detail = "swapped", f"behind {', '.join(told)}"
    if norm.momentum is None and "momentum" not in network.options:
        detail += "; the momentum is MABN's own, for the BatchNorm has none"
    return Plan(Change(path, type(norm).__name__, outcome, kind.__name__, detail), build)


def _ends(conv: nn.Module, trace: Trace, norms: Collection[nn.Module]) -> Iterator[nn.Module | str]:
    """Where the output of a layer goes: normalizations that are swapped, and the names of other operators."""
    calls = [call for call in trace.calls(conv) if call.target in _CONVOLUTIONS]
    for node in _walk(calls, trace.readers, _CARRIES):
        norm = trace.normalization(node)
        yield norm if norm is not None and norm in norms else operator_name(node)


def _sources(norm: nn.Module, trace: Trace) -> Iterator[nn.Module | str]:
    """Where the input of a normalization comes from: layers, and the names of operators that are no layer's."""
    for node in _walk(trace.calls(norm), trace.inputs, _CENTRED_STAYS):
        module = trace.module(node) if node.target in _CONVOLUTIONS else None
        is_layer = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        yield module if module is not None and is_layer else operator_name(node)


def _walk(
    calls: Iterable[fx.Node], step: Callable[[fx.Node], list[fx.Node]], through: Collection[object]
) -> Iterator[fx.Node]:
    """The operators at which a walk from the calls ends that goes on through some operators alone."""
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


def _not_alone(network: Network, norms: Collection[nn.Module], others: Collection[str]) -> str:
    """Why the output of a layer is not MABN's alone, or nothing."""
    if not network.traces:
        return "the network is not traced"
    if not norms:
        return f"it goes to {' and '.join(others)}" if others else "it is not reached from the example inputs"
    return f"it goes to {' and '.join(others)} too" if others else ""


def _unfit(conv: nn.Module, seen: nn.Module, traces: Iterable[Trace]) -> str:
    """Why a layer that MABN alone reads cannot be centred, or nothing."""
    name = type(conv).__name__
    if has_hooks(conv):
        return "it has hooks"
    if parametrize.is_parametrized(conv):
        return "its weight is parametrized"
    if type(conv) not in CENTRED:
        parent = next((kind.__name__ for kind in CENTRED if isinstance(conv, kind)), None)
        return f"a {name} may do more than a {parent}" if parent else f"there is no centred {name}"
    assert isinstance(conv, nn.modules.conv._ConvNd)
    readers = [reader for trace in traces if (reader := trace.strange_reader(seen)) is not None]
    if readers:
        return f"its weight is read elsewhere too, by {readers[0]}"
    if conv.in_channels // conv.groups * math.prod(conv.kernel_size) == 1:
        return "a fan-in of 1 leaves nothing after centring"
    return ""
