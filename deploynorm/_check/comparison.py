"""Whether two forms of a network compute the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Real
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from deploynorm._check.rows import Near, Nearby, settled
from deploynorm.contract import DTYPES
from deploynorm.errors import InputError, ParityError
from deploynorm.run.base import Runner
from deploynorm.tables import table

_Array = npt.NDArray[Any]


class Tolerance(NamedTuple):
    """|got - want| <= atol + rtol * max|want|, the maximum over one output."""

    rtol: float
    atol: float
    reason: str


DEFAULT_TOLERANCE: Final[Mapping[str, Tolerance]] = {
    "float32": Tolerance(1e-4, 1e-7, "rounding through 50 layers is some 1e-6 of max|y|; a wrong layer is far more"),
    "float64": Tolerance(1e-10, 1e-13, "sums in another order; float32 anywhere on the way costs 1e-7"),
    # Measured with every tensor rounded: trained ResNet-20s are off by 2 roundings (2^-11) of max|y|, ResNet-50s of
    # random weights by 8 to 15. A layer of the trained ones without its bias, or 1.1 times too large, is off by 40.
    "float16": Tolerance(1e-2, 1e-4, "20 roundings at max|y|: 50 layers bring up to 15, a wrong layer 40 and more"),
    "bfloat16": Tolerance(8e-2, 1e-3, "20 roundings (2^-8) too; a wrong layer has to be off by eight times as much"),
}
"""By the half type that the candidate computes in, or else the dtype of its output.

