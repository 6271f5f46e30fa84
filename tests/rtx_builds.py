"""Builds with the real TensorRT-RTX, which needs no GPU for it.

They run in a process of their own, since TensorRT may abort it: one for all builds, and a new one after it has died.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
from graphs import ELEMENT_TYPES

from deploynorm import libraries
from deploynorm.contract import DOMAIN, INPUTS, OP_TYPE, PARAMETERS, VERSION
from deploynorm.lowering import function_proto

__all__ = ["OPSET", "Built", "Outcome", "build_rtx", "call", "conv_frn_conv", "plugin_library", "quantized"]

OPSET = 20

_PROGRAM = """
import contextlib, io, json, os, sys
from pathlib import Path
from deploynorm._build import build
from deploynorm.cli import main
from deploynorm.errors import DeployNormError

def built(model, options):
    if options.get("plugins") is not None:
        options["plugins"] = list(map(Path, options["plugins"]))
    try:
        engine = build(model, backend="tensorrt-rtx", **options)
    except DeployNormError as error:
        return {"error": type(error).__name__, "message": str(error)}
    layers = [
        {"name": x.name, "kind": x.kind, "plugin": x.plugin, "moves_only": x.moves_only,
         "inputs": [tensor.dtype for tensor in x.inputs], "outputs": [tensor.dtype for tensor in x.outputs]}
        for x in engine.layers
    ]
    return {"facts": engine.to_dict(), "layers": layers, "size": len(engine.plan), "passes": engine.passes,
            "moves": engine.moves}

def called(folder, arguments):
    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    return [code, out.getvalue(), err.getvalue()]

for line in sys.stdin:
    task, arguments = json.loads(line)
    print("\\nANSWER", json.dumps({"built": built, "called": called}[task](*arguments)), flush=True)
"""


class Outcome(NamedTuple):
    """Of one call of the command line."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Built:
    """What a build gave: an error with its message, or an Engine, of which this is a part.

    Attributes:
        facts: Engine.to_dict().
        layers: As dicts: name, kind, plugin, moves_only, and the dtypes of inputs and outputs.
        size: Of the plan.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0
    passes: int = 0
    moves: int = 0
    error: str = ""
    message: str = ""

    def between_products(self) -> list[dict[str, Any]]:
        """The layers after the first convolution and before the last, in the engine's order."""
        products = [i for i, layer in enumerate(self.layers) if layer["kind"] == "correlation"]
        inner = self.layers[products[0] + 1 : products[-1]]
        return [layer for layer in inner if layer["kind"] != "correlation" and layer["outputs"]]


class _Builder:
    """A process that builds, one task after the other."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        atexit.register(self._process.kill)

    def ask(self, task: str, *arguments: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([task, arguments], default=str) + "\n")
        self._process.stdin.flush()
        said = []
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
            said.append(line)
        _builder.cache_clear()
        with self._stderr:
            self._stderr.seek(0)
            raise AssertionError(f"exit code {self._process.wait()}\n{''.join(said)}\n{self._stderr.read()}")


@cache
def _builder() -> _Builder:
    return _Builder()


def build_rtx(model: Path, **options: object) -> Built:
    """deploynorm.build(model, backend="tensorrt-rtx", **options)."""
    return Built(**_builder().ask("built", model, options))


def call(*arguments: object) -> Outcome:
    """The command line in the current folder."""
    return Outcome(*_builder().ask("called", Path.cwd(), list(map(str, arguments))))


def conv_frn_conv(
    dtype: str, shape: tuple[int | str, ...], *, body: onnx.FunctionProto | None = None, layers: int = 1
) -> onnx.ModelProto:
    """Convolutions of `dtype`, in turn with FRN layers whose parameters are float32, over an input `x`."""
    channels = shape[1]
    assert isinstance(channels, int)
    numpy = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(0)
    spatial = len(shape) - 2
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    value = "x"
    for index in range(layers + 1):
        weight = (0.05 * rng.normal(size=(channels, channels, *(3,) * spatial))).astype(numpy)
        constants.append(onnx.numpy_helper.from_array(weight, f"weight{index}"))
        nodes.append(
            onnx.helper.make_node(
                "Conv", [value, f"weight{index}"], [f"conv{index}"], f"conv{index}", pads=[1] * 2 * spatial
            )
        )
        value = f"conv{index}"
        if index < layers:
            for name, low in zip(PARAMETERS, (0.5, -0.5, -0.25, 1e-6), strict=True):
                values = np.linspace(low, low + 0.5, channels, dtype=np.float32)
                constants.append(onnx.numpy_helper.from_array(values, f"{name}{index}"))
            inputs = [value, *(f"{name}{index}" for name in INPUTS[1:])]
            nodes.append(onnx.helper.make_node(OP_TYPE, inputs, [f"frn{index}"], f"frn{index}", domain=DOMAIN))
            value = f"frn{index}"
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "net", [info("x", ELEMENT_TYPES[dtype], shape)], [info(value, ELEMENT_TYPES[dtype], shape)], constants
    )
    imports = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    functions = [function_proto(OPSET, half=dtype != "float32")] if body is None else [body]
    return onnx.helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)


def quantized(model: onnx.ModelProto, kind: int, *, weights: bool = True, bias: bool = False) -> onnx.ModelProto:
    """A copy of conv_frn_conv with Q/DQ nodes before the inputs of its convolutions: int8 or float8.

    With bias they get one that is dequantized from int32, as onnxruntime.quantization makes them.
    """
    copied = onnx.ModelProto.FromString(model.SerializeToString())
    graph, make = copied.graph, onnx.helper
    element = graph.input[0].type.tensor_type.elem_type
    graph.initializer.append(make.make_tensor("scale", element, [], [0.05]))
    graph.initializer.append(make.make_tensor("zero", kind, [], [0]))
    nodes = []
    for node in list(graph.node):
        names = node.input[: 1 + weights] if node.op_type == "Conv" else ()
        for index, name in enumerate(names):
            q, dq = f"{node.name}_q{index}", f"{node.name}_dq{index}"
            nodes.append(make.make_node("QuantizeLinear", [name, "scale", "zero"], [q], q))
            nodes.append(make.make_node("DequantizeLinear", [q, "scale", "zero"], [dq], dq))
            node.input[index] = dq
        if names and bias:
            channels = graph.input[0].type.tensor_type.shape.dim[1].dim_value
            graph.initializer.append(
                make.make_tensor(f"{node.name}_b", onnx.TensorProto.INT32, [channels], [1] * channels)
            )
            nodes.append(make.make_node("DequantizeLinear", [f"{node.name}_b", "scale"], [f"{node.name}_bias"]))
            node.input.append(f"{node.name}_bias")
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(nodes)
    return copied


def plugin_library(request: pytest.FixtureRequest) -> Path:
    """The plugin library, as the fixture cuda_libraries builds it; only tests that need it ask for it."""
    folder: Path = request.getfixturevalue("cuda_libraries")
    return folder / libraries.TENSORRT_LIBRARY
