"""What a network picks by comparing numbers: rounding may change it and raises no alarm, and nothing else may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploynorm._check import Report, check
from deploynorm.inputs import TensorSpec, row_groups
from deploynorm.run import Runner
from deploynorm.run.eager import EagerRunner

Outputs = Mapping[str, np.ndarray]

SCORES = np.array([0.9, 0.8, 0.8 - 1e-6, 0.6, 0.5, 0.2])
LABELS = np.array([1, 2, 0, 2, 1, 0])
BOXES = np.arange(24.0).reshape(6, 4) * np.array([1.0, 3.0, 2.0, 5.0])


class Detections(Runner):
    """Gives the same outputs whatever it is fed; as the truth, others when its weights are off by a rounding."""

    inputs = ()

    def __init__(self, outputs: Outputs, near: tuple[Outputs, ...] = (), grouped: bool = False) -> None:
        self.name, self.output_names = "fixed", tuple(outputs)
        self.row_groups = (tuple(outputs),) if grouped else ()
        self.outputs, self.near = outputs, near

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(self.outputs)

    def nearby(self, feeds: Mapping[str, np.ndarray], eps: float, times: int) -> Iterator[Outputs]:
        yield from self.near

    def close(self) -> None:
        pass


def rows(*places: int, **changes: float) -> dict[str, np.ndarray]:
    """Some of the rows, in this order; or with one value of the first changed."""
    at = list(places)
    found = {"boxes": BOXES[at], "scores": SCORES[at], "labels": LABELS[at]}
    for name, by in changes.items():
        found[name].reshape(-1)[0] += int(by) if name == "labels" else by
    return found


def judged(got: Outputs, near: tuple[Outputs, ...] = (), want: Outputs | None = None, grouped: bool = True) -> Report:
    got = {name: x if name == "labels" else x.astype(np.float32) for name, x in got.items()}
    want = rows(0, 1, 2, 3, 4, 5) if want is None else want
    return check(Detections(got, grouped=grouped), Detections(want, near), [("noise", {})])


ALL = rows(0, 1, 2, 3, 4, 5)
WITHOUT_3, WITHOUT_LAST = rows(0, 1, 2, 4, 5), rows(0, 1, 2, 3, 4)

HOLD = {
    "the same": (ALL, (), ""),
    "two equal scores change places": (rows(0, 2, 1, 3, 4, 5), (), ""),
    "a row at the threshold is missing": (WITHOUT_LAST, (WITHOUT_LAST, ALL), "5 rows agree, and 1 are there or not"),
    "a row in the middle is missing": (WITHOUT_3, (ALL, WITHOUT_3), "5 rows agree, and 1 are there or not"),
    "and equal scores besides": (rows(0, 2, 1, 4, 5), (WITHOUT_3,), "5 rows agree, and 1 are there or not"),
    "most are there or not": (rows(0, 1), (rows(0, 1),), "2 rows agree, and 4 are there or not as rounding alone may"),
    "none is left": (rows(), (rows(),), "0 rows agree, and 6 are there or not as rounding alone may have it, which"),
}  # fmt: skip


@pytest.mark.parametrize(("got", "near", "remark"), HOLD.values(), ids=HOLD)
def test_what_rounding_may_change_holds(got: Outputs, near: tuple[Outputs, ...], remark: str) -> None:
    report = judged(got, near)
    assert report, report
    assert all(each.reason.startswith(remark) for each in report.comparisons), report
    assert all(each.severity < 0.1 for each in report.comparisons)


def test_a_row_that_rounding_may_bring_holds() -> None:
    assert judged(ALL, (ALL,), want=WITHOUT_3)
    assert "1 of 6 rows are not in the truth, the first at 3" in str(judged(ALL, (WITHOUT_3,), want=WITHOUT_3))


BREAK = {
    "two scores that differ change places": (rows(1, 0, 2, 3, 4, 5), (ALL,), "the rows are in another order"),
    "the other way round": (rows(5, 4, 3, 2, 1, 0), (ALL,), "the rows are in another order"),
    "a row is always there": (WITHOUT_3, (ALL, ALL), "1 of 6 rows of the truth are missing, the first at 3"),
    "another row is there or not": (WITHOUT_3, (WITHOUT_LAST,), "1 of 6 rows of the truth are missing"),
    "no truth near": (WITHOUT_3, (), "1 of 6 rows of the truth are missing"),
    "a row twice": (rows(0, 0, 1, 2, 3, 4, 5), (ALL,), "1 of 7 rows are not in the truth"),
    "a box is off": (rows(0, 1, 2, 3, 4, 5, boxes=0.1), (ALL,), "1 of 6 rows are not in the truth, the first at 0"),
    "a score is off": (rows(0, 1, 2, 3, 4, 5, scores=1e-3), (ALL,), "1 of 6 rows are not in the truth"),
    "a label is another": (rows(0, 1, 2, 3, 4, 5, labels=1), (ALL,), "1 of 6 rows are not in the truth"),
    "more boxes than scores": ({**ALL, "boxes": BOXES[[0, 1, 2]]}, (ALL,), "gives shape (3, 4)"),
    "a score is not finite": (rows(0, 1, 2, 3, 4, scores=np.nan), (WITHOUT_LAST,), "gives shape (5,)"),
    "none is there": (rows(), (ALL,), "6 of 6 rows of the truth are missing"),
}  # fmt: skip


@pytest.mark.parametrize(("got", "near", "reason"), BREAK.values(), ids=BREAK)
def test_what_rounding_cannot_change_breaks(got: Outputs, near: tuple[Outputs, ...], reason: str) -> None:
    report = judged(got, near)
    assert not report
    assert reason in str(report), report


def test_a_constant_output_does_not_sort_the_rows() -> None:
    """The number of an image, as a float: sorted in every order."""

    def with_image(at: list[int]) -> Outputs:
        return {**rows(*at), "image": np.zeros(len(at))}

    want = with_image([0, 1, 2, 3, 4, 5])
    assert judged(with_image([0, 2, 1, 3, 4, 5]), (want,), want=want)
    assert "the rows are in another order" in str(judged(with_image([1, 0, 2, 3, 4, 5]), (want,), want=want))


def test_every_output_that_sorts_the_rows_counts() -> None:
    want = {"scores": SCORES[:4], "image": np.array([0.0, 0, 1, 1]), "boxes": BOXES[:4]}
    swapped = {name: x[[0, 2, 1, 3]] for name, x in want.items()}  # the scores are alike, the images are not
    assert "the rows are in another order" in str(judged(swapped, (want,), want=want))
    assert judged(swapped, (want, swapped), want=want)


@pytest.mark.parametrize(("kept", "ok"), [([], False), ([0], True), ([1], True), ([0, 1], False)])
def test_of_two_rows_that_exclude_each_other_one_is_there(kept: list[int], ok: bool) -> None:
    """Of two boxes that overlap and score alike, suppression keeps either."""
    one, other = rows(1), rows(2)
    report = judged(rows(*[1 + i for i in kept]), (one, other), want=one)
    assert bool(report) is ok
    assert ok or f"{len(kept)} rows, where the truth and those near have 1 to 1" in str(report)


def test_rows_are_matched_only_where_values_decide_their_number() -> None:
    assert not judged(rows(0, 2, 1, 3, 4, 5), grouped=False)


def test_rows_that_no_output_sorts_keep_their_order() -> None:
    want = {"boxes": BOXES[[3, 0, 5]], "labels": LABELS[[3, 0, 5]]}
    assert not judged({"boxes": BOXES[[0, 3, 5]], "labels": LABELS[[0, 3, 5]]}, (want,), want=want)
    less = {"boxes": BOXES[[3, 5]], "labels": LABELS[[3, 5]]}
    assert judged(less, (less,), want=want)


@pytest.mark.parametrize(
    ("got", "near", "ok"),
    [([0, 1, 2, 2], [0, 1, 2, 2], True), ([0, 1, 2, 2], [3, 1, 2, 0], False), ([3, 1, 2, 2], [0, 1, 2, 2], False)],
)
def test_an_integer_may_be_that_which_a_rounding_gives(got: list[int], near: list[int], ok: bool) -> None:
    want = {"classes": np.array([0, 1, 2, 0])}
    report = judged(
        {"labels": np.array(got)}, ({"labels": np.array(near)},), want={"labels": want["classes"]}, grouped=False
    )
    assert bool(report) is ok
    assert not ok or report.worst.reason == "1 of 4 values are as rounding alone may have them"


def test_row_groups_are_of_sizes_that_values_decide() -> None:
    shapes = {
        "a": ("Min(300, u5)", 4),
        "b": ("N", 4),
        "c": ("Min(300, u5)",),
        "d": ("u0 + u1",),
        "e": ("2*u1_N",),
        "f": (3,),
    }
    outputs = [TensorSpec(name, shape, "float32") for name, shape in shapes.items()]
    assert row_groups([TensorSpec("x", ("N", 3), "float32")], outputs) == (("a", "c"), ("d",))
    assert row_groups([TensorSpec("x", ("u0", "u1"), "float32")], outputs) == (("a", "c"),)


class Argmax(nn.Module):
    """Labels of pixels, and those of them that are above a threshold."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y.argmax(1), y[y > 0.5]


def test_the_truth_is_run_nearby_and_set_back() -> None:
    spec = TensorSpec("x", (1, 3, 40, 40), "float32")
    x = np.random.default_rng(0).standard_normal((1, 3, 40, 40)).astype(np.float32)
    with EagerRunner(Argmax(), [spec], dtype=torch.float64) as truth:
        before = truth.infer({"x": x})
        near = list(truth.nearby({"x": x}, 1e-2, 3))
        assert len(near) == 3
        assert all(0 < np.count_nonzero(each["output_0"] != before["output_0"]) < 700 for each in near)
        assert len({len(each["output_1"]) for each in (before, *near)}) > 1
        for name, value in truth.infer({"x": x}).items():
            assert np.array_equal(value, before[name])
        closest = next(iter(truth.nearby({"x": x}, 1e-12, 1)))
        assert np.array_equal(closest["output_0"], before["output_0"])
