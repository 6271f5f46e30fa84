"""Broken ONNX files: each one small, and in the way of some verb."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from graphs import UNREADABLE, frn_model, one_node
from onnx import TensorProto
from onnx.helper import make_node, make_tensor, make_tensor_value_info

__all__ = ["BROKEN", "FAULTS"]

Change = Callable[[onnx.ModelProto], object]


def calls_itself(model: onnx.ModelProto) -> None:
    function = model.functions[0]
    function.node.add(domain=function.domain, op_type=function.name, input=list(function.input), output=["z"])


def outside(model: onnx.ModelProto) -> None:
    lies_in(model, "../weights")


def lies_in(model: onnx.ModelProto, name: str) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=name)


def unknown_type(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 99


def too_few_values(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 400


FAULTS: dict[str, tuple[Change, str]] = {
    "a function that calls itself": (calls_itself, "deep, or themselves"),
    "weights outside the folder": (outside, "not beside the model"),
    "an unknown type": (unknown_type, "does not know"),
    "too few values": (too_few_values, "has not the values"),
}
"""What no reader survives, and our words for it."""


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, make_node("Relu", ["b"], ["a"]))
    model.graph.node.insert(1, make_node("Relu", ["a"], ["b"]))


def without(model: onnx.ModelProto, field: str) -> None:
    model.graph.ClearField(field)


def node(model: onnx.ModelProto, *words: str, domain: str = "") -> None:
    """Another operator before the output."""
    kind, *inputs = words
    model.graph.node.append(make_node(kind, inputs, ["more"], domain=domain))
    model.graph.output.append(make_tensor_value_info("more", TensorProto.FLOAT, None))


def opset(model: onnx.ModelProto, version: int) -> None:
    model.opset_import[0].version = version


def first_input(model: onnx.ModelProto, kind: int, shape: tuple[int | str, ...] | None) -> None:
    model.graph.input[0].CopyFrom(make_tensor_value_info("X", kind, shape))


def constant(model: onnx.ModelProto, name: str, dims: tuple[int, ...]) -> None:
    """A parameter of another shape."""
    count = max(1, dims[0] if dims else 1)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != name]
    new = make_tensor(name, TensorProto.FLOAT, dims, [1.0] * (0 if 0 in dims else count))
    model.graph.ClearField("initializer")
    model.graph.initializer.extend([*kept, new])


def sequence_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT


def metadata(model: onnx.ModelProto, key: str, value: str) -> None:
    model.metadata_props.add(key=key, value=value)


def function_calls(model: onnx.ModelProto, name: str) -> None:
    model.functions[0].node[0].op_type = name


def subgraph(model: onnx.ModelProto) -> None:
    """A condition whose branches have no nodes."""
    branch = onnx.helper.make_graph([], "branch", [], [make_tensor_value_info("nothing", TensorProto.FLOAT, None)])
    model.graph.initializer.append(make_tensor("truth", TensorProto.BOOL, (), [True]))
    model.graph.node.append(make_node("If", ["truth"], ["more"], then_branch=branch, else_branch=branch))
    model.graph.output.append(make_tensor_value_info("more", TensorProto.FLOAT, None))


CHANGES: dict[str, Change] = {
    **{name: change for name, (change, _) in FAULTS.items()},
    "weights in a missing file": lambda model: lies_in(model, "missing"),
    "weights in a folder": lambda model: lies_in(model, "folder"),
    "weights in the model itself": lambda model: lies_in(model, "broken.onnx"),
    "weights in another file": lambda model: lies_in(model, "x.npz"),
    "a cycle": cycle,
    "no outputs": lambda model: without(model, "output"),
    "no inputs": lambda model: without(model, "input"),
    "no nodes": lambda model: without(model, "node"),
    "no parameters": lambda model: without(model, "initializer"),
    "nothing at all": lambda model: [without(model, part) for part in ("node", "input", "output", "initializer")],
    "a tensor that nobody makes": lambda model: node(model, "Relu", "nobody"),
    "two of one name": lambda model: model.graph.node.append(model.graph.node[0]),
    "two inputs of one name": lambda model: model.graph.input.append(model.graph.input[0]),
    "two parameters of one name": lambda model: model.graph.initializer.append(model.graph.initializer[0]),
    "an unknown operator": lambda model: node(model, "Nonsense", "X"),
    "an operator of an unknown domain": lambda model: node(model, "Relu", "X", domain="com.nobody"),
    "an operator without inputs": lambda model: node(model, "Relu"),
    "an operator of too many inputs": lambda model: node(model, "Relu", *["X"] * 5),
    "no opset": lambda model: model.ClearField("opset_import"),
    "opset 0": lambda model: opset(model, 0),
    "opset 3": lambda model: opset(model, 3),
    "opset 99": lambda model: opset(model, 99),
    "an opset below zero": lambda model: opset(model, -1),
    "no IR version": lambda model: model.ClearField("ir_version"),
    "an IR version to come": lambda model: setattr(model, "ir_version", 999),
    "our operator of another version": lambda model: setattr(model.opset_import[1], "version", 77),
    "our operator without its function": lambda model: model.ClearField("functions"),
    "our operator without attributes": lambda model: model.graph.node[0].ClearField("attribute"),
    "our operator of two inputs": lambda model: model.graph.node[0].input.__delitem__(slice(2, None)),
    "a function of unknown operators": lambda model: function_calls(model, "Nonsense"),
    "a function without outputs": lambda model: model.functions[0].ClearField("output"),
    "text as an input": lambda model: first_input(model, TensorProto.STRING, ("N", 4, 8, 8)),
    "an input of no type": lambda model: first_input(model, TensorProto.UNDEFINED, ("N", 4, 8, 8)),
    "complex numbers as an input": lambda model: first_input(model, TensorProto.COMPLEX64, ("N", 4, 8, 8)),
    "integers as an input": lambda model: first_input(model, TensorProto.INT64, ("N", 4, 8, 8)),
    "float8 as an input": lambda model: first_input(model, TensorProto.FLOAT8E4M3FN, ("N", 4, 8, 8)),
    "an input of no rank": lambda model: first_input(model, TensorProto.FLOAT, None),
    "an input of rank 0": lambda model: first_input(model, TensorProto.FLOAT, ()),
    "an input of rank 9": lambda model: first_input(model, TensorProto.FLOAT, (1,) * 9),
    "an input without channels": lambda model: first_input(model, TensorProto.FLOAT, ("N", 0, 8, 8)),
    "an input of size -1": lambda model: first_input(model, TensorProto.FLOAT, (-1, 4, -1, -1)),
    "an input that no memory holds": lambda model: first_input(model, TensorProto.FLOAT, (2**20, 4, 2**20, 2**20)),
    "an input of more than 64 bits": lambda model: first_input(model, TensorProto.FLOAT, (2**62, 4, 2**62, 2**62)),
    "an input without a name": lambda model: setattr(model.graph.input[0], "name", ""),
    "an output without a type": lambda model: model.graph.output[0].ClearField("type"),
    "an output of another type": lambda model: setattr(model.graph.output[0].type.tensor_type, "elem_type", 7),
    "a sequence as an input": sequence_input,
    "a parameter of no values": lambda model: constant(model, "gamma", (0,)),
    "a parameter of one value": lambda model: constant(model, "gamma", (1,)),
    "a parameter of more channels": lambda model: constant(model, "gamma", (5,)),
    "a scalar parameter": lambda model: constant(model, "gamma", ()),
    "empty branches": subgraph,
    "an attribute of no type": lambda model: model.graph.node[0].attribute.add(name="nothing"),
    "a reference in the graph": lambda model: model.graph.node[0].attribute.add(
        name="alpha", ref_attr_name="beta", type=1
    ),
    "an image that is none": lambda model: metadata(model, "deploynorm.image", "{"),
    "an image of text": lambda model: metadata(model, "deploynorm.image", '{"shape": "3", "mean": [], "std": []}'),
    "deep metadata": lambda model: metadata(model, "deploynorm.image", "[" * 10**5),
    "sizes that are none": lambda model: metadata(model, "deploynorm.sizes", '{"X": [[3], {"a": null}]}'),
    "labels that are numbers": lambda model: metadata(model, "deploynorm.labels", "[1, 2]"),
}


def changed_model(change: Change) -> bytes:
    model = frn_model(body=True)
    change(model)
    return model.SerializeToString()


def scalar() -> bytes:
    model = one_node("ReduceSum", {"X": ("float32", ("N", 4, 8, 8))}, ("float32", ()))
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("keepdims", 0))
    return model.SerializeToString()


BROKEN: dict[str, bytes | None] = {
    **UNREADABLE,
    **{name: changed_model(change) for name, change in CHANGES.items()},
    "zeros": bytes(1000),
    "the text form of a model": str(frn_model()).encode(),
    "a tensor file": onnx.numpy_helper.from_array(
        onnx.numpy_helper.to_array(frn_model().graph.initializer[0])
    ).SerializeToString(),
    "a pickle": b"\x80\x02}q\x00.",
    "a zip": b"PK\x03\x04" + bytes(100),
    "a scalar output": scalar(),
    "half precision with a cycle": changed_model(cycle),
    "an output that depends on values": one_node(
        "NonZero", {"X": ("float32", ("N", 4, 8, 8))}, ("int64", (4, "M"))
    ).SerializeToString(),
    "a sum of other shapes": one_node(
        "Add", {"X": ("float32", (2, 4, 8, 8)), "b": ("float32", (3, 5))}, ("float32", None)
    ).SerializeToString(),
}
"""The content of each; None for a file that is not there."""
