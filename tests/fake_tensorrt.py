"""A TensorRT of Python, which keeps TensorRT's rules and computes y = 2 x in the processor's memory.

It stands in where the machine has no GPU or no TensorRT of the version at hand: an engine is JSON, a stream is a
number, and whoever breaks a rule (no shape, no address, one that is not aligned, a shape outside the profile) is
refused as TensorRT refuses, with a word to the logger.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from torch import Tensor

from deploynorm.contract import DOMAIN, NODE_ATTRIBUTES, OP_TYPE, OPERATORS, VERSION
from deploynorm.trt.gpu import Gpu

__all__ = ["ALIGNMENT", "FakeGpu", "fake_tensorrt", "plan", "with_builder"]

ALIGNMENT = 64
"""Of an address; PyTorch's memory on the CPU has no more."""

OURS = (OP_TYPE, str(VERSION), DOMAIN)
"""Name, version and namespace of our plugin."""

STOCK = ("ROIAlign_TRT", "2", "")
"""One of NVIDIA's."""

LIBRARY = b"\x7fELF\2\1\1" + bytes(11) + b"\x3e\0"
"""The head of a shared library for x86-64."""

NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16, "INT32": np.int32, "INT64": np.int64}


def plan(
    inputs: Mapping[str, Sequence[Sequence[int]]],
    outputs: dict[str, str],
    *,
    dtype: str = "FLOAT",
    version: str = "11.4.0",
    plugin: bool = False,
    stock_plugin: bool = False,
    host_code: bool = False,
    compute: str = "9.0",
    values_decide: bool = False,
    library: bool = False,
    more_profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]] = (),
) -> bytes:
    """An engine. `inputs` are min, opt and max shapes by name, `outputs` say which input each is twice of.

    `more_profiles` are as `inputs`, which is the first.
    With values_decide, the outputs' shapes are known only when they are computed. With host_code, TensorRT knows that
    it holds code for the processor; with library, a hostile one does that TensorRT runs whatever it was told.
    """
    facts = {"dtype": dtype, "version": version, "plugin": plugin, "stock_plugin": stock_plugin}
    facts |= {"host_code": host_code, "compute": compute}
    facts |= {"inputs": list(inputs), "outputs": outputs, "values_decide": values_decide}
    content = json.dumps(facts | {"profiles": [inputs, *more_profiles]}).encode()
    return content + (LIBRARY if library else b"")


class FakeGpu(Gpu):
    """The processor's memory, and streams that are numbers."""

    def __init__(self, device: object = "cuda") -> None:
        self.device = torch.device("cpu")
        self._spare = torch.empty(ALIGNMENT, dtype=torch.uint8)
        self.streams: list[int] = []
        self.captures = 0

    @property
    def name(self) -> str:
        return "no GPU"

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    @contextmanager
    def enqueue(self, tensors: Sequence[Tensor]) -> Iterator[int]:
        self.streams.append(7)
        yield 7

    def capture(self, enqueue: Callable[[int], None]) -> Callable[[], None]:
        self.captures += 1
        enqueue(8)
        return lambda: enqueue(8)


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BF16 = 7
    INT64 = 8


Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)
LayerType = enum.Enum("LayerType", {"CONVOLUTION": 0, "PLUGIN_V3": 1})


class _Base:
    """ILogger and IOutputAllocator: what a caller derives from."""


class Registry:
    """One of a process: load_library refuses a second load, as TensorRT does."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.libraries: list[str] = []
        self.creators: set[tuple[str, str, str]] = set()
        self.brings = {(op_type, *OURS[1:]) for op_type in OPERATORS}

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        return object() if (name, version, namespace) in self.creators else None

    def load_library(self, path: str) -> object | None:
        if path in self.libraries:
            self.module.say("ERROR", f"Plugin library {path} is loaded already")
            return None
        self.libraries.append(path)
        self.creators |= self.brings
        return object()


class Context:
    """An execution context: shapes first, then addresses, then execution."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}
        self.kept: list[Any] = []  # for TensorRT's bindings keep every allocator that a context was ever given

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if not 0 <= index < self.engine.num_optimization_profiles or not stream:
            self.engine.say("ERROR", f"profile {index} does not exist, or no stream")
            return False
        self.profile, self.shapes = index, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self.engine.say(
                "ERROR", f"Set dimension {shape} for tensor {name} does not satisfy any optimization profiles"
            )
            return False
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.facts["inputs"] if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        source = self.engine.facts["outputs"].get(name, name)
        low = self.engine.get_tensor_profile_shape(source, 0)[0]
        if self.engine.facts["values_decide"] and name != source:
            return (-1,) * len(low)
        return self.shapes.get(source, (-1,) * len(low))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        self.kept.append(allocator)
        return True

    def execute_async_v3(self, stream: int) -> bool:
        facts = self.engine.facts
        for name in (*facts["inputs"], *facts["outputs"]):
            if name in self.allocators:
                continue
            if not self.addresses.get(name) or self.addresses[name] % ALIGNMENT:
                self.engine.say("ERROR", f"Address {self.addresses.get(name)} of tensor {name} is null or not aligned")
                return False
        if self.infer_shapes() or not stream:
            self.engine.say("ERROR", "not all shapes are set, or no stream")
            return False
        dtype = np.dtype(NUMPY[facts["dtype"]])
        for name, source in facts["outputs"].items():
            shape = self.shapes[source]
            size = int(np.prod(shape)) * dtype.itemsize
            if name in self.allocators:
                allocator = self.allocators[name]
                self.addresses[name] = allocator.reallocate_output_async(name, 0, max(size, 1), ALIGNMENT, stream)
                allocator.notify_shape(name, shape)
            x = np.frombuffer(ctypes.string_at(self.addresses[source], size), dtype)
            ctypes.memmove(self.addresses[name], (x + x).astype(dtype).tobytes(), size)
        return True


