"""TensorRT and TensorRT-RTX as a backend: an engine on NumPy arrays, or on PyTorch's CUDA tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from deploynorm.arrays import to_array, to_tensor
from deploynorm.errors import BackendError, InputError, ModelError
from deploynorm.inputs import Shape, TensorSpec
from deploynorm.libraries import TENSORRT_LIBRARY, find_library
from deploynorm.run.base import Runner, check_feeds, closed_error
from deploynorm.trt import Flavour, TensorRT, gpu_here, import_tensorrt, listen, logger
from deploynorm.trt.engine import Engine
from deploynorm.trt.errors import explain
from deploynorm.trt.gpu import Gpu, WaitingOutput
from deploynorm.trt.importing import tensor_spec
from deploynorm.trt.plugins import load_library, load_plugin, load_stock_plugins
from deploynorm.trt.settings import Profile, Range
from deploynorm.trt.source import EngineSource

_MOST_GRAPHS: Final = 8
"""Captured CUDA graphs that a runner keeps: each has a context of its own, with the memory of all its activations."""


class TensorRTRunner(Runner):
    """Runs an engine in one execution context for each optimization profile that is used.

    A call takes the profile that is tuned for its shapes, else the first that holds them.

    Args:
        engine: A file that `deploynorm build` has written, any other engine file, the bytes of one, or what
            deploynorm.build returned.
        backend: "auto" takes what the manifest beside the file says, else TensorRT where both are installed. A
            version-compatible engine also runs in "tensorrt-lean" and "tensorrt-dispatch", which are taken where
            TensorRT is not installed.
        device: The GPU.
        plugins: Plugin libraries instead of ours. By default ours is loaded where it is built.
        cuda_graphs: Whether each shape is captured at its first call and replayed from then on: less work for the
            processor at a call, more memory, and one copy of inputs and outputs.
        trust_engine: Whether an engine with code for the processor inside may run it; see `build(embed_plugin=...)`.

    Raises:
        BackendError: TensorRT, a GPU or a plugin is missing, or the engine is for another version or GPU.
        ModelError: The file is not an engine, is damaged, or has an input that lies in the processor's memory.
        InputError: The engine holds code that it may not run.
    """

    def __init__(
        self,
        engine: str | Path | bytes | Engine,
        *,
        backend: Flavour | Literal["auto"] = "auto",
        device: torch.device | str | int = "cuda",
        plugins: Sequence[Path] | None = None,
        cuda_graphs: bool = False,
        trust_engine: bool = False,
    ) -> None:
        source = EngineSource.of(engine)
        self._where = source.where
        trt = import_tensorrt(*(source.backends if backend == "auto" else (backend,)))
        self._trt = trt
        source.check_version(trt)
        if not trust_engine:
            source.check_host_code()
        self._gpu = Gpu(device)
        with self._gpu.current(), listen() as heard:
            source.check_gpu(gpu_here())
            _load_plugins(trt, plugins, needed=source.needs_plugin)
            runtime = trt.module.Runtime(logger(trt))
            runtime.engine_host_code_allowed = trust_engine
            self._engine: Any = runtime.deserialize_cuda_engine(source.plan)
            if self._engine is None:
                raise explain(self._where, trt.name, heard)
            self._runtime: Any = runtime  # it must outlive its engines
        self.name = f"{trt.flavour} ({self._gpu.device})"
        self.precision = source.half_type
        inputs, outputs = _tensors(trt, self._engine)
        self.inputs = tuple(source.named(spec) for spec in inputs)
        self._outputs = {spec.name: spec for spec in outputs}
        self.output_names = tuple(self._outputs)
        self._profiles: list[Profile] = [
            {x.name: Range(*map(tuple, self._engine.get_tensor_profile_shape(x.name, index))) for x in self.inputs}
            for index in range(self._engine.num_optimization_profiles)
        ]
        self._contexts: dict[int, _Context] = {}
        """By profile: that of the first is made here, the others at their first call."""
        with self._gpu.current():
            self._contexts[0] = self._new_context(0)
        self._cuda_graphs = cuda_graphs
        self._captured: OrderedDict[tuple[Shape, ...], _Captured] = OrderedDict()

    @classmethod
    def check_available(cls) -> None:
        found = import_tensorrt()
        if gpu_here() is None:
            raise BackendError(found.name, "is here, but PyTorch finds no GPU", fix="deploynorm doctor says why")

    @property
    def device(self) -> torch.device:
        """The GPU on which `run` takes its tensors."""
        return self._gpu.device

    def infer(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        if self._engine is None:
            raise closed_error("TensorRTRunner.infer")
        check_feeds("TensorRTRunner.infer", self.inputs, feeds)
        with self._gpu.current():
            outputs = self.run({name: to_tensor(array).to(self.device) for name, array in feeds.items()})
            return {name: to_array(tensor) for name, tensor in outputs.items()}

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As infer, on CUDA tensors, in the order of the caller's current stream and without waiting for it.

        Calls on different streams share the runner's memory: let the later stream wait for the earlier. A tensor that
        is not contiguous is copied; one on another device than the runner's is an InputError.
        """
        if self._engine is None:
            raise closed_error("TensorRTRunner.run")
        profile = self._check(feeds)
        with self._gpu.current():
            if self._cuda_graphs:
                return self._replay(feeds, profile)
            tensors = {spec.name: self._gpu.dense(feeds[spec.name]) for spec in self.inputs}
            if profile not in self._contexts:
                self._contexts[profile] = self._new_context(profile)
            context = self._contexts[profile]
            with listen() as heard:
                outputs, waiting = self._bind(context, tensors, heard)
                with self._gpu.enqueue([*tensors.values(), *outputs.values()]) as stream:
                    self._execute(context, stream, heard)
        return {name: waiting[name].take() if name in waiting else outputs[name] for name in self.output_names}

    def close(self) -> None:
        self._captured.clear()
        self._contexts.clear()
        self._engine = self._runtime = None

    def _check(self, feeds: Mapping[str, Tensor]) -> int:
        """The profile for these feeds; InputError where they do not fit the engine."""
        names = [spec.name for spec in self.inputs]
        if sorted(feeds) != sorted(names):
            raise InputError("TensorRTRunner.run", "not the engine's inputs", got=list(feeds), expected=names)
        for spec in self.inputs:
            tensor, where = feeds[spec.name], f"TensorRTRunner.run, input {spec.name!r}"
            if tensor.device != self._gpu.device:
                raise InputError(where, "on another device", got=tensor.device, expected=self._gpu.device)
            if tensor.dtype != _torch_dtype(where, spec.dtype):
                raise InputError(where, "has the wrong dtype", got=tensor.dtype, expected=spec.dtype)
        shapes = {name: tuple(feeds[name].shape) for name in names}
        holding = [
            index
            for index, profile in enumerate(self._profiles)
            if all(profile[name].holds(shape) for name, shape in shapes.items())
        ]
        if not holding:
            raise self._outside(shapes)
        tuned = (i for i in holding if all(self._profiles[i][name].opt == shape for name, shape in shapes.items()))
        return next(tuned, holding[0])

    def _outside(self, shapes: Mapping[str, Shape]) -> InputError:
        """For shapes that no profile holds: of the first input that none holds, else of all inputs together."""
        fix = "feed another shape, or build with other --min-shapes and --max-shapes"
        for name, shape in shapes.items():
            ranges = [profile[name] for profile in self._profiles]
            if not any(each.holds(shape) for each in ranges):
                problem = "is outside the shapes that the engine was built for"
                expected = " or ".join(f"{low} to {high}" if low != high else f"{low}" for low, _, high in ranges)
                return InputError(f"TensorRTRunner.run, input {name!r}", problem, got=shape, expected=expected, fix=fix)
        problem = "each of these shapes is in an optimization profile of the engine, and no profile holds all of them"
        return InputError("TensorRTRunner.run", problem, got=dict(shapes), fix=fix)

    def _bind(
        self, made: _Context, tensors: Mapping[str, Tensor], heard: list[Any]
    ) -> tuple[dict[str, Tensor], dict[str, WaitingOutput]]:
        """Gives a context its shapes and addresses; outputs whose size is known only in the end wait for it."""
        context, known = made
        for name, tensor in tensors.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise explain(f"{self._where}, input {name!r}", self._trt.name, heard)
            context.set_tensor_address(name, self._gpu.address(tensor))
        missing = context.infer_shapes()
        if missing:
            raise ModelError(self._where, f"TensorRT does not know the output shapes: {missing} are not set")
        outputs: dict[str, Tensor] = {}
        waiting: dict[str, WaitingOutput] = {}
        for name, spec in self._outputs.items():
            dtype = _torch_dtype(self._where, spec.dtype)
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                if name not in known:
                    known[name] = WaitingOutput(self._trt, self._gpu, dtype)
                    context.set_output_allocator(name, known[name].allocator)
                waiting[name] = known[name]
            else:
                outputs[name] = self._gpu.empty(shape, dtype)
                context.set_tensor_address(name, self._gpu.address(outputs[name]))
        return outputs, waiting

    def _execute(self, made: _Context, stream: int, heard: list[Any]) -> None:
        if not made.context.execute_async_v3(stream):
            raise explain(self._where, self._trt.name, heard)

    def _replay(self, feeds: Mapping[str, Tensor], profile: int) -> dict[str, Tensor]:
        key = tuple(tuple(feeds[spec.name].shape) for spec in self.inputs)
        if key not in self._captured:
            self._captured[key] = self._capture(feeds, profile)
            if len(self._captured) > _MOST_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        captured = self._captured[key]
        for name, tensor in captured.inputs.items():
            tensor.copy_(feeds[name])
        captured.replay()
        return {name: tensor.clone() for name, tensor in captured.outputs.items()}

    def _capture(self, feeds: Mapping[str, Tensor], profile: int) -> _Captured:
        context = self._new_context(profile)  # a graph is valid only as long as nothing else uses its context
        inputs = {spec.name: feeds[spec.name].clone(memory_format=torch.contiguous_format) for spec in self.inputs}
        with listen() as heard:
            outputs, waiting = self._bind(context, inputs, heard)
            if waiting:
                problem = "an output's size depends on values, which a CUDA graph cannot hold"
                raise InputError("TensorRTRunner", problem, got=list(waiting), fix="pass cuda_graphs=False")
            replay = self._gpu.capture(lambda stream: self._execute(context, stream, heard))
        return _Captured(context, inputs, outputs, replay)

    def _new_context(self, profile: int) -> _Context:
        with listen() as heard:
            context = self._engine.create_execution_context()
            if context is None:
                raise explain(self._where, self._trt.name, heard)
            if profile > 0:  # with the first it begins
                with self._gpu.enqueue([]) as stream:
                    if not context.set_optimization_profile_async(profile, stream):
                        raise explain(self._where, self._trt.name, heard)
        return _Context(context, {})


