from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from deploynorm._check import DEFAULT_TOLERANCE, Comparison, Report, check
from deploynorm.errors import InputError, ParityError
from deploynorm.inputs import TensorSpec
from deploynorm.layers import FRN2d
from deploynorm.run import Runner
from deploynorm.run.eager import EagerRunner

Array = np.ndarray
Outputs = Mapping[str, Array]
SAMPLES = [("noise", {})]


class Fixed(Runner):
    """Gives the same outputs whatever it is fed."""

    inputs = ()

    def __init__(self, outputs: Outputs | Array, name: str = "fixed") -> None:
        self.name = name
        self.outputs = {"y": outputs} if isinstance(outputs, np.ndarray) else dict(outputs)
        self.output_names = tuple(self.outputs)
        self.fed: list[Mapping[str, Array]] = []

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.fed.append(feeds)
        return dict(self.outputs)

    def close(self) -> None:
        pass


WANT = np.random.default_rng(0).normal(size=(3, 8, 5, 7))
GOT = WANT.astype(np.float32)
AT = (1, 3, 2, 4)


def planted(index: tuple[int, ...], value: float) -> Array:
    got = GOT.copy()
    got[index] = value
    return got


def compare(got: Outputs | Array, want: Outputs | Array, **tolerances: float) -> Report:
    return check(Fixed(got, "candidate"), Fixed(want, "truth"), SAMPLES, **tolerances)


def one_channel(factor: float) -> Array:
    got = GOT.copy()
    got[:, 5] *= np.float32(factor)
    return got


REJECTED: dict[str, tuple[Outputs | Array, Outputs | Array, str]] = {
    "times 2": (GOT * 2, WANT, "off by"),
    "sign": (-GOT, WANT, "off by"),
    "two channels swapped": (GOT[:, [1, 0, 2, 3, 4, 5, 6, 7]], WANT, "off by"),
    "shifted by one pixel": (np.roll(GOT, 1, axis=3), WANT, "off by"),
    "batch reversed": (GOT[::-1], WANT, "off by"),
    "one channel 1.01 times as large": (one_channel(1.01), WANT, "off by"),
    "zeros": (np.zeros_like(GOT), WANT, "off by"),
    "one value": (planted(AT, float(WANT[AT]) + 0.01), WANT, "off by"),
    "one value a little over the tolerance": (planted(AT, float(WANT[AT]) + 4e-4), WANT, "off by"),
    "small outputs, sign": (GOT * np.float32(-1e-5), WANT * 1e-5, "off by"),
    "float16 where float32 was asked for, as a cast": (GOT.astype(np.float16).astype(np.float32), WANT, "off by"),
    "one NaN": (planted(AT, math.nan), WANT, "the candidate is not finite"),
    "one infinity": (planted(AT, math.inf), WANT, "the candidate is not finite"),
    "NaN in the truth": (GOT, planted(AT, math.nan), "the truth itself is not finite"),
    "NaN in both": (planted(AT, math.nan), planted(AT, math.nan), "the truth itself is not finite"),
    "infinity in both": (planted(AT, math.inf), planted(AT, math.inf), "the truth itself is not finite"),
    "a shape that broadcasts": (GOT[:1], WANT[:1].repeat(3, 0), "gives shape (1, 8, 5, 7) where the truth has"),
    "a shape of as many values": (GOT.transpose(0, 1, 3, 2), WANT, "gives shape (3, 8, 7, 5) where the truth has"),
    "an axis too many": (GOT[None], WANT, "gives shape (1, 3, 8, 5, 7) where the truth has"),
    "integers": (GOT.astype(np.int64), WANT.astype(np.int64).astype(np.float64), "gives int64 where the truth has"),
    "an integer off by one": (np.arange(5) + (np.arange(5) == 3), np.arange(5), "off by 1, 0 allowed"),
    "a large integer off by one": (np.array([1, 2**60 + 1]), np.array([1, 2**60]), "off by 1, 0 allowed"),
    "a truth value": (np.array([True, False]), np.array([True, True]), "off by 1, 0 allowed"),
    "complex": (WANT * 1j, WANT * 1j, "complex128 outputs cannot be compared"),
    "an output missing": ({"y": GOT}, {"y": WANT, "z": WANT}, "the candidate lacks this output"),
    "an output too many": ({"y": GOT, "z": GOT}, {"y": WANT}, "the truth has no such output"),
    "outputs swapped": ({"y": GOT, "z": -GOT}, {"y": -WANT, "z": WANT}, "off by"),
    "no outputs": ({}, {}, "the truth has no outputs"),
}


@pytest.mark.parametrize(("got", "want", "reason"), REJECTED.values(), ids=REJECTED)
def test_it_rejects(got: Outputs | Array, want: Outputs | Array, reason: str) -> None:
    report = compare(got, want)
    assert not report
    assert reason in report.worst.reason
    assert not report.worst.ok
    with pytest.raises(ParityError, match="sample 'noise', output '") as caught:
        report.raise_if_broken()
    assert caught.value.exit_code == 1


