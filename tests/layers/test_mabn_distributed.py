"""MABN on two real processes against one process that has both their batches.

Each process runs this file as a program, works through all of RUNS, and leaves what it got in a folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tolerances import EXACT, FLOAT64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from deploynorm.errors import ModelError
from deploynorm.layers import CenConv2d, MABN2d
from deploynorm.layers.recalibration import recalibrate

pytestmark = pytest.mark.slow  # two processes import torch

C = 3
PROCESSES = 2
EQUAL = [(2, 2)] * 10
UNEQUAL = [(2, 2), (1, 3), (2, 2), (0, 3), (2, 2), (4, 0), (2, 2), (5, 1), (0, 0), (2, 2)]

Results = list[dict[str, dict[str, Any]]]
"""What each process got in each run."""


class Net(nn.Module):
    """Two MABN, the second of them used twice, and a layer that the forward pass leaves out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        settings = {"warmup": 3, "renorm_start": 6, "moving_batch_size": 8, **settings}
        self.conv1, self.norm1 = CenConv2d(2, C, 3, bias=False), MABN2d(C, **settings)
        self.conv2, self.norm2 = CenConv2d(C, C, 1, bias=False), MABN2d(C, **settings)
        self.fc = nn.Linear(C, 1)
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(self.norm2(self.conv2(x)).tanh()))
        out: Tensor = self.fc(x.square().mean((2, 3)))
        return out


def new_net(**settings: Any) -> Net:
    torch.manual_seed(0)
    return Net(**settings).double()


def data(sizes: list[tuple[int, int]]) -> list[list[Tensor]]:
    """One batch for each step and process."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(n, 2, 6, 5, generator=generator, dtype=torch.float64) + 0.3 for n in step] for step in sizes]


def mean_loss(y: Tensor) -> Tensor:
    """The mean over a process's samples; 0 where it has none."""
    return (y - 1).square().sum() / max(len(y), 1)


