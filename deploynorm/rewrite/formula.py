"""What values are computed from one value x, as formulas of x and of the mean of its square over space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import onnx_ir as ir

Layout = tuple[tuple[int, ...], ...]
"""For each axis of a value the axes of x that it runs over, in order; none for an axis of one entry.

(N, C, H * W) is ((0,), (1,), (2, 3)), and a mean over H and W that keeps its axes ((0,), (1,), (), ())."""

_ZERO: Final = np.float64(0)
_NONE: Final = np.float64(-np.inf)


class UnknownError(Exception):
    """Why nothing is known of what a node computes."""


@dataclass(frozen=True, eq=False)
class Formula:
    """max(scale * x^power * (mean(x^2) + eps)^exponent * counts + shift, tau); a constant has neither x nor the mean.

    Attributes:
        layout: Of the value.
        scale, eps, shift, tau: One number each, or one for each channel.
        power, exponent: Of x, and of the mean.
        absolute: Whether it is |x| and not x.
        reduced: Axes over which x^2 is summed already, where others are still to come.
        counts: Sizes that only a run knows, and to which power they are factors.
        means: The reductions that it depends on.
        above: Of a truth value, what it compares: the value, with which bound, and whether it is to be above it.
    """

    layout: Layout
    scale: Any = field(default_factory=lambda: np.float64(1))
    power: int = 0
    exponent: float = 0.0
    eps: Any = _ZERO
    shift: Any = _ZERO
    tau: Any = _NONE
    absolute: bool = False
    reduced: frozenset[int] = frozenset()
    counts: Mapping[str, float] = field(default_factory=dict)
    means: frozenset[ir.Node] = frozenset()
    above: tuple[ir.Value, Any, bool] | None = None

    @property
    def fixed(self) -> bool:
        """Whether it is a constant."""
        return not (self.power or self.exponent or self.counts or self.above)

    @property
    def finished(self) -> bool:
        """Whether it is the operator's: x * (mean + eps)^-0.5, scaled, shifted and bounded for each channel."""
        exact = self.power == 1 and self.exponent == -0.5 and not self.absolute
        return exact and not (self.counts or self.reduced or self.above)

    @property
    def is_x(self) -> bool:
        """Whether it is x itself, perhaps in another layout or type."""
        plain = self.power == 1 and not (self.exponent or self.absolute or self.above) and not np.any(self.shift)
        return plain and bool(np.all(self.scale == 1))

    @property
    def finite(self) -> bool:
        """Whether its numbers are, but the threshold; a division by zero has others."""
        return all(bool(np.isfinite(number).all()) for number in (self.scale, self.eps, self.shift))

    def scaled(self, factor: Any) -> Formula:
        if np.isneginf(self.tau).all():
            return replace(self, scale=self.scale * factor, shift=self.shift * factor)
        if not (factor > 0).all():
            raise UnknownError("it multiplies what is behind the threshold by a number that is not positive")
        return replace(self, scale=self.scale * factor, shift=self.shift * factor, tau=self.tau * factor)

    def shifted(self, by: Any) -> Formula:
        if self.finished:
            return replace(self, shift=self.shift + by, tau=self.tau + by)
        self.need_whole()
        if self.fixed:
            return replace(self, scale=self.scale + by)
        if self.power:
            raise UnknownError("it adds a constant to x")
        if self.exponent == 1 and self.counts:
            raise UnknownError("it adds a constant to a sum that is no mean at every size")
        if self.exponent != 1:
            raise UnknownError("it adds a constant to what is not the mean: an epsilon outside of the root")
        return replace(self, eps=self.eps + by / self.scale)

    def powered(self, exponent: float) -> Formula:
        self.need_whole()
        if self.finished or (self.power, exponent) not in ((1, 2.0), (0, exponent)) or (self.power and self.exponent):
            raise UnknownError(f"it takes the power {exponent:g} of what is no mean")
        if not (float(exponent).is_integer() or (self.scale > 0).all()):
            raise UnknownError("it takes the root of a number that may be negative")
        scale = np.power(self.scale, exponent)
        counts = {name: count * exponent for name, count in self.counts.items()}
        power = 2 * self.power  # of x itself or of none
        return replace(self, scale=scale, power=power, absolute=False, exponent=self.exponent * exponent, counts=counts)

    def times(self, other: Formula, layout: Layout) -> Formula:
        for one, another in ((self, other), (other, self)):
            if one.fixed:
                return replace(another.scaled(one.scale), layout=layout)
            if another.power or another.exponent:
                one.need_whole()
        power = self.power + other.power
        if self.finished or other.finished or power > 2 or (power == 2 and (self.exponent or other.exponent)):
            raise UnknownError("it multiplies two values that both depend on x")
        if self.exponent and other.exponent and not np.array_equal(self.eps, other.eps):
            raise UnknownError("it multiplies means with different epsilons")
        if power == 2 and self.absolute != other.absolute:
            raise UnknownError("it multiplies x by |x|")
        return replace(
            self,
            layout=layout,
            scale=self.scale * other.scale,
            power=power,
            exponent=self.exponent + other.exponent,
            eps=self.eps if self.exponent else other.eps,
            absolute=power == 1 and (self.absolute or other.absolute),
            reduced=self.reduced | other.reduced,
            counts=_merged(self.counts, other.counts),
            means=self.means | other.means,
        )

    def bounded(self, bound: Any) -> Formula:
        if not self.finished:
            raise UnknownError("it bounds what is not normalized yet")
        if np.isnan(bound).any():
            raise UnknownError("its bound is NaN")
        return replace(self, tau=np.maximum(self.tau, bound))

    def need_whole(self) -> None:
        if self.reduced:
            raise UnknownError("it reads a mean over some of the axes of space only")


def broadcast(a: Layout, b: Layout) -> Layout:
    rank = max(len(a), len(b))
    found = []
    for left, right in zip(((),) * (rank - len(a)) + a, ((),) * (rank - len(b)) + b, strict=True):
        if left and right and left != right:
            raise UnknownError("it broadcasts one axis of x with another")
        found.append(left or right)
    labels = [label for axes in found for label in axes]
    if len(labels) != len(set(labels)):
        raise UnknownError("it broadcasts one axis of x with another")
    return tuple(found)


def _merged(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: count for name in {**a, **b} if (count := a.get(name, 0) + b.get(name, 0))}
