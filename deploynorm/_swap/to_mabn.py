"""Plans the way from batch normalization to MABN, and from convolutions to CenConv."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from deploynorm._swap.activations import CARRIES
from deploynorm._swap.layers import CENTRED, MABN, BatchNorm, Memo, carried_over, centred, like
from deploynorm._swap.plan import Network, Plan, planned
from deploynorm._swap.report import Outcome
from deploynorm.errors import InputError
from deploynorm.trace import LINEAR_OPERATORS, aten_operators, has_hooks, operator_name, walk

_MOVES = "chunk contiguous flatten pad permute reshape slice split split_with_sizes transpose unsqueeze view"
_CARRIES = CARRIES | aten_operators(_MOVES) | {operator.getitem}
"""Operators of CARRIES, and those that move values about."""

_CENTRED_STAYS = _CARRIES - aten_operators("max_pool1d max_pool2d max_pool3d")
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
        ends = dict.fromkeys(_ends(network, seen))
        norms = [end for end in ends if isinstance(end, nn.Module)]
        others = " and ".join(end for end in ends if isinstance(end, str))
        reason = _why_plain(network, layer, seen, norms, others)
        if not reason:  # case 1
            assert isinstance(layer, nn.modules.conv._ConvNd)
            became, detail = CENTRED[type(layer)].__name__, f"goes to {network.names(norms)}"
            yield planned(path, layer, "swapped", detail, became, partial(centred, layer))
            continue
        plain.add(seen)
        if norms or not isinstance(layer, nn.Linear):  # case 2
            yield planned(path, layer, "unchanged", reason)
    for path in network.norms:  # case 3
        yield _plan_norm(network, path, plain)


def why_not_mabn(norm: BatchNorm, given: Mapping[str, Any]) -> str:
    """Why MABN does not take the arguments of a normalization, such as an epsilon of 0; empty where it does."""
    try:
        MABN[2](1, **_options(norm, given))
    except InputError as error:
        return f"MABN does not take its arguments: {error.problem}, got {error.got}"
    return ""


def _options(norm: BatchNorm, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the MABN that takes a normalization's place: the user's before its own."""
    own = {"eps": norm.eps, "momentum": norm.momentum}
    if norm.momentum is None:  # a cumulative average, which MABN has not
        del own["momentum"]
    return {**own, **given}


def _plan_norm(network: Network, path: str, plain: Collection[nn.Module]) -> Plan:
    (norm, rank), seen = network.norms[path], network.seen(path)
    kind = MABN[rank]

    def build(memo: Memo) -> nn.Module:
        options = {"affine": norm.affine, **like(norm, network.model), **_options(norm, network.options)}
        return carried_over(norm, kind(norm.num_features, **options), memo)

    sources = {x: x if isinstance(x, str) else network.names([x]) for x in _sources(network, seen)}
    off_zero = [name for source, name in sources.items() if isinstance(source, str) or source in plain]
    outcome: Outcome = "partly"
    if network.observed.untraced:
        detail = "nothing before it is centred: the network is not traced"
    elif not sources:
        detail = "nothing before it is centred: it is not reached from the example inputs"
    elif off_zero:
        detail = f"the mean of its input may be off zero: it reads {' and '.join(off_zero)}, which is not centred"
    else:
        outcome, detail = "swapped", f"behind {', '.join(sources.values())}"
    if norm.momentum is None and "momentum" not in network.options:
        detail += "; the momentum is MABN's own, since the BatchNorm has none"
    return planned(path, norm, outcome, detail, kind.__name__, build)


def _ends(network: Network, layer: nn.Module) -> Iterator[nn.Module | str]:
    """Where the output of a layer goes: to normalizations that are swapped, and to other operators, by name."""
    trace = network.observed.trace
    calls = [call for call in trace.calls(layer) if call.target in LINEAR_OPERATORS]
    for node in walk(calls, trace.readers, _CARRIES):
        norm = trace.normalization(node)
        yield norm if norm is not None and norm in network.seen_norms else operator_name(node)


def _sources(network: Network, norm: nn.Module) -> Iterator[nn.Module | str]:
    """Where the input of a normalization comes from: from layers, and from operators that are no layer's, by name."""
    trace = network.observed.trace
    for node in walk(trace.calls(norm), trace.inputs, _CENTRED_STAYS):
        module = trace.module(node) if node.target in LINEAR_OPERATORS else None
        yield module if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) else operator_name(node)


def _why_plain(network: Network, layer: nn.Module, seen: nn.Module, norms: Collection[nn.Module], others: str) -> str:
    """Why a layer, whose output goes to these normalizations and other operators, stays; empty where it is centred."""
    name = type(layer).__name__
    if network.observed.untraced:
        return "the network is not traced"
    if not norms:
        return f"it goes to {others}" if others else "it is not reached from the example inputs"
    if others:
        return f"it goes to {others} too"
    if has_hooks(layer, backward=True):
        return "it has hooks"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized"
    if type(layer) not in CENTRED:
        parent = next((kind.__name__ for kind in CENTRED if isinstance(layer, kind)), None)
        return f"a {name} may do more than a {parent}" if parent else f"there is no centred {name}"
    assert isinstance(layer, nn.modules.conv._ConvNd)
    if reader := network.observed.trace.foreign_reader(seen):
        return f"its weight is read elsewhere too, by {reader}"
    if layer.in_channels // layer.groups * math.prod(layer.kernel_size) == 1:
        return "a fan-in of 1 leaves nothing after centring"
    return ""
