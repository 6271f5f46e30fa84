"""FRN, an addition and a threshold in an ONNX graph -> the operator that does all three."""

from __future__ import annotations

from itertools import chain, count
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploynorm.contract import ADD_OP_TYPE, DOMAIN, INPUTS, NODE_ATTRIBUTES, OP_TYPE
from deploynorm.lowering import frn_nodes

_Array = npt.NDArray[Any]

TAU: Final = INPUTS.index("tau")


def fuse_residuals(model: ir.Model) -> None:
    """Writes the residual into the FRN where a graph proves that this computes the same, in place.

    Given:  max(FRN(x) + residual, tau), FRN without a threshold of its own, tau for each channel or 0 (ReLU); also
            written as relu(FRN(x) + residual - tau) + tau
    Result: FRNAdd(x, residual) with that tau

    The sum and FRN's value have no other reader and are no outputs; the residual has FRN's shape at every size, so that
    nothing is broadcast, and its type. Of two FRNs that are added, the later takes the other as its residual.
    """
    for frn in reversed(frn_nodes(model.graph)):
        _fuse(model.graph, frn)
    RemoveUnusedNodesPass()(model)


def _fuse(graph: ir.Graph, frn: ir.Node) -> None:
    y, add = frn.outputs[0], _only_reader(frn)
    if frn.op_type != OP_TYPE or not has_no_threshold(frn) or add is None or add.op_type != "Add":
        return
    residual = next((value for value in add.inputs if value is not y), None)
    if residual is None or residual.dtype != y.dtype or not same_shape(residual, y):
        return
    assert y.shape is not None
    threshold, bound = _threshold(add)
    tau = None if bound is None else per_channel(bound, y.shape)
    if tau is None or np.isnan(tau).any():  # a maximum gives NaN there, the operator the sum
        return
    name = f"{frn.name or y.name}_tau"
    dtype = constant(frn.inputs[TAU]).dtype  # type: ignore[union-attr]  # which has_no_threshold has seen
    value = new_initializer(graph, name, tau.astype(dtype))
    made = ir.node(
        ADD_OP_TYPE,
        [*frn.inputs[:TAU], value, *frn.inputs[TAU + 1 :], residual],
        NODE_ATTRIBUTES,
        domain=DOMAIN,
        name=frn.name,
        metadata_props=dict(frn.metadata_props),
    )
    assert isinstance(frn.graph, ir.Graph)
    # The new output takes the name, shape and type of the old one.
    ir.convenience.replace_nodes_and_values(
        frn.graph, threshold[-1], [frn, add, *threshold], [made], threshold[-1].outputs, made.outputs
    )


def split_residuals(model: ir.Model) -> list[ir.Node]:
    """The inverse of fuse_residuals, in place; returns the nodes that stay, of a rank or a tau that is not known.

    Given:  FRNAdd(x, residual)
    Result: max(FRN(x) + residual, tau), FRN without a threshold of its own
    """
    left = []
    for node in frn_nodes(model.graph):
        y, tau = node.outputs[0], constant(node.inputs[TAU])
        if node.op_type != ADD_OP_TYPE:
            continue
        if y.shape is None or y.dtype is None or tau is None:
            left.append(node)
            continue
        *parameters, residual = node.inputs
        column = tau.astype(y.dtype.numpy()).reshape(-1, *(1,) * (len(y.shape) - 2))
        parameters[TAU] = new_initializer(model.graph, f"{y.name}_no_tau", np.full_like(tau, -np.inf))
        bound = new_initializer(model.graph, f"{y.name}_tau", column)
        values = [ir.Value(name=f"{y.name}_{part}", type=y.type, shape=y.shape) for part in ("frn", "sum")]
        made = [
            ir.node(
                OP_TYPE,
                parameters,
                NODE_ATTRIBUTES,
                domain=DOMAIN,
                outputs=values[:1],
                name=node.name,
                metadata_props=dict(node.metadata_props),
            ),
            ir.node("Add", [values[0], residual], outputs=values[1:], name=values[1].name),
            ir.node("Max", [values[1], bound], name=bound.name),
        ]
        assert isinstance(node.graph, ir.Graph)
        # The new output takes the name, shape and type of the old one.
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], made, node.outputs, made[-1].outputs)
    return left


def new_initializer(graph: ir.Graph, name: str, array: _Array) -> ir.Value:
    """A constant of the graph, under this name or one like it that is free."""
    taken = graph.initializers
    name = next(each for each in chain([name], (f"{name}_{n}" for n in count(1))) if each not in taken)
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _only_reader(node: ir.Node | None) -> ir.Node | None:
    """The standard operator that alone reads the node's value, once and in the same graph."""
    value = None if node is None else node.outputs[0]
    if node is None or value is None or value.is_graph_output() or len(value.uses()) != 1:
        return None
    [(reader, _)] = value.uses()
    return reader if reader.graph is node.graph and reader.domain == "" else None


def _threshold(add: ir.Node) -> tuple[list[ir.Node], _Array | None]:
    """The nodes behind a sum that bound it from below, and by what; None where nothing does."""
    first = _only_reader(add)
    if first is None:
        return [], None
    if first.op_type == "Relu":
        return [first], np.zeros(1, np.float32)
    bound = _operand(first, add.outputs[0])
    if first.op_type == "Max" or (first.op_type == "Clip" and first.inputs[0] is add.outputs[0]):
        return [first], bound
    relu = _only_reader(first)
    last = _only_reader(relu)
    if first.op_type != "Sub" or first.inputs[0] is not add.outputs[0] or relu is None or last is None:
        return [], None
    back = _operand(last, relu.outputs[0])
    same = bound is not None and back is not None and np.isfinite(bound).all() and np.array_equal(bound, back)
    return [first, relu, last], bound if same and (relu.op_type, last.op_type) == ("Relu", "Add") else None


def _operand(node: ir.Node, value: ir.Value) -> _Array | None:
    """The constant that a node of two inputs reads beside the value."""
    others = [each for each in node.inputs if each is not value]
    return constant(others[0]) if len(node.inputs) == 2 and len(others) == 1 else None


def has_no_threshold(frn: ir.Node) -> bool:
    tau = constant(frn.inputs[TAU])
    return tau is not None and bool(np.isneginf(tau).all())


def constant(value: ir.Value | None) -> _Array | None:
    if value is None or value.is_graph_input():  # which may be fed
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether both have one shape for certain, dynamic sizes by their names."""
    if a is None or b is None or a.shape is None or b.shape is None:
        return False
    # ONNX Runtime writes -1 for a size that an operator of a library leaves unknown.
    known = all(size >= 0 if isinstance(size, int) else size.value not in (None, "", "?") for size in a.shape)
    return known and a.shape == b.shape


def per_channel(bound: _Array, shape: ir.Shape) -> _Array | None:
    """A constant that is broadcast over a tensor (N, C, ...) as (C,); None if it is not the same over all but C."""
    channels, rank = shape[1], len(shape)
    if (1,) * (rank - bound.ndim) + bound.shape not in ((1, channels, *(1,) * (rank - 2)), (1,) * rank):
        return None
    return np.broadcast_to(bound.reshape(-1), (channels,)) if isinstance(channels, int) else None