def train(
    net: Net,
    step_loss: Callable[[int], Tensor],
    steps: int,
    accumulate: int = 1,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Tensor]:
    """The state after the steps, and the gradients of the last; an optimiser step follows each `accumulate` of them."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for step in range(steps):
        last = (step + 1) % accumulate == 0
        with nullcontext() if last else no_sync():
            (step_loss(step) / accumulate).backward()
        if last:
            optimizer.step()
            gradients = {f"gradient of {n}": p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
            optimizer.zero_grad()
    return {**net.state_dict(), **gradients}


def in_ddp(
    rank: int,
    sizes: list[tuple[int, int]],
    accumulate: int = 1,
    wrapped: Callable[[Net], nn.Module] = lambda net: net,
    **options: bool,
) -> dict[str, Tensor]:
    net = new_net()
    if not options.get("find_unused_parameters"):
        net.unused.requires_grad_(False)
    ddp = DistributedDataParallel(wrapped(net), **options)
    batches = data(sizes)
    return train(net, lambda step: mean_loss(ddp(batches[step][rank])), len(sizes), accumulate, ddp.no_sync)


class Checkpointed(nn.Module):
    """The network, with nothing kept for its backward pass but its input."""

    def __init__(self, net: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant)
        return out


def in_one_process(sizes: list[tuple[int, int]], accumulate: int = 1) -> dict[str, Tensor]:
    """One process with both batches of each step, and the mean of their losses, as DDP takes the mean of gradients."""
    net = new_net()
    batches = data(sizes)

    def loss(step: int) -> Tensor:
        outputs = net(torch.cat(batches[step])).split([len(batch) for batch in batches[step]])
        return torch.stack([mean_loss(y) for y in outputs]).mean()

    return train(net, loss, len(sizes), accumulate)


def each_alone(rank: int) -> dict[str, Tensor]:
    """Processes that share no statistics: each in a group of its own."""
    groups = [dist.new_group([process]) for process in range(PROCESSES)]
    net = new_net(process_group=groups[rank])
    return train(net, lambda step: mean_loss(net(data(EQUAL)[step][rank])), len(EQUAL))


def recalibrated(rank: int) -> dict[str, Tensor]:
    """Two batches in one process and one in the other."""
    net = new_net()
    recalibrate(DistributedDataParallel(net.requires_grad_(True)), [step[rank] for step in data([(2, 3), (1, 0)])])
    return net.state_dict()


def recalibrated_beside_a_failure(rank: int) -> dict[str, Any]:
    net = new_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = [step[rank] for step in data(EQUAL)]

    def forward(model: nn.Module, batch: Tensor) -> None:
        # In the middle of the second pass or a later one: norm1 is set by then.
        if rank == 1 and batch is not batches[0] and model.norm1.running_var[0] != 1:
            raise OSError("the disk is gone")
        model(batch)

    try:
        recalibrate(net, batches, forward=forward)
        error = "none"
    except (ModelError, OSError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    unchanged = all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    return {"error": error, "unchanged": unchanged}


DDP_RUNS: dict[str, tuple[list[tuple[int, int]], dict[str, Any]]] = {
    "plain": (EQUAL, {}),
    "own_buffers": (EQUAL, {"broadcast_buffers": False}),
    "find_unused": (EQUAL, {"find_unused_parameters": True}),
    "static_graph": (EQUAL, {"static_graph": True}),
    "accumulating": (EQUAL, {"accumulate": 2}),
    "accumulating_own_buffers": (EQUAL, {"accumulate": 2, "broadcast_buffers": False}),
    "unequal_and_empty": (UNEQUAL, {}),
    "checkpointed": (UNEQUAL, {"wrapped": Checkpointed}),
    "checkpointed_reentrant": (EQUAL, {"wrapped": partial(Checkpointed, reentrant=True)}),
    "compiled_and_checkpointed": (
        EQUAL,
        {"wrapped": lambda net: Checkpointed(torch.compile(net, fullgraph=True, backend="aot_eager"))},
    ),
}
RUNS: dict[str, Callable[[int], dict[str, Any]]] = {
    **{name: partial(in_ddp, sizes=sizes, **options) for name, (sizes, options) in DDP_RUNS.items()},
    "each_alone": each_alone,
    "recalibrated": recalibrated,
    "beside_a_failure": recalibrated_beside_a_failure,
}


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "MABN2d: an empty batch")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    torch.save({name: run(rank) for name, run in RUNS.items()}, f"{folder}/results{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment)
        for rank in range(PROCESSES)
    ]
    try:
        assert [worker.wait(timeout=600) for worker in workers] == [0] * PROCESSES
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [torch.load(folder / f"results{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.filterwarnings("ignore:MABN2d. an empty batch")
@pytest.mark.parametrize("run", DDP_RUNS)
def test_fault_23_two_processes_train_as_one_with_both_their_batches(run: str, results: Results) -> None:
    """Weights, gradients and every statistic. The listing kept each process's own, and saved those of process 0."""
    sizes, options = DDP_RUNS[run]
    expected = in_one_process(sizes, options.get("accumulate", 1))
    moved = {name for name, value in new_net().state_dict().items() if not torch.equal(value, expected[name])}
    assert {"norm1.recent_x2", "norm1.recent_gz", "norm2.running_var", "conv1.weight"} <= moved
    for result in results:
        got, want = (
            {name: value for name, value in state.items() if "unused" not in name} for state in (result[run], expected)
        )
        torch.testing.assert_close(got, want, **FLOAT64.kwargs())


@pytest.mark.parametrize("run", DDP_RUNS)
def test_the_checkpoint_of_process_0_is_everybodys(run: str, results: Results) -> None:
    of_0, of_1 = (result[run] for result in results)
    torch.testing.assert_close(of_0, of_1, **EXACT.kwargs())


def test_a_group_of_its_own_gives_a_process_its_own_statistics(results: Results) -> None:
    for rank, result in enumerate(results):
        net = new_net()
        batches = [step[rank] for step in data(EQUAL)]
        expected = train(net, lambda step, net=net, batches=batches: mean_loss(net(batches[step])), len(EQUAL))
        torch.testing.assert_close(result["each_alone"], expected, **FLOAT64.kwargs())


def test_recalibration_is_over_the_samples_of_all_processes(results: Results) -> None:
    net = new_net()
    recalibrate(net, [batch for step in data([(2, 3), (1, 0)]) for batch in step if len(batch)])
    for result in results:
        torch.testing.assert_close(result["recalibrated"], dict(net.state_dict()), **FLOAT64.kwargs())


def test_recalibration_that_fails_in_one_process_fails_in_all_and_changes_none(
    results: Results,
) -> None:
    assert [result["beside_a_failure"] for result in results] == [
        {"error": "ModelError: recalibrate: another process failed. Fix: see its message.", "unchanged": True},
        {"error": "OSError: the disk is gone", "unchanged": True},
    ]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
