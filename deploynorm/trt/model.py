"""An ONNX model as TensorRT is to get it: checked for what TensorRT does not check, and prepared for one of two ways.

The plugin is taken when the node names it and no function body of the model stands in its way (TensorRT before 10.7
prefers a body). The body is taken when its name is one that no plugin has. Both are changes of a copy in memory, so
any exported file serves any TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx
import onnx.shape_inference

from deploynorm.contract import (
    DOMAIN,
    INPUTS,
    METADATA_CPU,
    MIN_OPSET,
    NODE_ATTRIBUTES,
    OPERATORS,
    OUTPUT,
    PARAMETERS,
)
from deploynorm.dtypes import ONNX_HALF
from deploynorm.errors import ModelError
from deploynorm.lowering import function_proto, register_schema
from deploynorm.onnx_file import OnnxFile, OnnxSource, all_nodes
from deploynorm.trt.layers import Product
from deploynorm.trt.settings import Way

BODIES = {op_type: f"{op_type}Body" for op_type in OPERATORS}
"""Names of the function bodies on the native way: TensorRT finds plugins and functions by name."""

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_QUANTIZED: Final[Mapping[int, str]] = {onnx.TensorProto.INT8: "int8", onnx.TensorProto.FLOAT8E4M3FN: "float8"}
_MOVES = ("Cast", "Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Past these TensorRT takes a DequantizeLinear to the product behind them."""


@dataclass(frozen=True)
class TensorRTModel:
    """A model that passed the checks."""

    file: OnnxFile  # TensorRT looks for external data beside its path
    frn: tuple[str, ...]  # names of the nodes of our operator, as TensorRT calls them
    products: Mapping[str, Product]  # the convolutions and matrix products, by the names of their nodes
    half: bool  # whether one of our nodes works on float16 or bfloat16

    @classmethod
    def read(cls, model: OnnxSource) -> TensorRTModel:
        """Reads and checks a model.

        ModelError if it was rewritten for ONNX Runtime, has a node of our operator that is not as the contract has it,
        or float64, which TensorRT lacks and takes for float32 without a word.
        """
        file = OnnxFile.read(model)
        where, proto = file.where, file.proto
        if not proto.graph.node:
            raise ModelError(where, "has a graph without nodes", fix="export it again")
        if METADATA_CPU in file.metadata:
            raise ModelError(
                where, "was rewritten for ONNX Runtime on a processor", fix="build from the file it was made from"
            )
        nodes = [node for node in _all_nodes(proto) if _is_frn(node)]
        for node in nodes:
            _check_node(where, node)
        types = _types(file)
        _check_types(file, nodes, types)
        half = any(types[node.input[0]].elem_type in ONNX_HALF for node in nodes if node.input[0] in types)
        return cls(file, tuple(map(_name, nodes)), _products(proto, types), half)

    def prepared(self, way: Way) -> onnx.ModelProto:
        """A copy that can only go that way.

        ModelError if another function has an operator's name, which is all that TensorRT finds functions by; or if
        the file brings no body, and its opset is too old for ours.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.file.proto)
        others = [function for function in proto.functions if not _is_body(function)]
        clash = next((f for f in others if f.name in (*BODIES, *BODIES.values())), None)
        if clash is not None and self.frn:
            problem = "another local function has an operator's name, and TensorRT finds functions by name only"
            raise ModelError(self.file.where, problem, got=f"{clash.domain}::{clash.name}", fix="rename that function")
        del proto.functions[:]
        proto.functions.extend(others)
        used = set()
        for node in _all_nodes(proto):
            if not _is_frn(node):
                continue
            used.add(node.op_type)
            del node.attribute[:]
            if way == "native":
                node.op_type = BODIES[node.op_type]
            else:
                node.attribute.extend(onnx.helper.make_attribute(*item) for item in NODE_ATTRIBUTES.items())
        for op_type in sorted(used) if way == "native" else ():
            body = proto.functions.add()
            body.CopyFrom(self._body(op_type))
            body.name = BODIES[op_type]
        return proto

    def _body(self, op_type: str) -> onnx.FunctionProto:
        """The file's. Of ours on (N, C, H, W), which TensorRT makes more layers of, the one on (N, C, L)."""
        opset = _opset(self.file.proto)
        own = (function for function in self.file.proto.functions if _is_body(function) and function.name == op_type)
        found: onnx.FunctionProto | None = next(own, None)
        if found is not None and (
            opset < MIN_OPSET or _operators(found) != _operators(function_proto(opset, op_type, maps=True))
        ):
            return found
        if opset < MIN_OPSET:
            problem = "brings no function body, and its opset is too old for ours"
            fix = "export it again, or build with --frn plugin"
            raise ModelError(self.file.where, problem, got=f"opset {opset}", expected=f"{MIN_OPSET} or later", fix=fix)
        return function_proto(opset, op_type, half=self.half)


def _operators(body: onnx.FunctionProto) -> list[str]:
    return [node.op_type for node in body.node]


