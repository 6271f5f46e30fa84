"""Plans the way from batch normalization and ReLU to FRN and TLU."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from deploynorm._swap.activations import RELU, Activations, Thresholds, decide
from deploynorm._swap.layers import FRN, Memo, carried_over, like
from deploynorm._swap.plan import Network, Plan, left
from deploynorm._swap.report import Change, Outcome
from deploynorm._swap.traces import operator_name
from deploynorm.layers.tlu import TLU

__all__ = ["plan_frn"]


def plan_frn(network: Network, thresholds: Thresholds) -> Iterator[Plan]:
    """What becomes of each ReLU, and then of each normalization that is swapped."""
    relus = [path for path, layer in network.layers.items() if isinstance(layer, nn.ReLU)]
    # The ReLU inside a timm FRN layer is gone from the copy, and stays.
    modules = network.observed.modules
    seen = {relu: path for path in relus if isinstance(relu := modules.get(path), nn.ReLU)}
    decided = decide(network.traces, seen, network.seen_norms, thresholds)
    for relu, path in seen.items():
        yield _plan_relu(network, decided, relu, path)
    for path in network.norms:
        yield _plan_norm(network, decided, path)


def _plan_relu(network: Network, decided: Activations, relu: nn.Module, path: str) -> Plan:
    original = network.layers[path]
    if relu in decided.absorbed:
        into = ", ".join(map(network.told, decided.absorbed[relu]))
        change = Change(path, "ReLU", "absorbed", "Identity", f"into {into}")
        return Plan(change, lambda memo: nn.Identity().train(original.training))
    if relu in decided.tlus:
        channels, norms = decided.tlus[relu]
        kind = like(network.norms[network.path(norms[0])].layer, network.model)
        change = Change(path, "ReLU", "swapped", "TLU", f"behind {', '.join(map(network.told, norms))}")
        return Plan(change, lambda memo: TLU(channels, **kind).train(original.training))
    return left(path, original, decided.stays[relu])


def _plan_norm(network: Network, decided: Activations, path: str) -> Plan:
    (norm, rank), seen = network.norms[path], network.seen(path)
    own = any(seen in norms for norms in decided.absorbed.values())
    # A plane of one value is its own mean, and with a small epsilon its output a sign (arXiv:1911.09737, section 3.3).
    shapes = [shape for trace in network.traces for shape in trace.input_shapes(seen)]
    single = any(math.prod(shape[2:]) == 1 for shape in shapes)
    options = {"learned_eps": "layer", **network.options} if single else network.options
    kind = FRN[rank]

    def build(memo: Memo) -> nn.Module:
        new = kind(norm.num_features, tlu=own, **like(norm, network.model), **options)
        return carried_over(norm, new, memo)

    outcome, detail = _own_relus(network, decided, seen) if own else _behind(network, decided, seen)
    if single:
        detail += "; maps of one value, so epsilon is learned" if "learned_eps" not in network.options else ""
    if norm.weight is None:
        detail += "; gamma and beta are new"
    return Plan(Change(path, type(norm).__name__, outcome, kind.__name__ + (" with TLU" if own else ""), detail), build)


def _own_relus(network: Network, decided: Activations, norm: nn.Module) -> tuple[Outcome, str]:
    relus = [network.told(relu) for relu, norms in decided.absorbed.items() if norm in norms]
    return "absorbed", f"takes in {', '.join(relus)}"


def _behind(network: Network, decided: Activations, norm: nn.Module) -> tuple[Outcome, str]:
    """What stands behind a normalization that takes no ReLU in."""
    if not network.traces:
        return "partly", "what stands behind it stays: the network is not traced"
    readers = [(trace, node) for trace in network.traces for call in trace.calls(norm) for node in trace.readers(call)]
    if not readers:
        return "partly", "what stands behind it stays: it is not reached from the example inputs"
    told: dict[str, None] = {}
    stays: dict[str, None] = {}
    for trace, node in readers:
        module = trace.module(node)
        if node.target not in RELU:
            told[f"read by {operator_name(node)}"] = None
        elif module in decided.tlus:
            told["a TLU behind it"] = None
        elif isinstance(module, nn.ReLU):
            stays[f"the ReLU behind it stays: {decided.stays[module]}"] = None
        else:
            stays["the ReLU behind it stays: it is a functional call, not a layer"] = None
    return ("partly", "; ".join(stays)) if stays else ("swapped", "; ".join(told))
