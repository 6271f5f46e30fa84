"""A swap as planned: what becomes of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn

from deploynorm._swap.layers import BatchNorm, Memo
from deploynorm._swap.observing import Observed
from deploynorm._swap.report import Outcome
from deploynorm.changes import Change
from deploynorm.trace import TraceReader

__all__ = ["Network", "Plan", "SwappedNorm", "planned", "unchanged"]


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
    """The network given, what was seen of it, and the normalizations that are swapped.

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
    def traces(self) -> Sequence[TraceReader]:
        return self.observed.traces

    def seen(self, path: str) -> nn.Module:
        """The layer of this path in the copy that was traced."""
        return self.observed.modules[path]

    def path(self, seen: nn.Module) -> str:
        """The path of a layer of the copy that was traced."""
        return self._paths[seen]

    def name(self, seen: nn.Module) -> str:
        """The path of a layer of the copy, for a sentence."""
        return self._paths[seen] or "the network"

    @cached_property
    def seen_norms(self) -> set[nn.Module]:
        """The normalizations that are swapped, in the copy that was traced."""
        return {self.seen(path) for path in self.norms}

    @cached_property
    def _paths(self) -> dict[nn.Module, str]:
        return {module: path for path, module in self.observed.modules.items()}


def planned(
    path: str, layer: nn.Module, outcome: Outcome, became: str, detail: str, build: Callable[[Memo], nn.Module]
) -> Plan:
    """The plan of a layer that another takes the place of."""
    return Plan(Change(path, type(layer).__name__, outcome, became, detail), build)


def unchanged(path: str, layer: nn.Module, reason: str) -> Plan:
    """The plan of a layer that stays."""
    return Plan(Change(path, type(layer).__name__, "unchanged", "", reason))
