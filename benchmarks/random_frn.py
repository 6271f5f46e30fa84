"""Random graphs that compute FRN in loose operators, or nearly: one thing in every second of them is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper as h
import onnx.numpy_helper

__all__ = ["random_graph"]

_CHANNELS = 4
_TWINS = {
    "Add": "Sub",
    "Sub": "Add",
    "Mul": "Div",
    "Div": "Mul",
    "Max": "Min",
    "Sqrt": "Exp",
    "Relu": "Sigmoid",
    "ReduceMean": "ReduceMax",
    "ReduceSum": "ReduceMean",
    "Reciprocal": "Neg",
    "Greater": "Less",
    "Less": "Greater",
}


class _Writer:
    """A graph that is being written; values are names."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.nodes, self.constants = rng, list[onnx.NodeProto](), dict[str, np.ndarray[Any, Any]]()

    def one_of(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(h.make_node(op_type, inputs, [output], **attributes))
        return output

    def either(self, op_type: str, a: str, b: str) -> str:
        return self.op(op_type, *self.one_of((a, b), (b, a)))

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array, dtype)
        return name


def random_graph(seed: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray[Any, Any]]]:
    """A graph and what to feed it; equal seeds give equal graphs."""
    rng = np.random.default_rng(seed)
    w = _Writer(rng)
    rank, last = w.one_of(4, 4, 4, 3, 5), w.one_of(False, False, True)
    sizes = [int(size) for size in rng.integers(2, 6, rank - 2)]
    channels = w.one_of(_CHANNELS, _CHANNELS, sizes[-1])  # sometimes as many as columns
    shape = [2, *sizes, channels] if last else [2, channels, *sizes]
    axis = rank - 1 if last else 1
    space = [each for each in range(1, rank) if each != axis]
    x = w.one_of(lambda: "x", lambda: w.op("Neg", "x"), lambda: w.op("Tanh", "x"))()

    def parameter() -> str:
        of = [1] * rank
        of[axis] = channels
        if w.rng.random() < 0.06:  # along another axis
            of = [1] * rank
            other = int(w.rng.integers(1, rank))
            of[other] = shape[other]
        array = w.rng.normal(size=of if w.rng.random() < 0.85 else [1] * rank)
        while array.ndim > 1 and array.shape[0] == 1 and w.rng.random() < 0.5:
            array = array[0]
        return w.constant(array)

    inverse = _inverse(w, x, rank, axis, shape, space)
    scaled = w.either("Mul", x, parameter()) if w.rng.random() < 0.2 else x
    y = w.op("Div", scaled, inverse[1:]) if inverse.startswith("/") else w.either("Mul", scaled, inverse)
    if w.rng.random() < 0.8:
        y = w.either("Mul", y, parameter())
    if w.rng.random() < 0.8:
        y = w.either("Add", y, parameter()) if w.rng.random() < 0.8 else w.op("Sub", y, parameter())
    y = _bounded(w, y, parameter)
    y = w.op("Exp", w.op("Neg", w.op("Abs", y))) if w.rng.random() < 0.3 else w.op("Identity", y)
    outputs = [y]
    if w.rng.random() < 0.5:
        outputs += _changed(w)
    dims = ["N" if i == 0 else f"D{i}" if i in space and rng.random() < 0.5 else size for i, size in enumerate(shape)]
    values = [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, dims)]
    given = [h.make_empty_tensor_value_info(name) for name in outputs]
    for value in given:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in w.constants.items()]
    graph = h.make_graph(w.nodes, "random", values, given, constants)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    return model, {"x": rng.normal(size=shape).astype(np.float32) + np.float32(0.1)}


