"""What rounding alone may change of outputs that a network picks by comparing numbers: which values, and which rows.

A score that is nearly the threshold, an overlap that is nearly the limit, and two scores that are nearly equal come out
on either side in another order of sums. So where an output differs, it is compared with what the network itself makes
of weights and inputs that are off by a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from deploynorm._check.comparison import Comparison

_Array = npt.NDArray[Any]
Nearby = Callable[[Mapping[str, _Array], float, int], Iterable[Mapping[str, _Array]]]
"""What a network computes of feeds, with weights and inputs off by so much of their values, so many times."""

_ROUNDING: Final = {"float64": 2.0**-51, "float32": 2.0**-22, "float16": 2.0**-9, "bfloat16": 2.0**-6}
"""Twice the distance of 1 and the next number: through a network, sums in another order are about as far off."""
_TIMES = 16
"""How often the network runs with others: a row that a rounding decides is then there and not there."""
_MOST_ROWS = 2000
"""Above which rows are compared in their order alone: each is compared with each."""
_Rows = Mapping[str, _Array]
"""Outputs of one group, each with a row for each thing, as the boxes, labels and scores of a detector."""


@dataclass(frozen=True)
class Near:
    """The truth with weights and inputs that are off by a rounding of the candidate's type, once it is asked for."""

    nearby: Nearby | None
    feeds: Mapping[str, _Array]
    precision: str | None
    names: tuple[str, ...]  # of the outputs

    @cached_property
    def outputs(self) -> Sequence[Mapping[str, _Array]]:
        if self.nearby is None:
            return ()
        given = {x.dtype.name for x in self.feeds.values()}
        eps = _ROUNDING[self.precision or ("float64" if "float64" in given else "float32")]
        return [dict(zip(self.names, each.values(), strict=True)) for each in self.nearby(self.feeds, eps, _TIMES)]


def settled(
    found: Mapping[str, Comparison],
    pairs: Mapping[str, tuple[_Array, _Array]],
    row_groups: Iterable[Sequence[str]],
    allowed: Mapping[str, float],
    near: Near,
) -> dict[str, Comparison]:
    """Comparisons of the outputs of a sample, those that do not hold looked at again.

    Args:
        found: By output.
        pairs: The candidate's output, and the truth's, where both have it.
        row_groups: See `deploynorm.run.base.Runner`.
        allowed: How far off an output may be.
        near: The truth, off by a rounding.
    """
    again = dict(found)
    grouped: set[str] = set()
    for group in row_groups:
        own = {name: pairs[name] for name in group if name in pairs}
        grouped |= own.keys()
        if len(own) == len(group) and not all(found[name].ok for name in group) and _have_rows(own):
            again |= _by_rows(found, own, allowed, near)
    for name, (got, want) in pairs.items():
        exact = got.dtype.kind in "iub" and want.dtype.kind in "iub" and got.shape == want.shape
        if exact and name not in grouped and not found[name].ok:
            again[name] = _by_values(found[name], got, want, near)
    return again


def _by_values(found: Comparison, got: _Array, want: _Array, near: Near) -> Comparison:
    """Integers or truth values of one shape, some of which differ: each has to be that of the truth or of one near."""
    possible = got == want
    off = np.count_nonzero(~possible)
    for each in near.outputs:
        possible |= each[found.output] == got if each[found.output].shape == got.shape else False
    if not possible.all():
        return found
    reason = f"{off} of {got.size} values are as rounding alone may have them"
    reason += ", which proves little" if 2 * off > got.size else ""
    return replace(found, ok=True, reason=reason, max_abs=0.0, max_rel=0.0, index=None, got=None, want=None)


def _have_rows(pairs: Mapping[str, tuple[_Array, _Array]]) -> bool:
    """Whether the outputs are finite, of the kinds and row shapes of the truth, each form with one number of rows."""
    for got, want in pairs.values():
        same_kind = (got.dtype.kind in "iub") == (want.dtype.kind in "iub")
        if not (got.ndim and want.ndim and same_kind and got.shape[1:] == want.shape[1:]):
            return False
        if not all(np.isfinite(x.astype(np.float64)).all() for x in (got, want)):
            return False
    counts = [{len(pair[side]) for pair in pairs.values()} for side in (0, 1)]
    return all(len(each) == 1 for each in counts) and max(max(each) for each in counts) <= _MOST_ROWS


def _by_rows(
    found: Mapping[str, Comparison],
    pairs: Mapping[str, tuple[_Array, _Array]],
    allowed: Mapping[str, float],
    near: Near,
) -> dict[str, Comparison]:
    got, want = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    matched = match_rows(got, want, near, allowed)
    judged = {}
    for name in pairs:
        one, other = (rows[name][at].astype(np.float64) for rows, at in ((got, matched.got), (want, matched.want)))
        error = np.abs(one - other)
        worst, scale = float(error.max(initial=0.0)), float(np.abs(other).max(initial=0.0))
        result = replace(found[name], ok=not matched.reason, reason=matched.reason, allowed=allowed[name])
        if matched.reason:
            judged[name] = replace(result, max_abs=math.nan, max_rel=math.nan, index=None, got=None, want=None)
            continue
        result = replace(result, max_abs=worst, max_rel=worst / scale if scale else 0.0, index=None)
        if error.size:
            at = tuple(map(int, np.unravel_index(error.argmax(), error.shape)))
            index = (int(matched.want[at[0]]), *at[1:])
            result = replace(result, index=index, got=float(one[at]), want=float(other[at]))
        if matched.unsettled:
            reason = f"{len(one)} rows agree, and {matched.unsettled} are there or not as rounding alone may have it"
            reason += ", which proves little" if len(one) < matched.unsettled else ""
            result = replace(result, reason=reason)
        judged[name] = result
    return judged


