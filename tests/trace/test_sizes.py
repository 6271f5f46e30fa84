"""Which sizes a network is found to take: one network of each kind, what is found, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploynorm.inputs import AxisSizes
from deploynorm.trace import find_sizes


class Apply(nn.Module):
    """A network whose forward is a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class UNet(nn.Module):
    """Two halvings: H and W have to be multiples of 4. A second input comes at full size or at half."""

    def __init__(self, *, half: bool = False) -> None:
        super().__init__()
        self.half = half

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        pool, up = F.max_pool2d, F.interpolate
        full = image if self.half else torch.cat([image, depth], 1)
        middle = torch.cat([pool(full, 2), depth], 1) if self.half else pool(full, 2)
        low = torch.cat([middle, up(pool(middle, 2), scale_factor=2)], 1)
        return torch.cat([full, up(low, scale_factor=2)], 1)


class Case(NamedTuple):
    network: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    groups: list[dict[tuple[int, int], int]]
    notes: list[str]


def both(axis: int, step: int) -> dict[tuple[int, int], int]:
    """This axis of two inputs."""
    return {(0, axis): step, (1, axis): step}


BATCH = {(0, 0): 1}
H, W = {(0, 2): 1}, {(0, 3): 1}
IMAGE, SEQUENCE = (2, 3, 8, 8), (2, 3, 16)
REFUSED = "since the network refuses every other H and W that was tried"

CASES = {
    "convolution": Case(nn.Conv2d(3, 4, 3), (IMAGE,), [BATCH, H, W], []),
    "one axis": Case(nn.Conv1d(3, 4, 3), (SEQUENCE,), [BATCH, H], []),
    "vectors": Case(nn.Linear(3, 4), ((2, 3),), [BATCH], []),
    "classifier on a fixed map": Case(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), (IMAGE,), [BATCH], [f"only the batch was varied, {REFUSED}"]
    ),
    "nothing": Case(
        Apply(lambda x: x.reshape(2, 192) * torch.ones(2, 192)), (IMAGE,), [], [f"no size was varied, {REFUSED}"]
    ),
    "fixed batch": Case(Apply(lambda x: x + torch.ones(2, 1, 1, 1)), (IMAGE,), [H, W], []),
    "fixed height, as text recognition has it": Case(
        Apply(lambda x: x + torch.ones(32, 1)), ((2, 3, 32, 100),), [BATCH, W], []
    ),
    "square": Case(Apply(lambda x: x + x.transpose(2, 3)), (IMAGE,), [BATCH, H | W], ["H and W vary together"]),
    "patches of 7": Case(
        Apply(lambda x: F.pixel_unshuffle(x, 7)),
        ((2, 3, 28, 28),),
        [BATCH, {(0, 2): 7}, {(0, 3): 7}],
        ["H and W: multiples of 7"],
    ),
    "H of 8, W of 16": Case(
        Apply(lambda x: F.unfold(x, (8, 16), stride=(8, 16)).reshape(x.shape[0], 3, x.shape[2], x.shape[3])),
        ((2, 3, 32, 32),),
        [BATCH, {(0, 2): 8}, {(0, 3): 16}],
        ["H: multiples of 8", "W: multiples of 16"],
    ),
    "H of 8, any W": Case(
        Apply(lambda x: x.reshape(x.shape[0], 3, -1, 8, x.shape[3])),
        ((2, 3, 32, 32),),
        [BATCH, {(0, 2): 8}, W],
        ["H: multiples of 8"],
    ),
    "L of 2": Case(
        Apply(lambda x: x.reshape(x.shape[0], 3, -1, 2)), (SEQUENCE,), [BATCH, {(0, 2): 2}], ["L: multiples of 2"]
    ),
    "a batch that is broadcast": Case(Apply(torch.add), ((1, 3, 8, 8), IMAGE), [both(2, 1), both(3, 1)], []),
    "offset": Case(
        Apply(lambda x: F.pixel_unshuffle(x[..., 1:, 1:], 4)),
        ((2, 3, 9, 9),),
        [BATCH, {(0, 2): 4}, {(0, 3): 4}],
        ["H and W: 9 and multiples of 4 more or less"],
    ),
    "U-Net of two inputs": Case(
        UNet(),
        ((2, 3, 16, 16), (2, 1, 16, 16)),
        [both(0, 1), both(2, 4), both(3, 4)],
        ["H and W: multiples of 4"],
    ),
    "U-Net of two resolutions": Case(
        UNet(half=True),
        ((2, 3, 16, 16), (2, 1, 8, 8)),
        [both(0, 1), {(0, 2): 4, (1, 2): 2}, {(0, 3): 4, (1, 3): 2}],
        ["H and W vary in step: in0 by 4 and in1 by 2"],
    ),
    "two maps of sizes of their own": Case(
        Apply(lambda x, z: x.mean((2, 3)) + z.mean((2, 3))),
        (IMAGE, (2, 3, 5, 5)),
        [both(0, 1), H, W, {(1, 2): 1}, {(1, 3): 1}],
        [],
    ),
    "an input that has no batch": Case(Apply(torch.mul), (IMAGE, (1, 3, 1, 1)), [BATCH, H, W], []),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_found_and_said(name: str) -> None:
    network, shapes, groups, notes = CASES[name]
    examples = [torch.zeros(shape) for shape in shapes]
    found = find_sizes(network.eval(), examples)
    assert list(found.groups) == groups
    assert found.notes(found.places, [f"in{i}" for i in range(len(shapes))]) == notes
    assert found.shapes == shapes


def test_axes_that_are_fixed_in_the_file_need_no_note() -> None:
    found = find_sizes(Apply(lambda x: F.pixel_unshuffle(x, 2)), [torch.zeros(2, 3, 8, 8)])
    assert found.notes(found.places, ["x"]) == ["H and W: multiples of 2"]
    assert found.notes({(0, 0), (0, 3)}, ["x"]) == ["W: multiples of 2"]
    assert found.notes({(0, 0)}, ["x"]) == []
    assert found.kinds == {"batch", "spatial"}
    assert found.of_input(0) == (AxisSizes(2, 1, "0"), None, AxisSizes(8, 2, "1"), AxisSizes(8, 2, "2"))


def test_the_network_itself_is_not_run() -> None:
    """What forward keeps of an input would be in the graph that is traced afterwards."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.cached: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.cached = x
            return x + self.calls

    network = Counts()
    assert find_sizes(network, [torch.zeros(2, 3, 8, 8)]).kinds == {"batch", "spatial"}
    assert network.calls == 0
    assert network.cached is None


def test_a_larger_step_is_taken_only_where_a_smaller_one_is_refused() -> None:
    tried: list[tuple[int, ...]] = []

    def forward(x: Tensor) -> Tensor:
        tried.append(tuple(x.shape))
        return x

    find_sizes(Apply(forward), [torch.zeros(2, 3, 8, 8)])
    assert tried == [(3, 3, 10, 11), (3, 3, 9, 9)], "two runs are enough for a network that takes everything"
