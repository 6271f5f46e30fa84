"""A plugin library as TensorRT drives it, on a machine without TensorRT: tests/plugins/tensorrt_host.cpp in Python.

host = Host(folder / HOSTS[0], folder / TENSORRT_LIBRARY)      # after build_plugin(folder), of emulated.py
engine = host.build("float16", Format.HWC8, smallest=(1, 12, 8, 8), largest=(4, 12, 32, 32))
y = engine.context().run({"X": x, "gamma": gamma, ...})       # x is (N, C, D1..Dk) within those shapes; so is y

An engine is built as TensorRT builds one: the plugin is asked about types, shapes and formats, cloned, configured, and
asked for its fields and workspace. Those alone go on to the run, where a plugin is made from the fields, attached to a
context, and receives each new shape.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cases import NUMPY_DTYPES, NormCase
from cuda_kernels import Layout, from_layout, to_layout
from kernels import Array, Guarded, check_all
from references import check_forward, inputs_of

from deploynorm.contract import INPUTS, PARAMETERS, RESIDUAL

TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bfloat16": 7, "int64": 8}
"""nvinfer1::DataType."""

BUILD, RUNTIME = 0, 1
"""nvinfer1::TensorRTPhase."""

MAX_RANK = 8


NAMES = ("LINEAR", "CHW2", "HWC8", "CHW4", "CHW16", "CHW32", "DHWC8", "CDHW32", "HWC", "DLA_LINEAR", "DLA_HWC4",
         "HWC16", "DHWC")  # fmt: skip
Format = IntEnum("Format", NAMES, start=0)
"""nvinfer1::TensorFormat, as far as the tests ask for it."""

LAYOUTS: dict[Format, Layout] = {
    Format.LINEAR: "nchw",
    Format.HWC: "nhwc",
    Format.HWC8: "nhwc8",
    Format.DHWC: "nhwc",
    Format.DHWC8: "nhwc8",
}


class FieldType(IntEnum):
    """nvinfer1::PluginFieldType, likewise."""

    FLOAT32 = 1
    INT8 = 3
    INT32 = 5
    CHAR = 6
    UNKNOWN = 8
    INT64 = 10


@dataclass(frozen=True)
class Field:
    """A nvinfer1::PluginField. `length` counts elements, not bytes; None for data makes the pointer null."""

    name: str | None
    type: FieldType
    length: int
    data: bytes | None


@dataclass(frozen=True)
class Tensor:
    """What TensorRT tells a plugin of a tensor.

    Attributes:
        shape: -1 for a size that only a run gives.
        largest: Of the profile; None for a tensor of one shape.
    """

    shape: tuple[int, ...]
    type: str = "float32"
    format: Format = Format.LINEAR
    largest: tuple[int, ...] | None = None


class _Tensor(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "format", "rank")),
        *((name, ctypes.c_int64 * MAX_RANK) for name in ("sizes", "largest")),
    )


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("data", ctypes.c_void_p),
    )


def inputs_and_output(x: Tensor, *, residual: bool = False) -> list[Tensor]:
    """X, gamma, beta, tau, eps and Y, as they are for this X; with a residual before Y."""
    return [x, *[Tensor(x.shape[1:2])] * len(PARAMETERS), *[x] * residual, x]


class Host:
    """A plugin library, and its creator, of the operator with a residual or without; "cuda" for code for a GPU."""

    def __init__(
        self, host: Path, plugin: Path, device: Literal["cpu", "cuda"] = "cpu", *, residual: bool = False
    ) -> None:
        self.device, self.residual, self._files = device, residual, (host, plugin)
        self._library = ctypes.CDLL(str(host))
        error = ctypes.c_char_p()
        path, index = str(plugin).encode(), ctypes.c_int32(residual)
        self._creator = self.call("open", path, index, ctypes.byref(error), returns=ctypes.c_void_p)
        assert self._creator, error.value

    def adding(self) -> Host:
        """The same with the creator of the operator with a residual."""
        return Host(*self._files, self.device, residual=True)

    def tensors(self, x: Tensor) -> list[Tensor]:
        return inputs_and_output(x, residual=self.residual)

    def call(self, name: str, *arguments: Any, returns: Any = ctypes.c_int32) -> Any:
        function = self._library[f"host_{name}"]  # a new object at each access
        function.restype = returns
        return function(*(ctypes.c_void_p(each) if type(each) is int else each for each in arguments))

    def creator_names(self) -> list[str]:
        """Name, version and namespace."""
        return self.names("creator_names", self._creator, 3)

    def attribute_count(self) -> int:
        return int(self.call("attribute_count", self._creator))

    def names(self, function: str, of: int, count: int) -> list[str]:
        names = (ctypes.c_char_p * count)()
        self.call(function, of, names, returns=None)
        return [name.decode() for name in names if name is not None]

    def create(self, fields: Sequence[Field] | None = (), phase: int = BUILD) -> Plugin | None:
        """None for a plugin that the creator refuses to make. Fields may be None too, which is a null pointer."""
        count = 0 if fields is None else len(fields)
        data = [None if f.data is None else ctypes.create_string_buffer(f.data, len(f.data)) for f in fields or ()]
        array = (_Field * max(1, count))()
        for index, (field, buffer) in enumerate(zip(fields or (), data, strict=True)):
            name = None if field.name is None else field.name.encode()
            address = None if buffer is None else ctypes.addressof(buffer)
            array[index] = _Field(name, field.type, field.length, address)
        given = None if fields is None else array
        plugin = self.call(
            "create", self._creator, given, ctypes.c_int32(count), ctypes.c_int32(phase), returns=ctypes.c_void_p
        )
        return Plugin(self, plugin) if plugin else None

    def build(self, dtype: str, format: Format, smallest: tuple[int, ...], largest: tuple[int, ...]) -> Engine:
        """An engine for X of this type and format, and of shapes between these."""
        network = tuple(a if a == b else -1 for a, b in zip(smallest, largest, strict=True))
        x = Tensor(network, dtype, format, largest)
        tensors = [replace(t, largest=(largest[1],)) if len(t.shape) == 1 else t for t in self.tensors(x)]
        made = self.create()
        assert made is not None
        with made as first, first.clone() as plugin:
            assert plugin.output_types([t.type for t in tensors[:-1]]) == (0, [dtype])
            assert plugin.output_axes([len(t.shape) for t in tensors[:-1]]) == (0, list(range(len(largest))))
            for position in range(len(tensors)):
                assert plugin.supports(position, tensors), f"{format.name} of input or output {position}"
            assert plugin.configure(tensors) == 0
            workspace = plugin.workspace(tensors)
            assert plugin.shape_change(self.tensors(Tensor(largest, dtype, format))) == 0
            return Engine(self, dtype, format, tuple(plugin.fields()), workspace)


class Plugin:
    """An IPluginV3. As a context manager it is destroyed at the end."""

    def __init__(self, host: Host, address: int) -> None:
        self._host = host
        self.address = address

    def __enter__(self) -> Plugin:
        return self

    def __exit__(self, *_: object) -> None:
        self.call("destroy", returns=None)

    def call(self, name: str, *arguments: Any, returns: Any = ctypes.c_int32) -> Any:
        return self._host.call(name, self.address, *arguments, returns=returns)

    def names(self) -> list[str]:
        """Name, version and namespace, and the kinds of the interfaces: IPluginV3, core, build and runtime."""
        return self._host.names("names", self.address, 7)

    def clone(self) -> Plugin:
        return Plugin(self._host, self.call("clone", returns=ctypes.c_void_p))

    def attach(self) -> Plugin:
        return Plugin(self._host, self.call("attach", returns=ctypes.c_void_p))

    def timing_id(self) -> str | None:
        found = self.call("timing_id", returns=ctypes.c_char_p)
        return None if found is None else str(found.decode())

    def fields(self) -> list[Field]:
        """What it keeps of itself in an engine."""
        array = (_Field * 16)()
        count = self.call("fields", array, ctypes.c_int32(len(array)))
        found = []
        for field in array[:count]:
            size = field.length * {FieldType.INT32: 4, FieldType.FLOAT32: 4, FieldType.INT64: 8}.get(field.type, 1)
            data = ctypes.string_at(field.data, size)
            found.append(Field(field.name.decode(), FieldType(field.type), field.length, data))
        return found

    def output_types(self, types: Sequence[str], outputs: int = 1) -> tuple[int, list[str | None]]:
        """getOutputDataTypes: what it returns, and the types."""
        given = (ctypes.c_int32 * max(1, len(types)))(*(TYPES[name] for name in types))
        found = (ctypes.c_int32 * outputs)()
        code = self.call("output_types", given, ctypes.c_int32(len(types)), found, ctypes.c_int32(outputs))
        names = {number: name for name, number in TYPES.items()}
        return code, [names.get(number) for number in found]

    def output_axes(self, ranks: Sequence[int], outputs: int = 1) -> tuple[int, list[int]]:
        """getOutputShapes: what it returns, and for each axis of the output the axis of X that it is as long as."""
        given, axes = (ctypes.c_int32 * max(1, len(ranks)))(*ranks), (ctypes.c_int32 * MAX_RANK)()
        rank, counts = ctypes.c_int32(), (ctypes.c_int32(len(ranks)), ctypes.c_int32(outputs))
        code = self.call("output_axes", given, *counts, ctypes.byref(rank), axes)
        return code, list(axes[: rank.value])

    def supports(self, position: int, tensors: Sequence[Tensor], outputs: int = 1) -> bool:
        """supportsFormatCombination. What lies behind `position` is ignored, and is not passed on."""
        unknown = Tensor((0,) * MAX_RANK, "int8", Format.CHW32)
        passed = [*tensors[: position + 1], *[unknown] * (len(tensors) - position - 1)]
        return bool(self.call("supports", ctypes.c_int32(position), *_tensors(passed, outputs)))

    def configure(self, tensors: Sequence[Tensor], outputs: int = 1) -> int:
        return int(self.call("configure", *_tensors(tensors, outputs)))

    def workspace(self, tensors: Sequence[Tensor], outputs: int = 1) -> int:
        return int(self.call("workspace", *_tensors(tensors, outputs), returns=ctypes.c_size_t))

    def shape_change(self, tensors: Sequence[Tensor], outputs: int = 1) -> int:
        return int(self.call("shape_change", *_tensors(tensors, outputs)))

    def enqueue(
        self, tensors: Sequence[Tensor], inputs: Sequence[int], output: int, workspace: int, stream: int = 0
    ) -> int:
        """The numbers are addresses on the device, and a handle: 0 is the default stream."""
        given, made = (ctypes.c_void_p * len(inputs))(*inputs), (ctypes.c_void_p * 1)(output)
        return int(self.call("enqueue", *_tensors(tensors, 1), given, made, workspace, stream))


def _tensors(tensors: Sequence[Tensor], outputs: int) -> tuple[Any, ctypes.c_int32, ctypes.c_int32]:
    """The array, how many of it are inputs, and how many outputs."""
    array = (_Tensor * max(1, len(tensors)))()
    for index, tensor in enumerate(tensors):
        sizes = (ctypes.c_int64 * MAX_RANK)(*tensor.shape)
        largest = (ctypes.c_int64 * MAX_RANK)(*(tensor.shape if tensor.largest is None else tensor.largest))
        array[index] = _Tensor(TYPES[tensor.type], tensor.format, len(tensor.shape), sizes, largest)
    return array, ctypes.c_int32(len(tensors) - outputs), ctypes.c_int32(outputs)


@dataclass(frozen=True)
class Engine:
    """What a build leaves: nothing of the plugin that built it but its fields."""

    host: Host
    dtype: str
    format: Format
    fields: tuple[Field, ...]
    workspace: int

    def context(self) -> Context:
        plugin = self.host.create(self.fields, RUNTIME)
        assert plugin is not None
        with plugin:
            return Context(self, plugin.attach())


class Context:
    """An engine that runs. It keeps one workspace, and tells the plugin of a shape when that is another."""

    def __init__(self, engine: Engine, plugin: Plugin) -> None:
        self._engine, self._plugin = engine, plugin
        self._shape: tuple[int, ...] | None = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *error: object) -> None:
        self._plugin.__exit__(*error)

    def bind(self, inputs: Mapping[str, Array]) -> Bound:
        """Tells the plugin of the shapes, and puts the inputs on the device."""
        x = inputs[INPUTS[0]]
        assert x.dtype == NUMPY_DTYPES[self._engine.dtype]
        tensors = self._engine.host.tensors(Tensor(x.shape, self._engine.dtype, self._engine.format))
        if x.shape != self._shape:
            assert self._plugin.shape_change(tensors) == 0
            self._shape = x.shape
        laid = to_layout(x, LAYOUTS[self._engine.format])
        # TensorRT gives a pointer to a workspace whether there was a size asked for or not.
        arrays = {"x": laid, **{name: inputs[name] for name in PARAMETERS}}
        if RESIDUAL in inputs:
            arrays[RESIDUAL] = to_layout(inputs[RESIDUAL], LAYOUTS[self._engine.format])
        arrays["y"] = np.full_like(laid, np.nan)
        arrays["workspace"] = np.full(self._engine.workspace, 0xFF, np.uint8)
        memory = {name: Guarded(array, device=self._engine.host.device) for name, array in arrays.items()}
        return Bound(self._engine, self._plugin, tensors, memory)

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """Y. Around it, around the workspace and in the inputs no byte may be written."""
        bound = self.bind(inputs)
        bound.enqueue()
        return bound.output()


@dataclass(frozen=True)
class Bound:
    """A context with its tensors in memory."""

    engine: Engine
    plugin: Plugin
    tensors: Sequence[Tensor]
    memory: Mapping[str, Guarded]

    def enqueue(self, stream: int = 0) -> None:
        *given, y, workspace = (each.pointer for each in self.memory.values())
        assert self.plugin.enqueue(self.tensors, given, y, workspace, stream) == 0

    def output(self) -> Array:
        """Y, when all that was enqueued has run."""
        if self.engine.host.device == "cuda":
            torch.cuda.synchronize()
        check_all(self.memory, ("y", "workspace"))
        shape = self.tensors[0].shape
        return from_layout(self.memory["y"].read(), LAYOUTS[self.engine.format], shape)


def formats_of(dtype: str, rank: int) -> list[Format]:
    """What the plugin takes outside TensorRT-RTX."""
    rows: dict[tuple[str, int], list[Format]] = {
        ("float32", 4): [Format.HWC],
        ("float16", 4): [Format.HWC8, Format.HWC],
        ("bfloat16", 4): [Format.HWC8],
        ("float32", 5): [Format.DHWC],
        ("float16", 5): [Format.DHWC8],
        ("bfloat16", 5): [Format.DHWC8],
    }
    return [Format.LINEAR, *rows.get((dtype, rank), ())]


def run(host: Host, case: NormCase, format: Format) -> Array:
    host = host.adding() if case.residual and not host.residual else host
    with host.build(case.dtype, format, case.shape, case.shape).context() as context:
        return context.run(inputs_of(case))


def check_every_format(host: Host, case: NormCase) -> None:
    for format in formats_of(case.dtype, len(case.shape)):
        check_forward(run(host, case, format), case, format.name)