@dataclass(frozen=True)
class Matched:
    """Rows that two forms of a network have in common.

    Attributes:
        got, want: Their places in either.
        reason: What else is wrong; empty where nothing is.
        unsettled: How many rows one of the two alone has, as rounding may have it.
    """

    got: _Array
    want: _Array
    reason: str
    unsettled: int


def match_rows(got: _Rows, want: _Rows, near: Near, allowed: Mapping[str, float]) -> Matched:
    """Pairs rows that hold the same, and judges those without a partner, and the order.

    1. Two rows hold the same where all their integers are equal and all their floats within what is allowed.
    2. A row of `got` alone has to be in one of the truths near; a row of `want` alone must not be in all of them.
    3. `got` has no fewer rows, and no more, than the truth and all the truths near: of two rows, each of which may be
       there, it may be that only one is at a time.
    4. Where the rows of `want` are sorted by outputs of one number a row, those of `got` have to be too; equal numbers
       may then change places. Where they are not, all rows stand in the order of the truth, or of one near.
    """
    mine, theirs = _pairs(got, want, allowed)
    extra = np.setdiff1d(np.arange(_count(got)), mine)
    missing = np.setdiff1d(np.arange(_count(want)), theirs)
    reason = ""
    if extra.size:
        known = np.zeros(len(extra), bool)
        for each in near.outputs:
            known |= np.isin(extra, _pairs(got, each, allowed)[0])
        if not known.all():
            reason = f"{np.count_nonzero(~known)} of {_count(got)} rows are not in the truth"
            reason += f", the first at {extra[int(np.argmin(known))]}"
    if missing.size and not reason:
        always = np.ones(len(missing), bool)
        for each in near.outputs:
            always &= np.isin(missing, _pairs(want, each, allowed)[0])
        if always.any():
            reason = f"{np.count_nonzero(always)} of {_count(want)} rows of the truth are missing"
            reason += f", the first at {missing[int(np.argmax(always))]}"
    counts = {_count(each) for each in (want, *near.outputs)} if not reason and (extra.size or missing.size) else set()
    if counts and not min(counts) <= _count(got) <= max(counts):
        reason = f"{_count(got)} rows, where the truth and those near have {min(counts)} to {max(counts)}"
    if not (
        reason
        or _in_order(got, want, theirs, allowed)
        or any(_in_order(got, each, _pairs(got, each, allowed)[1], allowed) for each in near.outputs)
    ):
        reason = "the rows are in another order"
    return Matched(mine, theirs, reason, len(extra) + len(missing))


def _pairs(got: _Rows, want: _Rows, allowed: Mapping[str, float]) -> tuple[_Array, _Array]:
    """Places in `got`, which rise, and in `want` of rows that hold the same, each row at most once."""
    alike = _alike(got, want, allowed)
    free = np.ones(_count(want), bool)
    pairs = []
    for i in range(_count(got)):
        found = np.flatnonzero(alike[i] & free)
        if found.size:
            j = int(found[np.argmin(np.abs(found - i))])
            free[j] = False
            pairs.append((i, j))
    mine, theirs = (np.array([pair[side] for pair in pairs], int) for side in (0, 1))
    return mine, theirs


def _alike(got: _Rows, want: _Rows, allowed: Mapping[str, float]) -> npt.NDArray[np.bool_]:
    """(rows of got, rows of want): whether two hold the same."""
    alike = np.ones((_count(got), _count(want)), bool)
    for name, wanted in want.items():
        flat_got, flat_want = (x.reshape(len(x), math.prod(x.shape[1:])) for x in (got[name], wanted))
        for one, other in zip(flat_got.T, flat_want.T, strict=True):
            if wanted.dtype.kind in "iub":
                alike &= one[:, None] == other[None]
            else:
                alike &= np.abs(one.astype(np.float64)[:, None] - other.astype(np.float64)[None]) <= allowed[name]
    return alike


def _in_order(got: _Rows, want: _Rows, theirs: _Array, allowed: Mapping[str, float]) -> bool:
    if bool((np.diff(theirs) > 0).all()):
        return True
    are_sorted = False
    for name, x in want.items():
        if x.dtype.kind in "iub" or x.size != len(x):
            continue
        one, other = (np.diff(each.astype(np.float64).reshape(-1)) for each in (got[name], x))
        if not other.any():
            continue  # a constant, as the number of the only image, is sorted in every order
        for sign in (1, -1):
            if (sign * other <= 0).all():
                are_sorted = True
                if not (sign * one <= allowed[name]).all():
                    return False
    return are_sorted


def _count(rows: _Rows) -> int:
    return len(next(iter(rows.values())))