class Engine:
    def __init__(self, module: ModuleType, facts: dict[str, Any]) -> None:
        self.module, self.facts = module, facts
        self.say = module.say
        self.contexts = 0

    @property
    def num_io_tensors(self) -> int:
        return len(self.facts["inputs"]) + len(self.facts["outputs"])

    def get_tensor_name(self, index: int) -> str:
        return [*self.facts["inputs"], *self.facts["outputs"]][index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        source = self.facts["outputs"].get(name, name)
        shapes = [shape for profile in self.facts["profiles"] for shape in profile[source]]
        return tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.facts["dtype"]]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.facts["inputs"] else "OUTPUT"

    def get_tensor_location(self, name: str) -> str:
        return "HOST" if name.startswith("host") else "DEVICE"

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        shapes: list[list[int]] = self.facts["profiles"][index][name]
        return shapes

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.facts["profiles"])

    def create_execution_context(self) -> Context:
        self.contexts += 1
        return Context(self)


def fake_tensorrt(version: str = "11.4.0", *, name: str = "tensorrt", compute: str = "9.0") -> ModuleType:
    """The module. `module.say(severity, text)` speaks to the logger that was given first."""
    module = ModuleType(name)
    module.__version__ = version  # type: ignore[attr-defined]
    heard: list[Any] = []

    def say(severity: str, text: str) -> None:
        for logger in heard[:1]:
            logger.log(Severity[severity], text)

    registry = Registry(module)

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            heard.append(logger)

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            described, library, _ = content.partition(LIBRARY)
            assert self.engine_host_code_allowed or not library, "the library inside has run"
            try:
                facts = json.loads(described)
            except ValueError:
                say("ERROR", "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.")
                return None
            built, here = facts["version"], facts["compute"]
            if built != version:
                say("ERROR", "The engine plan file is not compatible with this version of TensorRT, expecting library "
                             f"version {version} got {built}, please rebuild.")  # fmt: skip
            elif here != compute:
                say("ERROR", "The engine plan file is generated on an incompatible device, expecting compute "
                             f"{compute} got compute {here}, please rebuild.")  # fmt: skip
            elif facts["plugin"] and OURS not in registry.creators:
                say("ERROR", f"Cannot find plugin: {OP_TYPE}, version: {VERSION}, namespace:{DOMAIN}.")
            elif facts["stock_plugin"] and STOCK not in registry.creators:
                say("ERROR", f"Cannot find plugin: {STOCK[0]}, version: {STOCK[1]}, namespace:.")
            elif facts["host_code"] and not self.engine_host_code_allowed:
                say("ERROR", "Cannot deserialize an engine with host code: it is not allowed by the runtime")
            else:
                return Engine(module, facts)
            return None

    for key, value in {
        "say": say,
        "registry": registry,
        "get_plugin_registry": lambda: registry,
        "init_libnvinfer_plugins": lambda logger, namespace: registry.creators.add((*STOCK[:2], namespace)),
        "ILogger": _Base,
        "IOutputAllocator": _Base,
        "DataType": DataType,
        "LayerType": LayerType,
        "TensorIOMode": enum.Enum("TensorIOMode", {"INPUT": "INPUT", "OUTPUT": "OUTPUT"}, type=str),
        "TensorLocation": enum.Enum("TensorLocation", {"DEVICE": "DEVICE", "HOST": "HOST"}, type=str),
        "Runtime": Runtime,
    }.items():
        setattr(module, key, value)
    return module


