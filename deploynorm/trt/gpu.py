"""What running on a GPU needs of PyTorch: memory, streams and CUDA graphs; and outputs whose size values decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from deploynorm.errors import BackendError
from deploynorm.trt.importing import TensorRT

_ALIGNMENT = 256  # bytes, of every address that TensorRT is given


class Gpu:
    """One CUDA device, with a stream of its own for callers on the default stream; BackendError if there is none."""

    def __init__(self, device: torch.device | str | int = "cuda") -> None:
        if not torch.cuda.is_available():
            problem, fix = "no CUDA device", "install the NVIDIA driver"
            if not getattr(torch.version, "cuda", None):
                problem = "PyTorch, which brings the memory on the GPU, was built without CUDA"
                fix = "install a torch that is built for CUDA"
            raise BackendError("TensorRT", problem, got=f"torch {torch.__version__}", fix=fix)
        self.device = torch.device(device) if isinstance(device, str | torch.device) else torch.device("cuda", device)
        index = torch.cuda.current_device() if str(self.device) == "cuda" else self.device.index
        if self.device.type != "cuda" or index >= torch.cuda.device_count():
            expected = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}"
            raise BackendError("TensorRT", "no such CUDA device", got=device, expected=expected)
        self.device = torch.device("cuda", index)
        self._side: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._spare = torch.empty(_ALIGNMENT, dtype=torch.uint8, device=self.device)

    def current(self) -> AbstractContextManager[object]:
        """Makes the device the current one of this thread, as TensorRT requires."""
        return torch.cuda.device(self.device)

    @contextmanager
    def enqueue(self, tensors: Sequence[Tensor]) -> Iterator[int]:
        """The handle of the stream to enqueue on, in the order of the caller's current stream.

        On the default stream TensorRT would wait for the whole device again and again: a side stream takes its place,
        which waits for it and which it then waits for. The memory of the tensors is not given away before that.
        """
        current = torch.cuda.current_stream(self.device)
        if current.cuda_stream != torch.cuda.default_stream(self.device).cuda_stream:
            yield current.cuda_stream
            return
        self._side.wait_stream(current)
        yield self._side.cuda_stream
        current.wait_stream(self._side)
        for tensor in tensors:
            tensor.record_stream(self._side)

    def capture(self, enqueue: Callable[[int], None]) -> Callable[[], None]:
        """Captures what `enqueue` puts on the stream whose handle it is given, and returns what replays it.

        It is enqueued once before, uncaptured: TensorRT does work then that a graph cannot hold.
        """
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        enqueue(self._side.cuda_stream)
        self._side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._side):
            enqueue(self._side.cuda_stream)
        return graph.replay

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def address(self, tensor: Tensor) -> int:
        """Of the tensor, or of spare memory for an empty one, which has none."""
        return tensor.data_ptr() if tensor.numel() else self._spare.data_ptr()

    @staticmethod
    def dense(tensor: Tensor) -> Tensor:
        """The tensor itself where its rows lie one after the other from an aligned address on, else a copy."""
        tensor = tensor.resolve_neg().contiguous()  # a sign may stand in a flag and not in memory
        return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


class WaitingOutput:
    """An output whose size depends on values: TensorRT reports it while it runs.

    One serves all calls of a context: the context keeps every allocator that it is given alive, and with it its memory.
    """

    def __init__(self, trt: TensorRT, gpu: Gpu, dtype: torch.dtype) -> None:
        self._gpu, self._dtype = gpu, dtype
        self._memory: Tensor | None = None
        self._shape: tuple[int, ...] = ()
        self.allocator: Any = self._make(trt)
        """A tensorrt.IOutputAllocator."""

    def _make(self, trt: TensorRT) -> Any:
        waiting = self

        class Allocator(trt.module.IOutputAllocator):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.module.IOutputAllocator.__init__(self)

            def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
                waiting._memory = waiting._gpu.empty((max(size, 1),), torch.uint8)
                return waiting._memory.data_ptr()

            def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
                return self.reallocate_output_async(name, memory, size, alignment, 0)

            def notify_shape(self, name: str, shape: Sequence[int]) -> None:
                waiting._shape = tuple(shape)

        return Allocator()

    def take(self) -> Tensor:
        """The output of the last call, which is the caller's from now on."""
        memory, self._memory = self._memory, None
        if memory is None:
            return self._gpu.empty(self._shape, self._dtype)
        return memory[: prod(self._shape) * self._dtype.itemsize].view(self._dtype).reshape(self._shape)
