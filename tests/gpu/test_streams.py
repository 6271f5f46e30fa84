"""The TensorRT plugin on a GPU's streams: captured in a CUDA graph, and two contexts of one engine side by side."""

from __future__ import annotations

import pytest
import torch
from cases import NormCase
from references import check_forward, inputs_of
from tensorrt_host import Format, Host, formats_of

SHAPE = (8, 64, 56, 56)
DTYPES = ("float32", "float16", "bfloat16")
both = [(dtype, format) for dtype in DTYPES for format in formats_of(dtype, len(SHAPE))]
every_format = pytest.mark.parametrize(("dtype", "format"), both, ids=[f"{d}-{f.name}" for d, f in both])


@every_format
def test_enqueue_is_captured_in_a_cuda_graph(dtype: str, format: Format, gpu_host: Host) -> None:
    """As trtexec --useCudaGraph does: enqueue may not wait, allocate or leave the stream."""
    with gpu_host.build(dtype, format, SHAPE, SHAPE).context() as context:
        case = NormCase("captured", SHAPE, dtype)
        bound = context.bind(inputs_of(case))
        stream = torch.cuda.Stream()
        bound.enqueue(stream.cuda_stream)  # kernels are loaded at their first launch, which a graph cannot hold
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            bound.enqueue(stream.cuda_stream)
        for _ in range(3):
            bound.memory["y"].forget()
            graph.replay()
            check_forward(bound.output(), case)


@every_format
def test_two_contexts_run_on_two_streams(dtype: str, format: Format, gpu_host: Host) -> None:
    """Neither waits for the other, and each has its own workspace and shape: one is begun late, and ends right."""
    engine = gpu_host.build(dtype, format, (1, *SHAPE[1:]), SHAPE)
    cases = [NormCase("late", SHAPE, dtype), NormCase("early", (3, *SHAPE[1:]), dtype, eps="per_channel")]
    with engine.context() as late, engine.context() as early:
        bound = [context.bind(inputs_of(case)) for context, case in zip((late, early), cases, strict=True)]
        streams = [torch.cuda.Stream() for _ in bound]
        for each in bound:
            each.enqueue()  # kernels are loaded at their first launch, which may wait for the device
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            torch.cuda._sleep(200_000_000)
        for _ in range(20):
            for each, stream in zip(bound, streams, strict=True):
                each.enqueue(stream.cuda_stream)
        streams[1].synchronize()
        assert not streams[0].query(), "the late stream is done: the early one has waited for it"
        for each, case in zip(bound, cases, strict=True):
            check_forward(each.output(), case)
