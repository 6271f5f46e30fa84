"""The pass of `expand`: our operators' nodes become operators of ONNX, the inverse of `fuse`."""

from __future__ import annotations

import onnx_ir as ir

from deploynorm.changes import Change
from deploynorm.contract import LOWERINGS, MIN_OPSET
from deploynorm.lowering import frn_nodes, lower
from deploynorm.onnx_file import node_counts
from deploynorm.residual import split_residuals
from deploynorm.rewrite.intake import drop_bodies, prepared, refuse_blocked, unchanged, without_inferred_sizes
from deploynorm.rewrite.result import RewriteResult


def expand(model: ir.Model, lowering: str = "primitives", *, source_sha256: str | None = None) -> RewriteResult:
    """Writes each FRN of a file in operators of ONNX, for a runtime that reads neither ours nor local functions.

    Given:  FRN(x, gamma, beta, tau, eps)
    Result: its body, as `deploynorm export --lowering` writes it

    1. A node with or without its body in the file.
    2. The form with a residual -> the same, an Add and a Max.
    3. rmsnorm in a file of an opset before 23 -> the file is raised to 23.

    Args:
        model: As exported or fused. It is left untouched.
        lowering: "primitives" or "rmsnorm".
        source_sha256: Not used.

    Raises:
        ModelError: The file was rewritten for one machine, or cannot be raised to the opset, or take the lowering.
    """
    refuse_blocked(model)
    nodes = frn_nodes(model.graph)
    if not nodes:
        return unchanged(model, [])
    changes = [Change(str(node.outputs[0].name), node.op_type, "rewritten", became=lowering) for node in nodes]
    before = node_counts(model.graph.all_nodes())
    bare = model.clone()
    drop_bodies(bare)  # case 1: other versions may have written them otherwise
    work = prepared(bare, max(LOWERINGS[lowering].min_opset, MIN_OPSET))  # case 3
    split_residuals(work)  # case 2
    lower(work, lowering)
    without_inferred_sizes(work, model)
    return RewriteResult(work, tuple(changes), before, node_counts(work.graph.all_nodes()))