class _Context(NamedTuple):
    """An execution context, of one profile."""

    context: Any
    waiting: dict[str, WaitingOutput]  # its outputs whose size is known only in the end


@dataclass
class _Captured:
    """A CUDA graph of one shape, the memory that it reads and writes, and its context."""

    context: _Context
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    replay: Callable[[], None]


def _load_plugins(trt: TensorRT, libraries: Sequence[Path] | None, *, needed: bool) -> None:
    load_stock_plugins(trt)
    if libraries is not None:
        for library in libraries:
            load_library(trt, Path(library))
    elif needed or find_library(TENSORRT_LIBRARY) is not None:
        load_plugin(trt)


def _tensors(trt: TensorRT, engine: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of an engine."""
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        if engine.get_tensor_location(name) != trt.module.TensorLocation.DEVICE:
            problem = "lies in the processor's memory, which this runner does not serve"
            raise ModelError(name, problem, fix="export without it")
        is_input = engine.get_tensor_mode(name) == trt.module.TensorIOMode.INPUT
        spec = tensor_spec(name, engine.get_tensor_shape(name), engine.get_tensor_dtype(name))
        (inputs if is_input else outputs).append(spec)
    return inputs, outputs


def _torch_dtype(where: str, name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(where, "has a type that PyTorch does not have", got=name)
    return dtype