NOISE = np.random.default_rng(1).normal(size=WANT.shape)

ACCEPTED: dict[str, tuple[Outputs | Array, Outputs | Array, str]] = {
    "rounding to float32": (GOT, WANT, ""),
    "noise of float32": ((WANT * (1 + 3e-7 * NOISE)).astype(np.float32), WANT, ""),
    "rounding of values near zero beside large ones": ((WANT + 1e-5 * NOISE).astype(np.float32), WANT, ""),
    "rounding to float16": (WANT.astype(np.float16), WANT, ""),
    "rounding to bfloat16": (WANT.astype(ml_dtypes.bfloat16), WANT, ""),
    "float64": (WANT * (1 + 1e-14 * NOISE), WANT, ""),
    "large float16": ((WANT * 1e4).astype(np.float16), WANT * 1e4, ""),
    "equal integers of two widths": (np.arange(5, dtype=np.int32), np.arange(5), ""),
    "equal truth values": (np.array([True, False]), np.array([True, False]), ""),
    "a scalar": (np.array(1.5, np.float32), np.array(1.5), ""),
    "an empty batch": (GOT[:0], WANT[:0], "the output is empty"),
    "zeros": (GOT * 0, WANT * 0, "the truth is zero within atol everywhere"),
    "values below atol": (GOT * np.float32(1e-9), WANT * 1e-9, "the truth is zero within atol everywhere"),
    "a constant": (GOT * 0 + 1, WANT * 0 + 1, "the truth is the same everywhere"),
    "names in another order": ({"z": -GOT, "y": GOT}, {"y": WANT, "z": -WANT}, ""),
    "other names, as many": ({"a": GOT, "b": -GOT}, {"y": WANT, "z": -WANT}, ""),
}


@pytest.mark.parametrize(("got", "want", "remark"), ACCEPTED.values(), ids=ACCEPTED)
def test_it_accepts_and_remarks_on_what_proves_little(got: Outputs | Array, want: Outputs | Array, remark: str) -> None:
    report = compare(got, want)
    report.raise_if_broken()
    assert report
    assert report.worst.reason.startswith(remark)
    assert bool(report.worst.reason) == bool(remark)


def frn_network(eps: float) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), FRN2d(8, eps=eps, tlu=False), nn.Conv2d(8, 4, 3))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def images(scale: float) -> list[tuple[str, dict[str, Array]]]:
    rng = np.random.default_rng(0)
    return [(f"{n}", {"x": (scale * rng.normal(size=(n, 3, 9, 8))).astype(np.float32)}) for n in (1, 3)]


def network_check(candidate: nn.Module, truth: nn.Module, scale: float) -> Report:
    """Two networks on two samples of values of that size, the truth in float64."""
    spec = [TensorSpec("x", ("N", 3, "H", "W"), "float32")]
    with EagerRunner(candidate, spec) as got, EagerRunner(truth, spec, dtype=torch.float64) as want:
        return check(got, want, images(scale))


def test_a_network_in_float32_agrees_with_itself_in_float64_and_with_no_other() -> None:
    net = frn_network(1e-6)
    report = network_check(net, net, 1e-3)
    assert report
    assert [comparison.sample for comparison in report.comparisons] == ["1", "3"]
    assert 0 < report.worst.max_rel < 1e-5
    assert (report.candidate, report.truth) == ("eager", "eager float64")
    assert not network_check(frn_network(1e-5), net, 1e-3), "another eps, where activations are small"
    assert not network_check(copy.deepcopy(net).half().float(), net, 1.0), "weights cut to float16"


def test_the_report_points_at_the_planted_value() -> None:
    report = compare(planted(AT, 9.0), WANT)
    (comparison,) = report.comparisons
    scale = float(np.abs(WANT).max())
    assert comparison == Comparison(
        sample="noise",
        output="y",
        shape=(3, 8, 5, 7),
        dtype="float32",
        rtol=1e-4,
        atol=1e-7,
        allowed=pytest.approx(1e-7 + 1e-4 * scale),
        max_abs=pytest.approx(9.0 - WANT[AT]),
        max_rel=pytest.approx((9.0 - WANT[AT]) / scale),
        index=AT,
        got=9.0,
        want=float(WANT[AT]),
        ok=False,
        reason=comparison.reason,
    )
    want, allowed = re.escape(f"{WANT[AT]}"), re.escape(f"{comparison.allowed:.3g}")
    with pytest.raises(
        ParityError,
        match=rf"^sample 'noise', output 'y': off by .* allowed \(1 of 1 comparisons fail\)\. Got 9\.0 at "
        rf"\(1, 3, 2, 4\) from candidate; expected {want} from truth, within {allowed}\. Fix: ",
    ):
        report.raise_if_broken()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_report_points_at_the_first_value_that_is_not_finite(value: float) -> None:
    (comparison,) = compare(planted(AT, value), WANT).comparisons
    assert comparison.index == AT
    assert str(comparison.got) == str(value)
    assert comparison.want == WANT[AT]


