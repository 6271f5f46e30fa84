"""A swap as planned: what becomes of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn

from deploynorm._swap.layers import BatchNorm, Memo
from deploynorm._swap.report import Change
from deploynorm._swap.traces import Observed, Trace

__all__ = ["Network", "Plan", "SwappedNorm", "left"]


class Plan(NamedTuple):
    """What becomes of one layer, and how the layer that takes its place is built; None for one that stays."""

    change: Change
    build: Callable[[Memo], nn.Module] | None = None


class SwappedNorm(NamedTuple):
    """A batch normalization that is swapped, and the number of its spatial axes."""

    layer: BatchNorm
    rank: int


@dataclass(frozen=True)
class Network:
    """The network given, what was seen of it, and the normalizations that a swap takes.

    Attributes:
        model: The network given.
        layers: Its modules, by path; a shared one under its first.
        observed: What its copy did.
        norms: The batch normalizations that are swapped, by path.
        options: Arguments of the new layers, as the user gave them.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    observed: Observed
    norms: Mapping[str, SwappedNorm]
    options: Mapping[str, Any]

    @property
    def traces(self) -> Sequence[Trace]:
        return self.observed.traces

    def seen(self, path: str) -> nn.Module:
        """The layer of this path in the copy that was traced."""
        return self.observed.modules[path]

    def path(self, seen: nn.Module) -> str:
        return self._paths[seen]

    def told(self, seen: nn.Module) -> str:
        """The same, as it stands in a sentence."""
        return self._paths[seen] or "the network"

    @cached_property
    def seen_norms(self) -> set[nn.Module]:
        """The normalizations that are swapped, in the copy that was traced."""
        return {self.seen(path) for path in self.norms}

    @cached_property
    def _paths(self) -> dict[nn.Module, str]:
        return {module: path for path, module in self.observed.modules.items()}


def left(path: str, layer: nn.Module, reason: str) -> Plan:
    return Plan(Change(path, type(layer).__name__, "left", "", reason))
