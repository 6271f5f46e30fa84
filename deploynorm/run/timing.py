"""How long engines take, measured in turns, so that all meet one state of the machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TypeVar

import torch

from deploynorm.run.tensorrt import TensorRTRunner
from deploynorm.trt.engine import Engine

Name = TypeVar("Name", bound=str)

_ROUNDS = 15
_CALLS = 20
_WARM_UP = 10


def milliseconds(engines: Mapping[Name, Engine]) -> dict[Name, float]:
    """The median time of one inference of each engine, as CUDA graphs on the current device.

    Each is run on the opt shapes of its first profile. The copies of inputs and outputs around a graph are in it, equal
    ones for each. Inputs are random; clocks settle in the calls before the first round; each round runs every engine.
    """
    runners = {
        # Trusted: this process has just built them.
        name: TensorRTRunner(engine, backend=engine.backend, cuda_graphs=True, trust_engine=True)
        for name, engine in engines.items()
    }
    taken: dict[Name, list[float]] = {name: [] for name in engines}
    try:
        feeds = {name: _feeds(engine, runners[name].device) for name, engine in engines.items()}
        for name, runner in runners.items():
            for _ in range(_WARM_UP):
                runner.run(feeds[name])
        for _ in range(_ROUNDS):
            for name, runner in runners.items():
                start, end = _event(), _event()
                start.record()
                for _ in range(_CALLS):
                    runner.run(feeds[name])
                end.record()
                end.synchronize()
                taken[name].append(start.elapsed_time(end) / _CALLS)
    finally:
        for runner in runners.values():
            runner.close()
    return {name: statistics.median(times) for name, times in taken.items()}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _feeds(engine: Engine, device: torch.device) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {spec: engine.profiles[0][spec.name].opt for spec in engine.inputs}
    return {spec.name: torch.randn(opt).to(device, getattr(torch, spec.dtype)) for spec, opt in shapes.items()}
