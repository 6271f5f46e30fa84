"""The pass of `optimize_for_cpu` over the graph that ONNX Runtime has optimised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploynorm.changes import Change
from deploynorm.contract import BLOCK_ATTRIBUTE, BLOCKED_OP_TYPE, DOMAIN, INPUTS, OPERATORS, PARAMETERS
from deploynorm.lowering import frn_nodes
from deploynorm.residual import TAU, constant, has_no_threshold, per_channel, same_shape
from deploynorm.rewrite.intake import NCHWC

_PADDING: Final = dict(zip(PARAMETERS, (0.0, 0.0, -np.inf, 1.0), strict=True))
"""Parameters of the channels that fill up the last block: any input gives zero, or the residual."""

_RESIDUAL: Final = len(INPUTS)  # of the blocked FRN

_Array = npt.NDArray[np.float32]


def move_reorders(model: ir.Model, block: int) -> tuple[Change, ...]:
    """Moves each ReorderOutput behind the nodes that can work on its input; cases 1 to 7 of `optimize_for_cpu`.

    The model, as ONNX Runtime optimises it, is changed in place. Returns what became of each node that was looked at,
    and why each ReorderOutput is still there.
    """
    changes = _Blocking(model.graph, block).run()
    RemoveUnusedNodesPass()(model)
    for node in model.graph:
        if (node.domain, node.op_type) == (NCHWC, "ReorderOutput"):
            value = node.outputs[0]
            readers = sorted({reader.op_type for reader in value.consumers()})
            readers += ["the caller"] if value.is_graph_output() else []
            detail = f"read in the plain layout by {', '.join(readers)}"
            changes.append(Change(str(value.name), node.op_type, "unchanged", detail=detail))
    return tuple(changes)


class _RefusedError(Exception):
    """Why a node stays unchanged."""


class _Reordered(NamedTuple):
    """A value in the plain layout that is there in the blocked one too."""

    blocked: ir.Value
    channels: int


class _Blocking:
    """One run of the pass. Each rule handles a node in place and returns what it became, or raises _RefusedError."""

    def __init__(self, graph: ir.Graph, block: int) -> None:
        self._graph = graph
        self._block = block
        self._made: list[ir.Node] = []
        values = (value for node in graph.all_nodes() for value in (*node.inputs, *node.outputs))
        self._names = {str(value.name) for value in (*values, *graph.inputs) if value} | set(graph.initializers)
        self._rules: dict[str, Callable[[ir.Node], str]] = {
            **{f"{DOMAIN}::{op_type}": self._frn for op_type in OPERATORS},
            f"{NCHWC}::ReorderInput": self._reorder_input,
            "::Add": self._add,
            **dict.fromkeys(("::Max", "::Relu"), self._max),
            **dict.fromkeys(("::MaxPool", "::AveragePool", "::GlobalMaxPool", "::GlobalAveragePool"), self._pool),
            "::ReduceMean": self._reduce_mean,
        }

    def run(self) -> list[Change]:
        changes: list[Change] = []
        for node in tuple(self._graph):  # in topological order: a node's inputs are settled before it
            rule = self._rule(node)
            if rule is None or (node.domain == "" and not any(map(_reordered, node.inputs))):
                continue
            name = str(node.outputs[0].name)
            try:
                changes.append(Change(name, node.op_type, "rewritten", became=rule(node)))
            except _RefusedError as reason:
                changes.append(Change(name, node.op_type, "unchanged", detail=str(reason)))
        for node in frn_nodes(self._graph):
            if node.graph is not self._graph:
                inside = "it is inside a branch or a loop"
                changes.append(Change(str(node.outputs[0].name), node.op_type, "unchanged", detail=inside))
        return changes

    def _rule(self, node: ir.Node) -> Callable[[ir.Node], str] | None:
        return self._rules.get(f"{node.domain}::{node.op_type}")

    def _need_gain(self, node: ir.Node) -> None:
        """Refuses a node that would only add a reorder: none before or behind it could then be removed."""

        def plain(value: ir.Value, besides: ir.Node | None = None) -> bool:
            readers = [reader for reader in value.consumers() if reader is not besides]
            return value.is_graph_output() or not all(map(self._rule, readers))

        before = [value for value in node.inputs if value is not None and _reordered(value)]
        if all(plain(value, besides=node) for value in before) and plain(node.outputs[0]):
            raise _RefusedError("its inputs and its output are both needed in the plain layout")

    def _frn(self, node: ir.Node) -> str:
        # Case 1.
        x, parameters = _need(node.inputs[0]), node.inputs[1:_RESIDUAL]
        residuals = [_need(value).blocked for value in node.inputs[_RESIDUAL:]]
        if self._padded(x.channels) != x.channels:
            constants = [array for value in parameters if (array := constant(value)) is not None]
            if len(constants) < len(parameters):
                raise _RefusedError("its parameters are not constant, so the last block cannot be filled up")
            named = zip(PARAMETERS, constants, strict=True)
            parameters = [self._parameter(node, name, constant) for name, constant in named]
        inputs = [x.blocked, *parameters, *residuals]
        self._replace(node, BLOCKED_OP_TYPE, inputs, {BLOCK_ATTRIBUTE: self._block}, DOMAIN)
        return BLOCKED_OP_TYPE

    def _reorder_input(self, node: ir.Node) -> str:
        # Case 2.
        x = _need(node.inputs[0])
        if node.attributes.get_int("channels_last", 0) != 0:
            raise _RefusedError("it reads channels that come last")
        node.outputs[0].replace_all_uses_with(x.blocked)
        self._graph.remove(node, safe=True)
        return "gone with the ReorderOutput before it"

    def _add(self, node: ir.Node) -> str:
        a, b = node.inputs
        both = _need(a), _need(b)
        if not same_shape(a, b):
            raise _RefusedError("its inputs are not known to have the same shape")
        frns = {
            frn: other.blocked
            for value, other in zip((a, b), reversed(both), strict=True)
            if (frn := _only_read_here(value)) and len(frn.inputs) == _RESIDUAL and has_no_threshold(frn)
        }
        if not frns:  # Case 3.
            self._replace(node, "Add", [x.blocked for x in both])
            return "Add of blocked values"
        # Case 4. Of two, the later: its input is the one still in the processor's cache.
        frn = max(frns, key=self._made.index)
        self._replace(node, BLOCKED_OP_TYPE, [*frn.inputs, frns[frn]], frn.attributes, DOMAIN)
        return "the residual of the FRN before it"

    def _max(self, node: ir.Node) -> str:
        plain = [value for value in node.inputs if not _reordered(value)]
        if len(node.inputs) != len(plain) + 1 or len(plain) != (node.op_type == "Max"):
            raise _RefusedError("it is no maximum of one value and a constant")
        value = next(value for value in node.inputs if _reordered(value))
        x = _need(value)
        bound = constant(plain[0]) if plain else np.zeros(1, np.float32)
        if bound is None:
            raise _RefusedError("its bound is not constant")
        frn = _only_read_here(value)
        if frn is None:  # Case 6.
            if bound.size != 1 or bound.ndim > 4:
                raise _RefusedError("the node before it is no FRN, or is read by another node too")
            self._replace(node, node.op_type, [x.blocked, *plain])
            return f"{node.op_type} of a blocked value"
        tau = constant(frn.inputs[TAU])  # Case 5.
        if tau is None:
            raise _RefusedError("the threshold of the FRN before it is not constant")
        shape = ir.Shape((None, x.channels, None, None))
        bound = per_channel(bound, shape)
        if bound is None:
            raise _RefusedError("its constant is not one for each channel")
        parameter = self._parameter(node, "tau", np.maximum(tau, self._fill(bound, _PADDING["tau"])))
        inputs = [*frn.inputs[:TAU], parameter, *frn.inputs[TAU + 1 :]]
        self._replace(node, BLOCKED_OP_TYPE, inputs, frn.attributes, DOMAIN)
        return "the threshold of the FRN before it"

    def _pool(self, node: ir.Node) -> str:
        # Case 7, with the next rule.
        if len(node.outputs) != 1:
            raise _RefusedError("its indices are read, which the blocked form does not give")
        if node.attributes.get_int("ceil_mode", 0) and node.attributes.get_int("count_include_pad", 0):
            raise _RefusedError("the blocked form divides by whole windows, where its last ones are cut off")
        self._replace(node, node.op_type, [_need(node.inputs[0]).blocked], node.attributes, NCHWC)
        return f"{NCHWC}::{node.op_type}"

    def _reduce_mean(self, node: ir.Node) -> str:
        # Case 7.
        x = _need(node.inputs[0])
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or sorted(axis % 4 for axis in axes.tolist()) != [2, 3]:
            raise _RefusedError("its axes are not constant, or not H and W only")
        if node.attributes.get_int("keepdims", 1) != 1:
            raise _RefusedError("it drops the axes H and W")
        self._replace(node, "GlobalAveragePool", [x.blocked], domain=NCHWC)
        return f"{NCHWC}::GlobalAveragePool"

    def _replace(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, ir.Attr] | Mapping[str, int] | None = None,
        domain: str = "",
    ) -> None:
        """Puts a node on blocked values in the place of another, with a ReorderOutput behind it."""
        self._need_gain(node)
        [channels] = {x.channels for x in map(_reordered, node.inputs) if x}
        output = node.outputs[0]
        blocked = ir.Value(name=self._unused(f"{output.name}:blocked"))
        made = ir.node(op_type, inputs, attributes, domain=domain, outputs=[blocked], name=blocked.name)
        reorder = ir.node("ReorderOutput", [blocked], {"channels": channels, "channels_last": 0}, domain=NCHWC)
        self._made.append(made)
        # The new output takes the name, shape and type of the old one.
        ir.convenience.replace_nodes_and_values(self._graph, node, [node], [made, reorder], [output], reorder.outputs)

    def _parameter(self, node: ir.Node, name: str, array: _Array) -> ir.Value:
        """A constant of the blocked FRN that takes the place of `node`, with the last block filled up."""
        name_here = self._unused(f"{node.outputs[0].name}:{name}")
        value = ir.Value(name=name_here, const_value=ir.tensor(self._fill(array, _PADDING[name]), name=name_here))
        self._graph.register_initializer(value)
        return value

    def _unused(self, name: str) -> str:
        """The name, longer where the graph has a value of that name already."""
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name

    def _fill(self, array: _Array, filler: float) -> _Array:
        missing = self._padded(array.size) - array.size
        return np.concatenate([array, np.full(missing, filler, np.float32)])

    def _padded(self, channels: int) -> int:
        return -(-channels // self._block) * self._block


def _reordered(value: ir.Value | None) -> _Reordered | None:
    node = None if value is None else value.producer()
    if node is None or (node.domain, node.op_type) != (NCHWC, "ReorderOutput") or node.inputs[0] is None:
        return None
    if node.attributes.get_int("channels_last", 0) != 0:
        return None
    return _Reordered(node.inputs[0], node.attributes["channels"].as_int())


def _need(value: ir.Value | None) -> _Reordered:
    found = _reordered(value)
    if found is None:
        node = None if value is None else value.producer()
        source = value and value.name if node is None else f"{node.op_type} {node.outputs[0].name}"
        raise _RefusedError(f"it reads {source}, which is in the plain layout")
    return found


def _only_read_here(value: ir.Value | None) -> ir.Node | None:
    """The blocked FRN that the value comes from, when neither it nor the blocked value has a second reader."""
    x = _reordered(value)
    if value is None or x is None or value.is_graph_output() or len(value.uses()) != 1 or len(x.blocked.uses()) != 1:
        return None
    node = x.blocked.producer()
    return node if node is not None and (node.domain, node.op_type) == (DOMAIN, BLOCKED_OP_TYPE) else None