atol bounds what remains where the exact output is zero."""


@dataclass(frozen=True)
class Comparison:
    """One output on one sample; NaN and None where the two cannot be compared.

    Attributes:
        sample, output: Their names, the output's as the candidate has it.
        ok: Whether the output holds.
        reason: Why it does not; or, of one that holds, why that proves little. Empty otherwise.
        shape, dtype: The truth's shape, and the candidate's dtype.
        rtol, atol: See `Tolerance`.
        allowed: atol + rtol * max|want|.
        max_abs: The largest |got - want|.
        max_rel: max_abs / max|want|.
        index: Where that is, or where the first value that is not finite is.
        got, want: The candidate's value there, and the truth's.
    """

    sample: str
    output: str
    ok: bool
    reason: str
    shape: tuple[int, ...]
    dtype: str
    rtol: float = math.nan
    atol: float = math.nan
    allowed: float = math.nan
    max_abs: float = math.nan
    max_rel: float = math.nan
    index: tuple[int, ...] | None = None
    got: float | None = None
    want: float | None = None

    @property
    def severity(self) -> float:
        """max_abs / allowed, above 1 when broken; infinite where the two cannot be compared."""
        if math.isnan(self.max_abs):
            return math.inf
        if self.allowed > 0:
            return self.max_abs / self.allowed
        return math.inf if self.max_abs > 0 else 0.0


@dataclass(frozen=True)
class Report:
    """All comparisons of one check; true when there are any and all of them hold. `print` shows the table.

    Attributes:
        candidate, truth: Names of the runner that was checked, and of that which it was checked against.
        comparisons: Sample by sample, output by output.
        precision: The half type that the candidate computes in, if it does.
    """

    candidate: str
    truth: str
    comparisons: tuple[Comparison, ...]
    precision: str | None = None

    def __bool__(self) -> bool:
        return bool(self.comparisons) and all(comparison.ok for comparison in self.comparisons)

    @property
    def worst(self) -> Comparison:
        """The comparison furthest over its tolerance, or nearest to it when all hold."""
        return _worst(self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """The report in what JSON has; NaN and infinities are "nan", "inf" and "-inf"."""
        record: dict[str, Any] = _to_json(asdict(self))
        return {"ok": bool(self)} | record

    def __str__(self) -> str:
        return parity_table([self], f"Parity with {self.truth}")

    def raise_if_broken(self) -> None:
        """Raises ParityError for the worst comparison unless the report is true."""
        if self:
            return
        worst = self.worst
        broken = sum(not comparison.ok for comparison in self.comparisons)
        raise ParityError(
            f"sample {worst.sample!r}, output {worst.output!r}",
            f"{worst.reason} ({broken} of {len(self.comparisons)} comparisons fail)",
            got=None if worst.index is None else f"{worst.got} at {worst.index} from {self.candidate}",
            expected=None if worst.index is None else f"{worst.want} from {self.truth}, within {worst.allowed:.3g}",
            fix="find the layer that differs; raise rtol or atol only if this is the rounding of its type",
        )


def check(
    candidate: Runner,
    truth: Runner,
    samples: Iterable[tuple[str, Mapping[str, _Array]]],
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> Report:
    """Runs both on the same samples and compares every output.

    An output holds when |got - want| <= atol + rtol * max|want| everywhere, computed in float64, the maximum taken
    over that output of that sample. Integers and truth values must be equal. Another number of outputs, shape or
    kind of dtype breaks it, and so does a value that is not finite on either side: a NaN or an infinity in the
    truth proves nothing. Outputs are paired by name, or in order when the names differ and the number does not.

    What a network picks by comparing numbers may come out in another way where two are nearly equal. So an integer or
    truth value may also be that which the truth has with weights and inputs that are off by a rounding, where it is an
    `EagerRunner`; and outputs whose number of rows depends on values (`Runner.row_groups`) are compared row by row: see
    `deploynorm._check.rows`.

    Args:
        candidate: The form under test.
        truth: The form that is right, best in float64.
        samples: Name and feeds of each sample; both runners get the same arrays.
        rtol, atol: By default those of `DEFAULT_TOLERANCE` for the half type that the candidate computes in, or else
            for the type of its output.

    Raises:
        InputError: There are no samples, a tolerance is negative or not finite, feeds do not fit, or one of the two is
            no runner.
    """
    for runner in (candidate, truth):
        if not hasattr(runner, "infer"):
            fix = "pass deploynorm.open_runner(file), or deploynorm.EagerRunner for a network"
            raise InputError("check", "not a runner", got=type(runner).__name__, fix=fix)
    known = ((sample, feeds, truth.infer(feeds)) for sample, feeds in samples)
    return check_known(candidate, truth.name, known, getattr(truth, "nearby", None), rtol=rtol, atol=atol)


def check_known(
    candidate: Runner,
    truth: str,
    samples: Iterable[tuple[str, Mapping[str, _Array], Mapping[str, _Array]]],
    nearby: Nearby | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> Report:
    """`check` against outputs that are known: the samples have them as their third part.

    `nearby` gives what the truth computes of the feeds with weights and inputs off by a rounding; see `EagerRunner`.
    """
    check_tolerances(rtol, atol)
    comparisons: list[Comparison] = []
    for sample, feeds, want in samples:
        got = candidate.infer(feeds)
        if not want:
            comparisons.append(Comparison(sample, "", False, "the truth has no outputs", (), ""))
        pairs = _pairs(got, want)
        found = {pair[0]: _compare(sample, *pair, rtol, atol, candidate.precision) for pair in pairs}
        if not all(each.ok for each in found.values()):
            whole = {name: (x, y) for name, x, y in pairs if x is not None and y is not None}
            allowed = {name: _allowed(x, y, rtol, atol, candidate.precision) for name, (x, y) in whole.items()}
            near = Near(nearby, feeds, candidate.precision, tuple(want))
            found = settled(found, whole, candidate.row_groups, allowed, near)
        comparisons += found.values()
    if not comparisons:
        raise InputError("check", "no samples: nothing was compared", fix="give at least one")
    return Report(candidate.name, truth, tuple(comparisons), candidate.precision)


def check_tolerances(rtol: float | None, atol: float | None) -> None:
    """Raises InputError for a tolerance, where one is given, that is no finite number from 0."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not (isinstance(value, Real) and 0 <= float(value) < math.inf):
            raise InputError("check", f"{name} must be finite and not negative", got=repr(value), expected="a number")


def parity_table(reports: Iterable[Report], title: str, verbose: bool = False) -> str:
    """The errors beside what is allowed: for each output the worst sample, or all of them."""
    rows = []
    for report in reports:
        outputs: dict[str, list[Comparison]] = {}
        for comparison in report.comparisons:
            outputs.setdefault(comparison.output, []).append(comparison)
        for output, comparisons in outputs.items():
            count = () if verbose else (len(comparisons),)
            for comparison in comparisons if verbose else [_worst(comparisons)]:
                verdict = ": ".join(filter(None, ("ok" if comparison.ok else "BROKEN", comparison.reason)))
                errors = (f"{x:.2e}" for x in (comparison.max_abs, comparison.max_rel, comparison.allowed))
                rows.append((report.candidate, output, *count, comparison.sample, *errors, verdict))
    sample = ("sample",) if verbose else ("samples", "worst sample")
    return table(title, ("candidate", "output", *sample, "max |error|", "relative", "allowed", ""), rows)


