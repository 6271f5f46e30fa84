"""A swap as planned: what becomes of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn

from deploynorm._swap.layers import BatchNorm, Memo
from deploynorm._swap.observing import Observed
from deploynorm._swap.report import Outcome
from deploynorm.changes import Change

Build = Callable[[Memo], nn.Module]


class Plan(NamedTuple):
    """What becomes of one layer, and how the layer that takes its place is built; None for one that stays."""

    change: Change
    build: Build | None = None


def planned(
    path: str, layer: nn.Module, outcome: Outcome, detail: str, became: str = "", build: Build | None = None
) -> Plan:
    return Plan(Change(path, type(layer).__name__, outcome, became, detail), build)


@dataclass(frozen=True)
class Network:
    """The network given, what was seen of it, and the normalizations that are swapped."""

    model: nn.Module
    layers: Mapping[str, nn.Module]  # its modules, by path; a shared one under its first
    observed: Observed
    norms: Mapping[str, tuple[BatchNorm, int]]  # by path: those that are swapped, and how many spatial axes they have
    options: Mapping[str, Any]  # of the new layers, as the user gave them

    def seen(self, path: str) -> nn.Module:
        """The layer of this path in the copy that was traced."""
        return self.observed.modules[path]

    def given(self, seen: nn.Module) -> nn.Module:
        """The layer of the network given that became this one in the copy."""
        return self.layers[self._paths[seen]]

    def names(self, seen: Iterable[nn.Module]) -> str:
        """Layers of the copy, for a sentence."""
        return ", ".join(self._paths[layer] or "the network" for layer in seen)

    @cached_property
    def seen_norms(self) -> set[nn.Module]:
        """The normalizations that are swapped, in the copy that was traced."""
        return {self.seen(path) for path in self.norms}

    @cached_property
    def _paths(self) -> dict[nn.Module, str]:
        return {module: path for path, module in self.observed.modules.items()}