def with_builder(
    module: Any,
    *,
    gpu: bool = True,
    layer_dtype: str | None = "Half",
    in_log: bool = True,
    loses_plugin_in: str = "",
) -> Any:
    """Adds what builds to a fake_tensorrt: the parser, the builder and its options. `seen` keeps what they were given.

    Args:
        gpu: False makes the builder fail as it does without a driver.
        layer_dtype: Type of the layers as TensorRT lists them; None lists none.
        in_log: Whether the build's log lists them, or the inspector alone.
        loses_plugin_in: "parser" or "builder", whichever takes something else for the plugin.
    """
    seen: dict[str, Any] = {}

    class Config:
        def __init__(self) -> None:
            self.flags = {"TF32"}
            self.pools: dict[str, int] = {}
            self.profiles: list[dict[str, Any]] = []
            self.cache: Any = None
            self.plugins_to_serialize: list[str] = []

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            self.flags.discard(flag.name)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.pools[pool.name] = size

        def create_timing_cache(self, content: bytes) -> bytes | None:
            return None if content == b"damaged" else content

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache != b"of another GPU":
                self.cache = cache
            return self.cache is not None

        def get_timing_cache(self) -> Any:
            return None if self.cache is None else SimpleNamespace(serialize=lambda: self.cache + b"and new")

        def add_optimization_profile(self, profile: Any) -> int:
            self.profiles.append(profile.shapes)
            return len(self.profiles) - 1

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
            self.shapes[name] = (low, best, high)

    class Network:
        def __init__(self, flags: int) -> None:
            known = hasattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
            seen["strongly typed"] = bool(flags) if known else None
            self.model = onnx.ModelProto()

        @property
        def nodes(self) -> list[onnx.NodeProto]:
            return list(self.model.graph.node)

        num_inputs = property(lambda self: len(self.model.graph.input))
        num_outputs = property(lambda self: len(self.model.graph.output))
        num_layers = property(lambda self: len(self.nodes))

        def get_input(self, index: int) -> Any:
            return SimpleNamespace(name=self.model.graph.input[index].name, is_shape_tensor=False)

        def get_output(self, index: int) -> Any:
            return SimpleNamespace(name=self.model.graph.output[index].name, shape=(2, -1), dtype=DataType.HALF)

        def get_layer(self, index: int) -> Any:
            taken = self.plugin(self.nodes[index]) and loses_plugin_in != "parser"
            return SimpleNamespace(type=LayerType.PLUGIN_V3 if taken else LayerType.CONVOLUTION)

        def plugin(self, node: onnx.NodeProto) -> bool:
            attributes = {attribute.name: attribute.s.decode() for attribute in node.attribute if attribute.s}
            there = (node.op_type, *OURS[1:]) in module.registry.creators
            hidden = node.op_type in {function.name for function in self.model.functions}
            return attributes.items() >= NODE_ATTRIBUTES.items() and there and not hidden

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Network, logger: Any) -> None:
            self.network = network

        def parse(self, content: bytes, path: str | None = None) -> bool:
            seen["model"] = content
            self.network.model.ParseFromString(content)
            return True

    class Builder:
        def __init__(self, logger: Any) -> None:
            Runtime(logger)
            if not gpu:
                module.say("ERROR", "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags: int) -> Network:
            return Network(flags)

        def create_builder_config(self) -> Config:
            seen["config"] = Config()
            return seen["config"]  # type: ignore[no-any-return]

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes:
            listed = []
            for node in network.nodes if layer_dtype else ():
                plugin = network.plugin(node) and loses_plugin_in != "builder"
                kind = "PluginV3" if plugin else "CaskConvolution" if node.op_type == "Conv" else "kgen"
                listed.append((node.name, kind))
            if in_log and listed:
                side = f"[ {{ Name: t, Dimensions: [2], Strides: [1], Datatype: {layer_dtype}, Format: (Linear) x }}]"
                lines = [
                    f"Name: {name}, LayerType: {kind}, Inputs: {side}, Constants: [], Outputs: {side}, TacticName: , "
                    f"StreamId: 0, Metadata: [ONNX Layer: {name}]"
                    for name, kind in listed
                ]
                module.say("VERBOSE", "\n".join(["Layers:", *lines]))
            sides = {side: [{"Name": "t", "Format/Datatype": layer_dtype}] for side in ("Inputs", "Outputs")}
            seen["layers"] = [
                {"Name": name, "LayerType": kind, **sides, "Metadata": f"[ONNX Layer: {name}]"} for name, kind in listed
            ]
            shapes, embeds = {"x": ((2,),) * 3}, bool(config.plugins_to_serialize)
            return plan(shapes, {"y": "x"}, version=module.__version__, host_code=embeds)

    Runtime = module.Runtime
    Engine.create_engine_inspector = lambda self: SimpleNamespace(  # type: ignore[attr-defined]
        get_engine_information=lambda form: json.dumps({"Layers": self.module.seen["layers"], "Bindings": []})
    )
    flags = ["TF32", "STRICT_NANS", "VERSION_COMPATIBLE", *(["FP16"] if module.__version__ < "11" else [])]
    module.seen = seen
    module.Builder, module.OnnxParser = Builder, OnnxParser
    module.BuilderFlag = enum.Enum("BuilderFlag", flags)
    typed = ["STRONGLY_TYPED"] if module.__version__.startswith("10") else ["OTHER"]
    module.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", typed)
    module.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
    module.ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
    levels = ["AMPERE_PLUS", *(["SAME_COMPUTE_CAPABILITY"] if module.__version__ not in ("10.3.0", "10.8.0") else [])]
    module.HardwareCompatibilityLevel = SimpleNamespace(**{level: level for level in levels})
    module.LayerInformationFormat = SimpleNamespace(JSON="JSON")
    return module
