"""Plans the way from batch normalization and ReLU to FRN and TLU."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from deploynorm._swap.activations import RELU, Activations, Thresholds, decide
from deploynorm._swap.layers import FRN, Memo, carried_over, like
from deploynorm._swap.plan import Network, Plan, planned, unchanged
from deploynorm._swap.report import Outcome
from deploynorm.layers.frn import TLU
from deploynorm.trace import operator_name

__all__ = ["plan_frn"]


def plan_frn(network: Network, thresholds: Thresholds) -> Iterator[Plan]:
    """What becomes of each ReLU, by the cases of `decide`, and then of each normalization that is swapped.

    A normalization becomes FRN:

    1. with TLU, "absorbed", where a ReLU is its own;
    2. without, "swapped", where no ReLU reads it but one that becomes a TLU layer;
    3. without, "partly", where a ReLU that stays reads it, or where nothing is known of what does.

    Its epsilon is learned where it sees maps of one value and the user does not say otherwise.
    """
    relus = [path for path, layer in network.layers.items() if isinstance(layer, nn.ReLU)]
    # A ReLU inside one of timm's FRN layers is not in the copy, which has ours instead; it stays.
    modules = network.observed.modules
    seen = {relu: path for path in relus if isinstance(relu := modules.get(path), nn.ReLU)}
    decided = decide(network.observed, seen, network.seen_norms, thresholds)
    for relu, path in seen.items():
        yield _plan_relu(network, decided, relu, path)
    for path in network.norms:
        yield _plan_norm(network, decided, path)


def _plan_relu(network: Network, decided: Activations, relu: nn.Module, path: str) -> Plan:
    original = network.layers[path]
    if relu in decided.absorbed:
        into = f"into {', '.join(map(network.name, decided.absorbed[relu]))}"
        identity = nn.Identity().train(original.training)
        return planned(path, original, "absorbed", "Identity", into, lambda memo: identity)
    if relu in decided.tlus:
        channels, norms = decided.tlus[relu]
        kind = like(network.norms[network.path(norms[0])].layer, network.model)
        behind = f"behind {', '.join(map(network.name, norms))}"
        tlu = TLU(channels, **kind).train(original.training)
        return planned(path, original, "swapped", "TLU", behind, lambda memo: tlu)
    return unchanged(path, original, decided.stays[relu])


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
    if single and "learned_eps" not in network.options:
        detail += "; maps of one value, so epsilon is learned"
    if norm.weight is None:
        detail += "; gamma and beta are new"
    return planned(path, norm, outcome, kind.__name__ + (" with TLU" if own else ""), detail, build)


def _own_relus(network: Network, decided: Activations, norm: nn.Module) -> tuple[Outcome, str]:
    """Case 1, with the ReLUs that it takes in."""
    relus = [network.name(relu) for relu, norms in decided.absorbed.items() if norm in norms]
    return "absorbed", f"takes in {', '.join(relus)}"


def _behind(network: Network, decided: Activations, norm: nn.Module) -> tuple[Outcome, str]:
    """Case 2 or 3, with what stands behind the normalization."""
    if not network.traces:
        return "partly", "what stands behind it stays: the network is not traced"
    readers = [(trace, node) for trace in network.traces for call in trace.calls(norm) for node in trace.readers(call)]
    if not readers:
        return "partly", "what stands behind it stays: it is not reached from the example inputs"
    found: dict[str, None] = {}
    stays: dict[str, None] = {}
    for trace, node in readers:
        module = trace.module(node)
        if node.target not in RELU:
            found[f"read by {operator_name(node)}"] = None
        elif module in decided.tlus:
            found["a TLU behind it"] = None
        elif isinstance(module, nn.ReLU):
            stays[f"the ReLU behind it stays: {decided.stays[module]}"] = None
        else:
            stays["the ReLU behind it stays: it is a functional call, not a layer"] = None
    return ("partly", "; ".join(stays)) if stays else ("swapped", "; ".join(found))