def test_the_bound_is_atol_plus_rtol_times_the_largest_value() -> None:
    want = np.array([0.0, 4.0, -8.0])
    exact = want + np.array([0.5 + 8 * 0.25, 0.0, 0.0])
    over = want + np.array([np.nextafter(2.5, 3), 0.0, 0.0])
    assert compare(exact, want, rtol=0.25, atol=0.5)
    assert not compare(over, want, rtol=0.25, atol=0.5)
    assert compare(over, want, rtol=0.25, atol=0.5).worst.allowed == 2.5


def test_a_given_tolerance_stands_in_for_the_default_alone_or_with_the_other() -> None:
    (loose,) = compare(GOT, WANT, rtol=0.1).comparisons
    assert (loose.rtol, loose.atol) == (0.1, DEFAULT_TOLERANCE["float32"].atol)
    (tight,) = compare(GOT, WANT, atol=0.0).comparisons
    assert (tight.rtol, tight.atol) == (DEFAULT_TOLERANCE["float32"].rtol, 0.0)
    assert not compare(GOT, WANT, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", DEFAULT_TOLERANCE)
def test_the_default_is_that_of_the_candidates_dtype(dtype: str) -> None:
    (comparison,) = compare(WANT.astype(dtype), WANT).comparisons
    assert (comparison.rtol, comparison.atol, comparison.dtype) == (*DEFAULT_TOLERANCE[dtype][:2], dtype)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_network_that_computes_in_half_is_judged_so_whatever_type_its_outputs_have(precision: str) -> None:
    candidate = Fixed(GOT)
    candidate.precision = precision
    report = check(candidate, Fixed(WANT), SAMPLES)
    (comparison,) = report.comparisons
    assert (comparison.rtol, comparison.atol, comparison.dtype) == (*DEFAULT_TOLERANCE[precision][:2], "float32")
    assert report.precision == report.to_dict()["precision"] == precision


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_a_tolerance_that_would_pass_everything_or_nothing_is_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"check: {name} must be finite and not negative"):
        compare(GOT, WANT, **{name: value})


def test_a_network_where_a_runner_belongs_is_refused() -> None:
    with pytest.raises(InputError, match=r"check: not a runner\. Got Identity\. Fix: .*EagerRunner"):
        check(nn.Identity(), nn.Identity(), [])  # type: ignore[arg-type]


def test_a_check_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no samples: nothing was compared"):
        check(Fixed(GOT), Fixed(WANT), [])
    assert not Report("candidate", "truth", ())


def test_both_get_the_same_feeds_and_every_sample_is_compared() -> None:
    candidate, truth = Fixed({"y": GOT, "z": GOT}), Fixed({"y": WANT, "z": WANT})
    samples = [("first", {"x": GOT}), ("second", {"x": -GOT})]
    report = check(candidate, truth, iter(samples))
    assert candidate.fed == truth.fed == [feeds for _, feeds in samples]
    compared = [(comparison.sample, comparison.output) for comparison in report.comparisons]
    assert compared == [(sample, output) for sample in ("first", "second") for output in "yz"]


def test_one_broken_output_among_many_breaks_the_report_and_is_the_worst() -> None:
    got = {"a": GOT, "b": planted(AT, 9.0), "c": GOT * 2}
    report = compare(got, dict.fromkeys(got, WANT))
    assert [comparison.ok for comparison in report.comparisons] == [True, False, False]
    assert report.worst.output == "b"
    got["d"] = planted(AT, math.nan)
    assert compare(got, dict.fromkeys(got, WANT)).worst.output == "d"


def test_the_worst_of_a_report_that_holds_is_the_nearest_to_its_tolerance() -> None:
    got = {"a": GOT, "b": planted(AT, float(WANT[AT]) + 1e-4), "c": np.arange(3)}
    report = compare(got, {"a": WANT, "b": WANT, "c": np.arange(3)})
    assert report
    assert report.worst.output == "b"


def test_a_report_survives_json() -> None:
    report = compare({"a": GOT, "b": planted(AT, math.nan), "c": planted(AT, -math.inf)}, dict.fromkeys("abc", WANT))
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["ok"] is False
    assert (data["candidate"], data["truth"]) == ("candidate", "truth")
    a, b, c = data["comparisons"]
    assert (a["sample"], a["output"], a["shape"], a["ok"], a["reason"]) == ("noise", "a", [3, 8, 5, 7], True, "")
    assert (b["got"], b["max_abs"], b["index"], b["want"]) == ("nan", "nan", list(AT), WANT[AT])
    assert c["got"] == "-inf"
