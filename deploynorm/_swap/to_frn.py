"""Plans the way from batch normalization and ReLU to FRN and TLU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from deploynorm._swap.activations import RELU, Activations, Thresholds, decide
from deploynorm._swap.layers import FRN, Memo, carried_over, like
from deploynorm._swap.plan import Network, Plan, planned
from deploynorm._swap.report import Outcome
from deploynorm.layers.frn import TLU
from deploynorm.trace import operator_name


def plan_frn(network: Network, thresholds: Thresholds) -> Iterator[Plan]:
    """What becomes of each ReLU, by the cases of `decide`, and then of each normalization that is swapped.

    A normalization becomes FRN:

    1. with TLU, "absorbed", where a ReLU is its own;
    2. without, "swapped", where no ReLU reads it but one that becomes a TLU layer;
    3. without, "partly", where a ReLU that stays reads it, or where nothing is known of what does.

    Its epsilon is learned where it sees maps of one value and the user does not say otherwise.
    """
    relus = {module: path for path, module in network.observed.modules.items() if isinstance(module, nn.ReLU)}
    decided = decide(network.observed, relus, network.seen_norms, thresholds)
    for relu, path in relus.items():
        yield _plan_relu(network, decided, relu, path)
    for path in network.norms:
        yield _plan_norm(network, decided, path)


def _plan_relu(network: Network, decided: Activations, relu: nn.Module, path: str) -> Plan:
    original = network.layers[path]
    if relu in decided.absorbed:
        identity = nn.Identity().train(original.training)
        detail = f"into {network.names(decided.absorbed[relu])}"
        return planned(path, original, "absorbed", detail, "Identity", lambda memo: identity)
    if relu in decided.tlus:
        channels, norms = decided.tlus[relu]
        tlu = TLU(channels, **like(network.given(norms[0]), network.model))
        tlu.train(original.training)
        return planned(path, original, "swapped", f"behind {network.names(norms)}", "TLU", lambda memo: tlu)
    return planned(path, original, "unchanged", decided.stays[relu])


def _plan_norm(network: Network, decided: Activations, path: str) -> Plan:
    (norm, rank), seen = network.norms[path], network.seen(path)
    own = [relu for relu, norms in decided.absorbed.items() if seen in norms]
    # A plane of one value is its own mean, and with a small epsilon its output a sign (arXiv:1911.09737, section 3.3).
    single = any(math.prod(shape[2:]) == 1 for shape in network.observed.trace.input_shapes(seen))
    options = {"learned_eps": "layer", **network.options} if single else network.options
    kind = FRN[rank]

    def build(memo: Memo) -> nn.Module:
        new = kind(norm.num_features, tlu=bool(own), **like(norm, network.model), **options)
        return carried_over(norm, new, memo)

    outcome, detail = _outcome(network, decided, seen, own)
    if single and "learned_eps" not in network.options:
        detail += "; maps of one value, so epsilon is learned"
    if norm.weight is None:
        detail += "; gamma and beta are new"
    return planned(path, norm, outcome, detail, kind.__name__ + (" with TLU" if own else ""), build)


def _outcome(network: Network, decided: Activations, norm: nn.Module, own: Sequence[nn.Module]) -> tuple[Outcome, str]:
    """The case of a normalization that takes in its own ReLUs, with what stands behind it."""
    if own:
        return "absorbed", f"takes in {network.names(own)}"
    if network.observed.untraced:
        return "partly", "what stands behind it stays: the network is not traced"
    trace = network.observed.trace
    found: dict[str, None] = {}
    stays: dict[str, None] = {}
    for node in (node for call in trace.calls(norm) for node in trace.readers(call)):
        module = trace.module(node)
        if node.target not in RELU:
            found[f"read by {operator_name(node)}"] = None
        elif module in decided.tlus:
            found["a TLU behind it"] = None
        elif isinstance(module, nn.ReLU):
            stays[f"the ReLU behind it stays: {decided.stays[module]}"] = None
        else:
            stays["the ReLU behind it stays: it is a functional call, not a layer"] = None
    if not found and not stays:
        return "partly", "what stands behind it stays: it is not reached from the example inputs"
    return ("partly", "; ".join(stays)) if stays else ("swapped", "; ".join(found))
