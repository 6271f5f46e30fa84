"""The pass of `fuse`: FRN in loose operators becomes one node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploynorm.changes import Change
from deploynorm.contract import ADD_OP_TYPE, DOMAIN, NODE_ATTRIBUTES, OP_TYPE, PARAMETERS
from deploynorm.lowering import frn_nodes, lower
from deploynorm.onnx_file import node_counts
from deploynorm.residual import fuse_residuals, new_initializer
from deploynorm.rewrite.formula import Layout
from deploynorm.rewrite.intake import drop_bodies, prepared, unchanged, without_inferred_sizes
from deploynorm.rewrite.operators import REDUCTIONS, RULES
from deploynorm.rewrite.result import RewriteResult
from deploynorm.rewrite.values import Values
from deploynorm.rewrite.walk import Walk, precision

_VIEWS: Final = {"Cast", "CastLike", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_SQUARED: Final = {"ReduceL2", "ReduceSumSquare", "RMSNormalization"}
"""Operators that square by themselves."""
_DEEPEST: Final = 64
"""Operators between a mean and x."""


def fuse(model: ir.Model, *, source_sha256: str | None = None) -> RewriteResult:
    """Rewrites filter response normalization in loose operators, whoever exported it, as one node with its body.

    No pattern of operators is looked for. From each mean the pass goes back to the value x that it is the mean of, and
    from there walks forward and carries along, for each value, which formula of x it is. Where that is the operator's,
    for certain and at every size, the operator takes the value's place.

    Given:  x -> Pow 2 -> ReduceMean -> Add eps -> Sqrt -> Div(x, .) -> Mul gamma -> Add beta -> Max tau
    Result: FRN(x, gamma, beta, tau, eps)

    1. A mean of x^2 over all axes but two, however it is computed (a sum divided by the sizes, a norm squared, one axis
       after the other, a pool, of a flattened view, RMSNormalization), and x times its power -0.5.
    2. Numbers for each channel, before and behind, and a threshold in any form: what the formula says is what counts.
    3. NHWC: the channels are those of the axis that is left. Where x is in NHWC alone, a Transpose goes before and
       behind.
    4. float16 and bfloat16, with casts around or within: the operator is computed in float32, so what is computed in
       a coarser type than the result has is refused.
    5. An addition behind a FRN without threshold, and the threshold behind it -> the FRN's residual (fuse_residuals).

    Refused, with the reason: an epsilon outside of the root or no epsilon; another x than the mean's; a value on the
    way that another node reads, so that the mean would stay; parameters that are fed, or change over space; a size that
    only a run knows and that might broadcast; three axes without a parameter that tells the channels.

    Args:
        model: Any graph, of opset 7 or later, which is raised to 18. It is left untouched.
        source_sha256: Not used.

    Raises:
        ModelError: The opset cannot be raised, or a function of the model has our operator's name.
    """
    work = prepared(model)
    before = node_counts(work.graph.all_nodes())
    residuals = sum(node.op_type == ADD_OP_TYPE for node in frn_nodes(work.graph))
    changes = fuse_nodes(work)
    fuse_residuals(work)  # case 5
    added = [node for node in frn_nodes(work.graph) if node.op_type == ADD_OP_TYPE][residuals:]
    changes += [Change(str(node.outputs[0].name), "Add", "rewritten", became=ADD_OP_TYPE) for node in added]
    if not any(change.outcome == "rewritten" for change in changes):
        return unchanged(model, changes)
    drop_bodies(work)
    lower(work, "custom")
    without_inferred_sizes(work, model)
    return RewriteResult(work, tuple(changes), before, node_counts(work.graph.all_nodes()))


def fuse_nodes(work: ir.Model) -> list[Change]:
    """Cases 1 to 4 of `fuse`, in place, in a model that is `prepared`; the nodes have no bodies yet."""
    changes: list[Change] = []
    for graph in (work.graph, *work.graph.subgraphs()):
        changes += _Fusing(work, graph).run()
    RemoveUnusedNodesPass()(work)
    return changes


class _RefusedError(Exception):
    """Why a mean stays as it is."""


class _NoFormError(_RefusedError):
    """No form of x has the shape of an end; with the views that lead to that shape."""

    def __init__(self, reason: str, views: set[ir.Node]) -> None:
        super().__init__(reason)
        self.views = views


@dataclass(frozen=True)
class _Found:
    """What one walk found: values that the operator can compute, and why means cannot go."""

    walk: Walk
    ends: Sequence[ir.Value]
    reasons: Mapping[ir.Node, str]


class _Fusing:
    """The pass on one graph."""

    def __init__(self, model: ir.Model, graph: ir.Graph) -> None:
        self._model, self._graph = model, graph
        self._values = Values(model.opset_imports[""])
        self._order = {node: place for place, node in enumerate(graph)}
        self._done: set[ir.Node] = set()
        self._changes: list[Change] = []

    def run(self) -> list[Change]:
        for node in tuple(self._graph):
            if node.domain != "" or node.op_type not in (*REDUCTIONS, "RMSNormalization") or node in self._done:
                continue
            if self._values.constant(node.outputs[0]) is not None:
                continue
            try:
                self._fuse(node)
            except _RefusedError as reason:
                name = str(node.outputs[0].name)
                self._changes.append(Change(name, node.op_type, "unchanged", detail=str(reason)))
        return self._changes

    def _fuse(self, mean: ir.Node) -> None:
        refused: list[tuple[int, str]] = [(9, "what it reads is not the square of a value")]  # the nearest miss first
        sources, way = self._sources(mean)
        for x in sources:
            rank = None if x.shape is None else len(x.shape)
            if rank is None or rank < 3:
                refused.append((8, "the rank of what it reads is not known" if rank is None else "it reads no maps"))
                continue
            for space in (frozenset(range(2, rank)), frozenset(range(1, rank - 1))):
                if self._fuse_from(x, space, mean, way, refused):
                    return
        raise _RefusedError(min(refused, key=itemgetter(0))[1])

    def _fuse_from(
        self, x: ir.Value, space: frozenset[int], mean: ir.Node, way: Sequence[ir.Node], refused: list[tuple[int, str]]
    ) -> bool:
        """Whether what is computed from x is fused now, the mean with it; otherwise the reasons are added."""
        left: set[ir.Node] = set()
        while True:
            found = self._look(x, space, left)
            if mean in found.reasons:
                refused.append((1, found.reasons[mean]))
            elif any(mean in found.walk.formulas[end].means for end in found.ends):
                try:
                    self._emit(found, mean)
                except _NoFormError as reason:
                    refused.append((0, str(reason)))
                    if reason.views:  # the operator goes in front of them
                        left |= reason.views
                        continue
                    return False
                except _RefusedError as reason:
                    refused.append((0, str(reason)))
                    return False
                return True
            known = found.walk.refused
            refused += [(2 + (node is not mean), known[node]) for node in way if node in known]
            return False

    def _sources(self, mean: ir.Node) -> tuple[list[ir.Value], list[ir.Node]]:
        """The values that it may be the mean of, what is squared and what that is a view of, the first in front; and
        the nodes on the way from there."""
        found: list[ir.Value] = []
        way = [mean]
        value, squared = mean.inputs[0], mean.op_type in _SQUARED
        for _ in range(_DEEPEST):
            if value is None:
                break
            if squared:
                found.append(value)
            node = value.producer()
            if node is None or node.domain != "" or node.graph is not self._graph:
                break
            way.append(node)
            operands = [each for each in node.inputs if self._values.constant(each) is None]
            if node.op_type in _VIEWS or (squared and node.op_type == "Abs"):
                value = node.inputs[0]
            elif not squared and node.op_type in REDUCTIONS:
                value, squared = node.inputs[0], node.op_type in _SQUARED
            elif not squared and self._is_square(node):
                value, squared = node.inputs[0], True
            elif not squared and node.op_type in ("Mul", "Div", "Pow") and len(operands) == 1:
                value = operands[0]
            else:
                break
        return found[::-1], way

    def _is_square(self, node: ir.Node) -> bool:
        if node.op_type == "Mul":
            return node.inputs[0] is node.inputs[1]
        if node.op_type != "Pow":
            return False
        exponent = self._values.constant(node.inputs[1])
        return exponent is not None and exponent.size == 1 and bool((exponent == 2).all())

    def _look(self, x: ir.Value, space: frozenset[int], left: set[ir.Node]) -> _Found:
        """Walks from x but not over the nodes that are left, and again without comparisons that lead nowhere."""
        blocked = set(left)
        while True:
            walk = Walk(self._values, x, space, self._order, RULES, blocked)  # cases 1 and 2
            formulas = walk.formulas
            inner = {value: formula for value, formula in formulas.items() if formula.means}
            read = {value: reader for value in inner if (reader := self._outside(value, walk)) is not None}
            stray = {value.producer() for value in read if inner[value].above is not None}
            if not stray:
                break
            blocked |= {node for node in stray if node is not None}
        ends: list[ir.Value] = []
        behind: set[ir.Value | None] = set()  # what is computed from an end, which is there anyway
        for value, formula in inner.items():
            node = value.producer()
            if node is not None and not behind.isdisjoint(node.inputs):
                behind.add(value)
            elif formula.finished and value in read:
                ends.append(value)
                behind.add(value)
        reasons: dict[ir.Node, str] = {}
        for value, reader in read.items():
            if not inner[value].finished:
                for node in inner[value].means:
                    reasons.setdefault(node, reader)
        while True:  # a mean that stays keeps the others of the same values
            kept = [value for value in ends if not inner[value].means & reasons.keys()]
            if len(kept) == len(ends):
                return _Found(walk, ends, reasons)
            for value in set(ends) - set(kept):
                reason = next(reasons[node] for node in inner[value].means if node in reasons)
                for node in inner[value].means:
                    reasons.setdefault(node, reason)
            ends = kept

    def _outside(self, value: ir.Value, walk: Walk) -> str | None:
        """Who reads the value besides those that the walk knows, in words; None where nobody does."""
        if value.is_graph_output():
            return f"{value.name} is an output of the graph"
        for reader in value.consumers():
            if reader.graph is not self._graph or reader not in self._order:
                return f"{value.name} is read by {reader.op_type} of another graph"
            if not any(output in walk.formulas for output in reader.outputs):
                reason = walk.refused.get(reader, "it is not understood")
                return f"{value.name} is read by {reader.op_type} {reader.outputs[0].name}: {reason}"
        return None

    def _emit(self, found: _Found, mean: ir.Node) -> None:
        made = [(end, *self._replacement(found.walk, end)) for end in found.ends]  # all, or none
        for end, nodes, output in made:
            node = end.producer()
            assert node is not None
            self._done |= found.walk.formulas[end].means
            self._changes.append(Change(str(end.name), mean.op_type, "rewritten", became=OP_TYPE))
            # The new output takes the name, shape and type of the old one.
            ir.convenience.replace_nodes_and_values(self._graph, node, [], nodes, [end], [output])

    def _replacement(self, walk: Walk, end: ir.Value) -> tuple[list[ir.Node], ir.Value]:
        """The nodes that compute a value by the operator, and the output of the last."""
        formula, name = walk.formulas[end], str(end.name)
        for value, other in walk.formulas.items():
            # Case 4.
            on_the_way = other.means & formula.means or other.power == 2
            if on_the_way and other.above is None and precision(value) < precision(end):
                raise _RefusedError(f"{value.name} is computed in {value.dtype}, and the operator would not round it")
        channels = walk.channels
        if not channels:
            raise _RefusedError("the number of its channels is not known")
        x, before, behind = self._form(walk, end)
        wide = np.float64 if end.dtype == ir.DataType.DOUBLE else np.float32
        given = dict(zip(PARAMETERS, (formula.scale, formula.shift, formula.tau, formula.eps), strict=True))
        rank = len(formula.layout)
        if rank == 3 and all(np.ndim(number) == 0 for number in given.values()):
            raise _RefusedError("of three axes only a parameter for each of them could tell the channels")
        with np.errstate(over="ignore", under="ignore"):
            arrays = {key: np.broadcast_to(number, channels).astype(wide) for key, number in given.items()}
        _check_parameters(arrays)
        parameters = [new_initializer(self._model.graph, f"{name}_{key}", array) for key, array in arrays.items()]
        nodes: list[ir.Node] = []
        if before is not None:
            nodes.append(_transpose(x, before, f"{name}_channels_first"))
            x = nodes[-1].outputs[0]
        y = ir.Value(name=f"{name}_frn", type=x.type, shape=x.shape)
        producer = end.producer()
        assert producer is not None
        node = ir.node(OP_TYPE, [x, *parameters], NODE_ATTRIBUTES, domain=DOMAIN, outputs=[y], name=f"{name}_frn")
        node.metadata_props.update(producer.metadata_props)
        nodes.append(node)
        if behind is not None:
            nodes.append(_transpose(y, behind, f"{name}_channels_last"))
        return nodes, nodes[-1].outputs[0]

    def _form(self, walk: Walk, end: ir.Value) -> tuple[ir.Value, Sequence[int] | None, Sequence[int] | None]:
        """The form of x that the operator takes, with the transpositions before and behind it."""
        wanted = walk.formulas[end].layout
        forms = [
            (value, formula.layout)
            for value, formula in walk.formulas.items()
            if formula.is_x and value.dtype == end.dtype
        ]
        first = ((0,), (walk.channel,))
        for value, layout in forms:
            if layout == wanted and layout[:2] == first:
                return value, None, None
        # Case 3, and the next.
        for value, layout in forms:
            if layout[:2] == first and (behind := _order(layout, wanted)) is not None:
                return value, None, behind
        for value, layout in forms:
            if layout == wanted and set(first) <= set(layout):
                places = [layout.index(axes) for axes in first]
                before = [*places, *(axis for axis in range(len(layout)) if axis not in places)]
                return value, before, [before.index(axis) for axis in range(len(layout))]
        views = set()
        for value, formula in walk.formulas.items():
            node = value.producer()
            if formula.means and formula.layout == wanted and node is not None and node.op_type in _VIEWS:
                read = None if node.inputs[0] is None else walk.formulas.get(node.inputs[0])
                if read is not None and read.layout != wanted:
                    views.add(node)
        raise _NoFormError(f"no form of x has the shape and type of {end.name}", views)


def _check_parameters(arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    gamma, beta, tau, eps = arrays.values()
    if not (np.isfinite(gamma).all() and np.isfinite(beta).all() and np.isfinite(eps).all()):
        raise _RefusedError("a parameter is no finite number")
    if not (np.isneginf(tau) | np.isfinite(tau)).all():
        raise _RefusedError("a threshold is no finite number")
    if not (eps > 0).all():
        raise _RefusedError("its epsilon is not positive")


def _transpose(value: ir.Value, order: Sequence[int], name: str) -> ir.Node:
    shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in order])
    output = ir.Value(name=name, type=value.type, shape=shape)
    return ir.node("Transpose", [value], {"perm": list(order)}, outputs=[output], name=name)


def _order(given: Layout, wanted: Layout) -> list[int] | None:
    """The transposition from one layout to another; None where there is none."""
    if len(given) != len(wanted) or sorted(given) != sorted(wanted):
        return None
    free, found = list(range(len(given))), []
    for axes in wanted:
        place = next(axis for axis in free if given[axis] == axes)
        free.remove(place)
        found.append(place)
    return found