def _opset(proto: onnx.ModelProto) -> int:
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Of the graph, its subgraphs, and the functions other than our own body."""
    yield from all_nodes(proto.graph.node)
    for function in proto.functions:
        if not _is_body(function):
            yield from all_nodes(function.node)


def _is_body(function: onnx.FunctionProto) -> bool:
    return function.domain == DOMAIN and function.name in OPERATORS


def _is_frn(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in OPERATORS


def _name(node: onnx.NodeProto) -> str:
    """As TensorRT calls the node in its layers."""
    return node.name or f"node_of_{node.output[0]}"


def _check_node(where: str, node: onnx.NodeProto) -> None:
    where, operator, inputs = f"{where}, node {_name(node)}", f"{DOMAIN}::{node.op_type}", OPERATORS[node.op_type]
    if len(node.input) != len(inputs) or not all(node.input) or len(node.output) != 1:
        problem, got = f"does not have the inputs of {operator}", f"{list(node.input)} -> {list(node.output)}"
        expected = f"{', '.join(inputs)} -> {OUTPUT}, none of them left out"
        raise ModelError(where, problem, got=got, expected=expected, fix="export it with deploynorm")
    for attribute in node.attribute:
        if attribute.name not in NODE_ATTRIBUTES:
            problem = f"has an attribute that {operator} does not have"
            expected = f"{INPUTS[-1]} and the other parameters as inputs"
            raise ModelError(where, problem, got=attribute.name, expected=expected, fix="export it with deploynorm")
        value = attribute.s.decode(errors="replace") or onnx.helper.get_attribute_value(attribute)
        if value != NODE_ATTRIBUTES[attribute.name]:
            expected, fix = NODE_ATTRIBUTES[attribute.name], "export it with this version of deploynorm"
            got = f"{attribute.name} = {value!r}"
            raise ModelError(where, "names another plugin than ours", got=got, expected=expected, fix=fix)


def _types(file: OnnxFile) -> dict[str, onnx.TypeProto.Tensor]:
    """Element type and shape of each value of the graph, as far as onnx can infer them."""
    register_schema()
    proto, opset = file.proto, _opset(file.proto)
    if opset >= MIN_OPSET and not file.has_body:
        whole = onnx.ModelProto()
        whole.CopyFrom(proto)
        brought = {function.name for function in proto.functions if _is_body(function)}
        missing = (op_type for op_type in OPERATORS if op_type not in brought)
        whole.functions.extend(function_proto(opset, op_type, half=True) for op_type in missing)  # fit every type
        proto = whole
    try:
        inferred = onnx.shape_inference.infer_shapes(proto).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        inferred = proto.graph  # TensorRT will say what is wrong with it
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type for value in values if value.type.HasField("tensor_type")}
    for tensor in inferred.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
    return types


def _check_types(file: OnnxFile, nodes: list[onnx.NodeProto], types: Mapping[str, onnx.TypeProto.Tensor]) -> None:
    where = file.where
    for name in (*(spec.name for spec in file.inputs), *file.output_names):
        if name in types and types[name].elem_type == onnx.TensorProto.DOUBLE:
            fix = "export the network in float32 or float16"
            raise ModelError(f"{where}, {name}", "TensorRT has no float64", fix=fix)
    for node in nodes:
        x = types.get(node.input[0])
        if x is None or not x.HasField("shape"):
            continue
        if len(x.shape.dim) < 2:
            problem = f"{INPUTS[0]} has too few axes"
            expected = "samples, channels and any number of spatial axes"
            raise ModelError(f"{where}, node {_name(node)}", problem, got=f"{len(x.shape.dim)}", expected=expected)
        channels = x.shape.dim[1].dim_value
        for parameter, name in zip(PARAMETERS, node.input[1 : len(INPUTS)], strict=True):
            sizes = [dim.dim_value for dim in types[name].shape.dim] if name in types else [channels]
            if channels and types.get(name) and types[name].HasField("shape") and sizes not in ([channels], [0]):
                problem = f"{parameter} does not fit the channels of {INPUTS[0]}"
                raise ModelError(f"{where}, node {_name(node)}", problem, got=sizes, expected=[channels])


def _products(proto: onnx.ModelProto, types: Mapping[str, onnx.TypeProto.Tensor]) -> dict[str, Product]:
    makers = {name: node for node in proto.graph.node for name in node.output}
    found = {}
    for node in proto.graph.node:
        known = [types[name].elem_type for name in node.input[:2] if name in types and types[name].elem_type]
        if node.domain in ("", "ai.onnx") and node.op_type in _PRODUCTS and known:
            dtype = str(onnx.helper.tensor_dtype_to_np_dtype(known[0]).name)
            quantized = {_QUANTIZED.get(kind, dtype) for kind in _dequantized(node.input[:2], makers, types)}
            found[_name(node)] = Product(dtype, frozenset(quantized))
    return found


def _dequantized(
    names: Sequence[str], makers: Mapping[str, onnx.NodeProto], types: Mapping[str, onnx.TypeProto.Tensor]
) -> set[int]:
    """The element types that values are dequantized from; 0 stands for one that is not."""
    found, open_names, seen = set(), list(names), set(names)
    while open_names:
        node = makers.get(open_names.pop())
        if node is not None and node.op_type in _MOVES:
            sources = node.input if node.op_type == "Concat" else node.input[:1]
            open_names += [name for name in sources if name not in seen]
            seen.update(sources)
        elif node is not None and node.op_type == "DequantizeLinear" and node.input[0] in types:
            found.add(types[node.input[0]].elem_type)
        else:
            found.add(0)
    return found