def _inverse(w: _Writer, x: str, rank: int, axis: int, shape: list[int], space: list[int]) -> str:
    """1 / root(mean(x^2) + eps), or "/" and the root."""
    square = w.one_of(
        lambda: w.op("Mul", x, x),
        lambda: w.op("Pow", x, w.constant(2.0)),
        lambda: w.op("Mul", (a := w.op("Abs", x)), a),
    )
    count = int(np.prod([shape[each] for each in space]))
    axes = w.constant(space, np.int64)
    keep = [1 if each in space else shape[each] for each in range(rank)]

    def flat() -> str:
        view = w.op("Reshape", square(), w.constant([0, 0, -1] if axis == 1 else [0, -1, shape[-1]], np.int64))
        mean = w.op("ReduceMean", view, w.constant([2 if axis == 1 else 1], np.int64), keepdims=0)
        return w.op("Reshape", mean, w.constant([0 if i == 0 else size for i, size in enumerate(keep)], np.int64)
                    if axis == 1 else w.constant([-1, *keep[1:]], np.int64))  # fmt: skip

    def one_by_one() -> str:
        value = square()
        for each in w.rng.permutation(space):
            value = w.op("ReduceMean", value, w.constant([each], np.int64))
        return value

    mean = w.one_of(
        lambda: w.op("ReduceMean", square(), axes),
        lambda: w.op("ReduceMean", square(), axes),
        lambda: w.op("Div", w.op("ReduceSum", square(), axes), w.constant(float(count))),
        lambda: w.op("Div", w.op("ReduceSumSquare", x, axes), w.constant(float(count))),
        lambda: w.op("Unsqueeze", w.op("ReduceMean", square(), axes, keepdims=0), axes),
        one_by_one,
        flat,
    )()
    if w.rng.random() < 0.05:
        mean = w.op("Sqrt", mean)  # an epsilon outside of the root
    eps = w.rng.uniform(1e-3, 1e-1, size=[shape[axis] if each == axis else 1 for each in range(rank)])
    shifted = w.either("Add", mean, w.constant(eps if w.rng.random() < 0.4 else eps.flat[0]))
    form = w.one_of("root", "reciprocal", "power", "root of the reciprocal")
    if form == "root":
        return f"/{w.op('Sqrt', shifted)}"
    if form == "reciprocal":
        return w.op("Reciprocal", w.op("Sqrt", shifted))
    if form == "power":
        return w.op("Pow", shifted, w.constant(-0.5))
    return w.op("Sqrt", w.op("Reciprocal", shifted))


def _bounded(w: _Writer, y: str, parameter: Any) -> str:
    def where() -> str:
        tau = parameter()
        above = w.op("Greater", y, tau) if w.rng.random() < 0.5 else w.op("Less", tau, y)
        return w.op("Where", above, y, tau)

    def shifted() -> str:
        tau = parameter()
        return w.op("Add", w.op("Relu", w.op("Sub", y, tau)), tau)

    bounded: str = w.one_of(
        lambda: y,
        lambda: w.either("Max", y, parameter()),
        lambda: w.op("Relu", y),
        lambda: w.op("PRelu", y, w.constant(w.one_of(0.0, 0.0, 0.1))),
        lambda: w.op("Clip", y, w.constant(-0.25)),
        where,
        shifted,
    )()
    return bounded


def _changed(w: _Writer) -> list[str]:
    """Changes one thing; returns inner values that are outputs from now on."""
    index = int(w.rng.integers(len(w.nodes) - 1))
    node = w.nodes[index]
    change = w.rng.integers(5)
    if change == 0:
        return [node.output[0]] if node.op_type not in ("Greater", "Less") else []
    if change == 1 and node.op_type in _TWINS:
        node.op_type = _TWINS[node.op_type]
    elif change == 2 and len(node.input) > 1 and node.op_type != "PRelu":  # ONNX broadcasts its slope alone
        node.input[0], node.input[1] = node.input[1], node.input[0]
    elif change == 3 and node.op_type != "PRelu":
        earlier = ["x", *(each.output[0] for each in w.nodes[:index])]
        node.input[int(w.rng.integers(len(node.input)))] = w.one_of(*earlier)
    else:
        name = w.one_of(*w.constants) if w.constants else "x"
        array = w.constants.get(name)
        if array is not None and array.dtype == np.int64:
            w.constants[name] = np.roll(array + int(w.rng.integers(-1, 2)), 1)
        elif array is not None:
            w.constants[name] = array * np.float32(w.one_of(-1.0, 0.5, 0.0))
    return []
