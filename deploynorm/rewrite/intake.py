"""Graphs of other tools, before a pass looks at them: what is refused, and what every pass may count on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass, ShapeInferencePass

from deploynorm.changes import Change
from deploynorm.contract import BLOCKED_OP_TYPE, DOMAIN, MIN_OPSET, OPERATORS
from deploynorm.errors import ModelError
from deploynorm.onnx_file import OnnxFile, all_nodes, node_counts
from deploynorm.quiet import first_line, quiet
from deploynorm.rewrite.opset import raise_opset
from deploynorm.rewrite.result import RewriteResult

NCHWC: Final = "com.microsoft.nchwc"
"""Domain of ONNX Runtime's operators on (N, C/block, H, W, block), whose shape stands in the graph as (N, C, H, W)."""

_INFERRED = re.compile("unk__[0-9]+")
"""Names that onnx gives to sizes that it does not know."""


def check_graph(source: OnnxFile) -> None:
    """ModelError for a file that onnx_ir reads otherwise than it is written, or that is no graph: a cycle, a value that
    is missing or there twice, a sparse weight (which onnx_ir drops)."""
    graphs = [source.proto.graph, *(part.g for node in all_nodes(source.proto.graph.node) for part in node.attribute)]
    if any(graph.sparse_initializer for graph in graphs):
        raise ModelError(source.where, "it has a sparse weight, which would be lost", fix="make it a dense one")
    source.check_external_data()
    checked = onnx.ModelProto()
    checked.CopyFrom(source.proto)
    for graph in (checked.graph, *(part.g for node in all_nodes(checked.graph.node) for part in node.attribute)):
        for tensor in graph.initializer:  # their values are not the question, and may be in a file of 2 GB
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]))
    try:
        onnx.checker.check_model(checked)
    except onnx.checker.ValidationError as error:
        raise ModelError(source.where, f"not a valid ONNX graph: {first_line(error)}", fix="export it again") from error


def prepared(model: ir.Model, opset: int = MIN_OPSET) -> ir.Model:
    """A copy of the model of at least this opset, functions of others inlined, with the types and shapes of its values.

    Raises:
        ModelError: The opset cannot be raised.
    """
    model = model.clone()
    for node in model.graph.all_nodes():  # a copy has its constants in common with the model, and onnx_ir names them
        value = node.attributes.get("value") if node.op_type == "Constant" else None
        if value is not None and value.as_tensor().dtype != ir.DataType.STRING:
            tensor = value.as_tensor()
            own = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
            node.attributes["value"] = ir.AttrTensor("value", own)
    with quiet("onnx_ir", "onnxscript"):
        InlinePass(lambda function: (function.domain, function.name) not in _OURS)(model)
        raise_opset(model, opset)
        if not all(_is_known(value) for node in model.graph.all_nodes() for value in node.outputs):
            infer_shapes(model)
    RemoveUnusedNodesPass()(model)
    return model


def infer_shapes(model: ir.Model) -> None:
    """Gives values the types and shapes that follow from others, in place; ModelError where they contradict."""
    try:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    except Exception as error:
        raise ModelError("rewrite", f"the shapes of its values cannot be inferred: {first_line(error)}") from error


def _is_known(value: ir.Value) -> bool:
    """Whether a value's type and shape stand in the file, each size with a number or a name."""
    if value.type is None or value.shape is None:
        return not value.name
    return all(isinstance(size, int) or size.value is not None for size in value.shape)


_OURS: Final = {(DOMAIN, op_type) for op_type in OPERATORS}


def refuse_blocked(model: ir.Model) -> None:
    """ModelError for a graph on ONNX Runtime's own layout."""
    for node in model.graph.all_nodes():
        if node.domain == NCHWC or (node.domain, node.op_type) == (DOMAIN, BLOCKED_OP_TYPE):
            problem = "the file is rewritten already, or ONNX Runtime has optimised it"
            got = f"{node.domain}::{node.op_type}"
            raise ModelError("rewrite", problem, got=got, fix="rewrite the file as exported")


def drop_bodies(model: ir.Model) -> None:
    """Takes the bodies of our operators out of the model, in place."""
    for key in [key for key, each in model.functions.items() if (each.domain, each.name) in _OURS]:
        del model.functions[key]


def unchanged(model: ir.Model, changes: Iterable[Change]) -> RewriteResult:
    """The result of a pass that found nothing to do: the model as it was."""
    counts = node_counts(model.graph.all_nodes())
    return RewriteResult(model, tuple(changes), counts, counts)


def without_inferred_sizes(model: ir.Model, source: ir.Model) -> None:
    """Takes the names of sizes that inference made up out of the model again, in place."""
    own = {str(size) for value in _values(source) for size in value.shape or () if isinstance(size, ir.SymbolicDim)}
    for value in _values(model):
        if value.shape is not None:
            made_up = [
                isinstance(size, ir.SymbolicDim)
                and size.value is not None
                and size.value not in own
                and _INFERRED.search(size.value) is not None
                for size in value.shape
            ]
            if any(made_up):
                value.shape = ir.Shape(
                    [None if gone else size for size, gone in zip(value.shape, made_up, strict=True)]
                )


def _values(model: ir.Model) -> list[ir.Value]:
    graphs = (model.graph, *model.graph.subgraphs())
    return [value for graph in graphs for value in (*graph.inputs, *(v for node in graph for v in node.outputs))]
