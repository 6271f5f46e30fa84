"""The training recipe on two real processes, against one process that has the images of both.

torchrun starts this file as a program, twice; each process works through all of RUNS.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tolerances import FLOAT64
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from train_runs import assert_same_run, during_step, in_float64, load, read_log, run, short_runs

from deploynorm.models import train

pytestmark = pytest.mark.slow  # two processes import torch, and train

STEPS = 6
"""Steps of an epoch of 96 images, in batches of 16."""

LONG = ("--epochs", "2", "--batch-size", "16", "--amp", "bf16", "--accumulate", "2", "--ema", "0.9")

# In parts, FRN and GN take the step of the whole batch; MABN that of one process which has the same parts.
ONE_STEP = {"mabn": ["--accumulate", "2"], "frn": [], "gn": []}
IN_PARTS = {"mabn": ["--accumulate", "2"], "frn": ["--accumulate", "3"], "gn": ["--accumulate", "4"]}


def one_step(folder: Path, norm: str, options: list[str]) -> int:
    with in_float64():
        return run(norm, folder, "--epochs", "1", "--batch-size", "96", "--shift", "0", *options)


def counted_messages(folder: Path) -> int:
    """How many times an epoch of 6 steps in 4 parts shares the gradients of the first layer."""
    count = 0

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP takes no annotation that is a string
        nonlocal count
        count += bucket.is_last()
        return allreduce_hook(None, bucket)

    class Counted(DistributedDataParallel):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.register_comm_hook(None, hook)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "DistributedDataParallel", Counted)
        assert run("gn", folder, "--epochs", "1", "--batch-size", "16", "--accumulate", "4") == 0
    return count


def stopped(folder: Path, rank: int, number: signal.Signals) -> int:
    """A signal comes to one of the processes alone, in the second step of the second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == rank:
            during_step(patch, STEPS + 2, lambda: os.kill(os.getpid(), number))
        return run("mabn", folder, *LONG)


RUNS: dict[str, Callable[[Path], int]] = {
    **{norm: partial(one_step, norm=norm, options=options) for norm, options in IN_PARTS.items()},
    "messages": counted_messages,
    "whole": lambda folder: run("mabn", folder, *LONG),
    "interrupted": partial(stopped, rank=1, number=signal.SIGINT),
    "terminated": partial(stopped, rank=0, number=signal.SIGTERM),
    "interrupted and resumed": lambda folder: run("mabn", folder, *LONG, "--resume"),
}


def main(folder: Path) -> None:
    start, answers = dist.init_process_group, {}
    with pytest.MonkeyPatch.context() as patch:
        short_runs(patch)
        for name, each in RUNS.items():
            output = folder / name.removesuffix(" and resumed")
            if name.endswith(" and resumed") and os.environ["RANK"] == "0":
                (folder / "stopped.pt").write_bytes((output / "last.pt").read_bytes())
            answers[name] = each(output)
            # torchrun lets its processes meet once; for the other runs they meet in a file.
            meeting = f"file://{folder}/meeting after {name}"
            meet = partial(start, init_method=meeting, rank=int(os.environ["RANK"]), world_size=2)
            patch.setattr(dist, "init_process_group", meet)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(answers))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, int]], str]:
    """The folder with a folder for each run, what each process returned, and what both printed."""
    folder = tmp_path_factory.mktemp("two processes")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, __file__, str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    answers = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return folder, answers, ended.stdout + ended.stderr


@pytest.mark.parametrize("norm", ONE_STEP)
def test_two_processes_take_the_step_that_one_does(done, tmp_path, monkeypatch, norm):
    folder, answers, _ = done
    short_runs(monkeypatch)
    assert [answer[norm] for answer in answers] == [0, 0]
    assert one_step(tmp_path, norm, ONE_STEP[norm]) == 0
    two, one = load(folder / norm / "model.pt"), load(tmp_path / "model.pt")
    torch.testing.assert_close(two["state_dict"], one["state_dict"], **FLOAT64.kwargs())
    assert two["training"]["accuracy"] == one["training"]["accuracy"]
    assert two["training"]["command"].startswith("torchrun --nproc-per-node 2 -m deploynorm.models.train --norm ")
    assert read_log(folder / norm)[0]["train_loss"] == read_log(tmp_path)[0]["train_loss"]


def test_gradients_are_shared_once_a_step(done):
    _, answers, _ = done
    assert [answer["messages"] for answer in answers] == [STEPS, STEPS]


@pytest.mark.parametrize(("name", "code"), [("interrupted", 130), ("terminated", 143)])
def test_a_signal_to_one_process_stops_both_after_the_same_step(done, name, code):
    folder, answers, printed = done
    assert [answer[name] for answer in answers] == [code, code]
    last = load(folder / "stopped.pt" if name == "interrupted" else folder / name / "last.pt")
    # The signal arrives during the second step; both processes agree on it before the third.
    assert (len(last["history"]), last["epoch"]["step"]) == (1, 3)
    assert printed.count("of 6 of epoch 2: the same command with --resume continues") == 2
    assert not (folder / "terminated" / "model.pt").exists()


def test_two_processes_continue_bit_exact(done):
    folder, answers, _ = done
    assert [answer["interrupted and resumed"] for answer in answers] == [0, 0]
    assert_same_run(folder / "interrupted", folder / "whole")


def test_one_process_refuses_to_continue_the_run_of_two(done, capsys):
    folder, _, _ = done
    assert run("mabn", folder / "terminated", *LONG, "--resume") == 2
    assert "had another processes. Got 1; expected 2" in capsys.readouterr().err


def test_only_one_process_prints(done):
    _, _, printed = done
    lines = printed.splitlines()
    assert sum(line.startswith("epoch 1/1 ") for line in lines) == len(ONE_STEP) + 1
    assert sum(line.endswith("model.pt") for line in lines) == len(ONE_STEP) + 3
    assert "Warning" not in printed


if __name__ == "__main__":
    main(Path(sys.argv[1]))
