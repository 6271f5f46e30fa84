"""Times of calls on a GPU, taken side by side: each way is captured in a CUDA graph, and all take turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

__all__ = ["host_microseconds", "measure", "sets_past_the_cache"]

Set = TypeVar("Set")
"""The tensors of one call."""


def sets_past_the_cache(bytes_of_one: int) -> int:
    """How many sets of tensors of this size do not fit into the second-level cache together."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return 1 + min(63, math.ceil(3 * cache / bytes_of_one))


def measure(
    ways: Mapping[str, Callable[[Set], object]], sets: Sequence[Set], moved: int, rounds: int
) -> dict[str, float]:
    """The median time of a call of each way, in microseconds.

    Args:
        ways: Called with one set after the other.
        sets: So many that a call finds its input in memory.
        moved: Bytes that a call reads and writes, about; decides how many calls make up a time.
        rounds: In which all ways take turns.
    """
    calls = max(len(sets), min(64, math.ceil(2e9 / max(moved, 1e6) / 20)))
    graphs = {name: _capture(way, sets, calls) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for turn in range(rounds + 1):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            begin.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            if turn > 0:  # the first warms up
                times[name].append(1e3 * begin.elapsed_time(end) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def timed(shape: Sequence[int], layout: str, dtype: str, times: Mapping[str, float]) -> dict[str, Any]:
    """What every row of the results begins with."""
    microseconds = {name: round(value, 3) for name, value in times.items()}
    return {"shape": list(shape), "layout": layout, "dtype": dtype, "microseconds": microseconds}


def _capture(way: Callable[[Set], object], sets: Sequence[Set], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls, on the sets of tensors in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for each in sets[:2]:
            way(each)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            way(sets[index % len(sets)])
    return graph


def host_microseconds(
    ways: Mapping[str, Callable[[Set], object]], given: Set, rounds: int, calls: int = 50
) -> dict[str, float]:
    """The median time of a call of each way without a graph: on small tensors, what the host needs to enqueue it."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                way(given)
            torch.cuda.synchronize()
            if turn > 0:
                times[name].append(1e6 * (time.perf_counter() - begin) / calls)
    return {name: statistics.median(values) for name, values in times.items()}
