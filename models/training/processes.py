"""Distributed training: joining the processes, sums over them, and stopping them after one common step."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deploynorm.errors import BackendError, InputError

__all__ = ["StopSignal", "join", "over_processes"]


def join(processes: int) -> torch.device:
    """Joins the other processes, if there are any, and returns the device of this one.

    Args:
        processes: How many there are; torchrun sets the variables with which they find each other.

    Raises:
        InputError: There are more processes than GPUs on this machine.
        BackendError: They do not find each other.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index >= count:
            raise InputError("torchrun", "there are more processes than GPUs", got=f"process {index}", expected=count)
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if processes > 1:
        # DDP compares strides of axes of size 1 too, which have no meaning: those of 1x1 convolutions differ.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        try:
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
        except (RuntimeError, ValueError) as error:
            raise BackendError(
                "WORLD_SIZE", f"{processes} processes do not meet", got=error, fix="start them with torchrun"
            ) from error
    return device


def over_processes(value: Tensor) -> float:
    """Sum over the processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return float(value)


class StopSignal:
    """SIGINT (Ctrl-C) or SIGTERM (sent by clusters); all processes stop after the same step.

    with StopSignal() as stop:
        for step in stop.until(range(steps)):
            ...
        if stop.agreed:
            ...

    A single process reads what its signal handler recorded. Several have to agree, since a signal may reach them in
    different steps, or only one of them: each step has an all-reduce of one number, which starts before the step and is
    read after it. It uses gloo on NCCL's devices too, so that the host never waits for the device.

    Attributes:
        agreed: Number of the signal that ended `until`; 0 for none.
    """

    def __init__(self) -> None:
        self.agreed = 0
        self._noted = 0
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        # A second Ctrl-C in a terminal ends at once. Under torchrun it may be a repeat of the first one.
        if self._noted and number == signal.SIGINT and self._group is None:
            raise KeyboardInterrupt
        self._noted = number

    def until(self, steps: Iterable[int]) -> Iterator[int]:
        """The steps up to and including the one during which a signal arrived."""
        for step in steps:
            number = torch.tensor(self._noted)
            work = self._group and dist.all_reduce(number, dist.ReduceOp.MAX, self._group, async_op=True)
            yield step
            if work is None:
                self.agreed = self._noted
            else:
                work.wait()
                self.agreed = int(number)
            if self.agreed:
                return
