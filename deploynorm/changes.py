"""What became of one layer or node: the entries that swap, fold and rewrite put into their reports."""

from __future__ import annotations

from typing import NamedTuple


class Change(NamedTuple):
    """What became of one layer of a network, or of one node of an ONNX graph.

    Attributes:
        name: The layer's path in the network ("" is the network itself), or the node's first output.
        kind: Its class or operator before.
        outcome: What happened, in a word; each report lists its own.
        became: What stands there now; "" where nothing changed.
        detail: Where it went, or the reason why it stays.
    """

    name: str
    kind: str
    outcome: str
    became: str = ""
    detail: str = ""
