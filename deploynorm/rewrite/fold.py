"""The pass of `fold`: what stands behind a convolution, for each channel, goes into its weight and bias."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploynorm.changes import Change
from deploynorm.onnx_file import node_counts
from deploynorm.residual import new_initializer, per_channel
from deploynorm.rewrite.intake import prepared, unchanged, without_inferred_sizes
from deploynorm.rewrite.result import RewriteResult
from deploynorm.rewrite.values import Array, Values

_CONVOLUTIONS: Final = ("Conv", "ConvTranspose")


def fold(model: ir.Model, *, source_sha256: str | None = None) -> RewriteResult:
    """Computes into convolutions what is done to their output for each channel, and how their weight is made.

    MABN in evaluation is a factor and a shift for each channel, and CenConv a weight less its mean: what exporters
    leave of them in loose operators, and what runtimes compute anew in each run.

    Given:  Conv -> Div root -> Mul gamma -> Add beta
    Result: Conv

    1. A weight or bias of Conv or ConvTranspose that is computed from constants -> that constant: CenConv's ReduceMean
       and Sub, a bias of zeros.
    2. Mul, Div, Add or Sub with a constant, one number or one for each channel, behind a convolution -> its weight and
       bias, as many of them as follow one another. In float64, rounded once.
    3. BatchNormalization behind a convolution -> its weight and bias.

    Refused: a convolution's value that a second node reads or that is an output; a weight, or parameters of
    BatchNormalization, that are fed or computed from inputs; BatchNormalization in training; constants that change over
    space; what is no finite number in the weight's type.

    Args:
        model: Any graph, of opset 7 or later, which is raised to 18. It is left untouched.
        source_sha256: Not used.

    Raises:
        ModelError: The opset cannot be raised.
    """
    work = prepared(model)
    before = node_counts(work.graph.all_nodes())
    changes: list[Change] = []
    for graph in (work.graph, *work.graph.subgraphs()):
        values = Values(work.opset_imports[""])
        for node in tuple(graph):
            if node.domain == "" and node.op_type in _CONVOLUTIONS:
                changes += _Folding(work, graph, values, node).run()
    if not any(change.outcome == "rewritten" for change in changes):
        return unchanged(model, changes)
    RemoveUnusedNodesPass()(work)
    without_inferred_sizes(work, model)
    return RewriteResult(work, tuple(changes), before, node_counts(work.graph.all_nodes()))


class _RefusedError(Exception):
    """Why a node stays behind a convolution."""


class _Step(NamedTuple):
    """What one node does to each channel: y = scale * x + shift."""

    scale: Any
    shift: Any


class _Folding:
    """The pass on one convolution."""

    def __init__(self, model: ir.Model, graph: ir.Graph, values: Values, node: ir.Node) -> None:
        self._model, self._graph, self._values, self._node = model, graph, values, node

    def run(self) -> list[Change]:
        node = self._node
        inputs = [*node.inputs, None, None][:3]
        weight, bias = (self._values.constant(value) for value in inputs[1:])
        if weight is None or weight.ndim < 3 or (bias is None and inputs[2] is not None):
            return []
        transposed = node.op_type == "ConvTranspose"
        channels = weight.shape[1] * node.attributes.get_int("group", 1) if transposed else weight.shape[0]
        shape = ir.Shape([None, channels, *[None] * (weight.ndim - 2)])
        scale, shift = np.ones(channels), np.zeros(channels) if bias is None else bias.astype(np.float64)
        # Case 1.
        computed = any(value is not None and not _stored(value) for value in inputs[1:])
        names = [f"{node.op_type} of a computed weight" if computed else node.op_type]
        end, left = node.outputs[0], []
        while (reader := self._reader(end)) is not None:
            try:
                step = self._step(reader, end, shape)
            except _RefusedError as reason:
                left = [Change(str(reader.outputs[0].name), reader.op_type, "unchanged", detail=str(reason))]
                break
            if step is None:
                break
            scale, shift = scale * step.scale, shift * step.scale + step.shift
            names.append(reader.op_type)
            end = reader.outputs[0]
        if names == [node.op_type]:
            return left
        with np.errstate(all="ignore"):
            folded = _scaled(weight, scale, node).astype(weight.dtype)
            shifted = shift.astype(weight.dtype)
        if not (np.isfinite(folded.astype(np.float64)).all() and np.isfinite(shifted.astype(np.float64)).all()):
            detail = f"folded, its weight is no finite number in {weight.dtype}"
            return [Change(str(end.name), names[0], "unchanged", detail=detail)]
        name = str(end.name)
        given = [inputs[0], new_initializer(self._model.graph, f"{name}_weight", folded)]
        if bias is not None or shift.any():
            given.append(new_initializer(self._model.graph, f"{name}_bias", shifted))
        made = ir.node(node.op_type, given, node.attributes, name=node.name, metadata_props=dict(node.metadata_props))
        # The new output takes the name, shape and type of the old one.
        ir.convenience.replace_nodes_and_values(self._graph, node, [], [made], [end], made.outputs)
        return [Change(name, ", ".join(names), "rewritten", became=node.op_type), *left]

    def _reader(self, value: ir.Value) -> ir.Node | None:
        """The operator that alone reads the value, in the same graph."""
        if value.is_graph_output() or len(value.uses()) != 1:
            return None
        [reader] = value.consumers()
        return reader if reader.graph is self._graph and reader.domain == "" else None

    def _step(self, node: ir.Node, value: ir.Value, shape: ir.Shape) -> _Step | None:
        """What the node does to each channel; None for one that is nothing of the kind."""
        if node.op_type == "BatchNormalization":
            return self._batch_normalization(node, shape)  # case 3
        if node.op_type not in ("Mul", "Div", "Add", "Sub") or len(node.inputs) != 2:
            return None
        first = node.inputs[0] is value  # case 2
        array = self._values.constant(node.inputs[1] if first else node.inputs[0])
        if array is None:
            return None
        constant = per_channel(array.astype(np.float64), shape)
        if constant is None:
            raise _RefusedError("its constant is not one number for each channel")
        one, nothing = np.float64(1), np.float64(0)
        if node.op_type == "Mul":
            return _Step(constant, nothing)
        if node.op_type == "Div":
            if not first or not constant.all():
                raise _RefusedError("it divides by the convolution, or by 0")
            return _Step(1 / constant, nothing)
        if node.op_type == "Sub":
            return _Step(one, -constant) if first else _Step(-one, constant)
        return _Step(one, constant)

    def _batch_normalization(self, node: ir.Node, shape: ir.Shape) -> _Step:
        arrays = [self._values.constant(value) for value in node.inputs[1:5]]
        if node.attributes.get_int("training_mode", 0) or len(node.outputs) != 1:
            raise _RefusedError("it is in training")
        known = [array.astype(np.float64) for array in arrays if array is not None and array.shape == (shape[1],)]
        if len(known) != 4:
            raise _RefusedError("its parameters are not constant")
        gamma, beta, mean, variance = known
        with np.errstate(all="ignore"):
            scale = gamma / np.sqrt(variance + (node.attributes.get_float("epsilon", 1e-5) or 0))
        return _Step(scale, beta - mean * scale)


def _stored(value: ir.Value) -> bool:
    node = value.producer()
    return node is None or node.op_type == "Constant"


def _scaled(weight: Array, scale: Any, node: ir.Node) -> Array:
    """The weight, each output channel times its number."""
    wide = weight.astype(np.float64)
    rest = (1,) * (weight.ndim - 2)
    if node.op_type == "Conv":
        scaled: Array = wide * scale.reshape(-1, 1, *rest)
        return scaled
    groups = node.attributes.get_int("group", 1) or 1  # (in, out / groups, ...), the inputs of each group together
    parts = wide.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    grouped: Array = (parts * scale.reshape(groups, 1, -1, *rest)).reshape(weight.shape)
    return grouped