def _worst(comparisons: Iterable[Comparison]) -> Comparison:
    return max(comparisons, key=lambda comparison: (not comparison.ok, comparison.severity))


def _pairs(got: Mapping[str, _Array], want: Mapping[str, _Array]) -> list[tuple[str, _Array | None, _Array | None]]:
    if len(got) == len(want) and set(got) != set(want):
        return [(name, got[name], value) for name, value in zip(got, want.values(), strict=True)]
    names = [*want, *(name for name in got if name not in want)]
    return [(name, got.get(name), want.get(name)) for name in names]


def _compare(
    sample: str,
    output: str,
    got: _Array | None,
    want: _Array | None,
    rtol: float | None,
    atol: float | None,
    precision: str | None,
) -> Comparison:
    def incomparable(reason: str) -> Comparison:
        shape, dtype = () if want is None else want.shape, "" if got is None else got.dtype.name
        return Comparison(sample, output, False, reason, shape, dtype)

    if got is None:
        return incomparable("the candidate lacks this output")
    if want is None:
        return incomparable("the truth has no such output")
    kind = _kind(want.dtype)
    if _kind(got.dtype) != kind:
        return incomparable(f"the candidate gives {got.dtype.name} where the truth has {want.dtype.name}")
    if kind not in ("floating", "integer", "bool"):
        return incomparable(f"{want.dtype.name} outputs cannot be compared")
    if got.shape != want.shape:
        return incomparable(f"the candidate gives shape {got.shape} where the truth has {want.shape}")
    rtol, atol = _tolerance(got.dtype, rtol, atol, precision)
    exact_got, exact_want = got.astype(np.float64), want.astype(np.float64)

    def values_at(position: np.intp) -> dict[str, Any]:
        index = tuple(map(int, np.unravel_index(position, want.shape)))
        return {"index": index, "got": float(exact_got[index]), "want": float(exact_want[index])}

    result = partial(Comparison, sample, output, shape=want.shape, dtype=got.dtype.name, rtol=rtol, atol=atol)
    if want.size == 0:
        reason = "the output is empty: nothing but its shape was compared"
        return result(ok=True, reason=reason, allowed=atol, max_abs=0.0, max_rel=0.0)
    for values, reason in (
        (exact_want, "the truth itself is not finite, so the check proves nothing"),
        (exact_got, "the candidate is not finite where the truth is"),
    ):
        bad = ~np.isfinite(values)
        if bad.any():
            return result(ok=False, reason=reason, **values_at(bad.argmax()))
    with np.errstate(over="ignore"):
        error = np.abs(exact_got - exact_want)
    if want.dtype.kind in "iu":
        # float64 rounds away a small difference of two large integers.
        error = np.maximum(error, got != want)
    scale, worst = float(np.abs(exact_want).max()), float(error.max())
    allowed = atol + rtol * scale
    reason = ""
    if not worst <= allowed:
        reason = f"off by {worst:.3g}, {allowed:.3g} allowed"
    elif scale <= atol:
        reason = "the truth is zero within atol everywhere, which proves little"
    elif want.size > 1 and bool((exact_want == exact_want.flat[0]).all()):
        reason = "the truth is the same everywhere, which proves little"
    relative = worst / scale if scale else (math.inf if worst else 0.0)
    return result(
        ok=worst <= allowed,
        reason=reason,
        allowed=allowed,
        max_abs=worst,
        max_rel=relative,
        **values_at(error.argmax()),
    )


def _tolerance(
    dtype: np.dtype[Any], rtol: float | None, atol: float | None, precision: str | None
) -> tuple[float, float]:
    if _kind(dtype) != "floating":
        return 0.0, 0.0  # integers and truth values have no rounding
    default = DEFAULT_TOLERANCE.get(precision or dtype.name, DEFAULT_TOLERANCE["float64"])
    return default.rtol if rtol is None else rtol, default.atol if atol is None else atol


def _allowed(got: _Array, want: _Array, rtol: float | None, atol: float | None, precision: str | None) -> float:
    rtol, atol = _tolerance(got.dtype, rtol, atol, precision)
    return atol + rtol * float(np.abs(want if want.size else got).max(initial=0)) if rtol or atol else 0.0


def _kind(dtype: np.dtype[Any]) -> str:
    # bfloat16 is not NumPy's own: its kind is "V".
    if dtype.name in DTYPES:
        return "floating"
    return {"f": "floating", "i": "integer", "u": "integer", "b": "bool"}.get(dtype.kind, dtype.name)


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_json(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
