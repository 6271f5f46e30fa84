"""FRN and what surrounds it on the channel-blocked layout of ONNX Runtime's convolutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from deploynorm import ort
from deploynorm.contract import DOMAIN, METADATA_CPU, OP_TYPE, PRODUCER
from deploynorm.errors import ModelError
from deploynorm.files import scratch_folder
from deploynorm.lowering import frn_nodes
from deploynorm.onnx_file import node_counts, save
from deploynorm.ort import machine
from deploynorm.rewrite.blocking import move_reorders
from deploynorm.rewrite.intake import refuse_blocked
from deploynorm.rewrite.result import RewriteResult


def optimize_for_cpu(model: ir.Model, *, source_sha256: str | None = None) -> RewriteResult:
    """Rewrites an exported graph for the processor and the ONNX Runtime of this machine, and for no other.

    ONNX Runtime's own optimised graph puts convolutions on a layout with 8 or 16 channels side by side, and reorders
    before and behind every node that it does not know there. The pass starts from that graph and moves the reorders
    on, behind each node in turn; where the next one would undo it, both go.

    Given:  blocked -> ReorderOutput -> FRN -> ReorderInput -> blocked
    Result: blocked -> BlockedFRN -> blocked

    1. FRN of a reordered value -> the blocked FRN. Channels of a last, partly filled block get parameters that keep
       them zero. Refused: such channels with parameters that are not constant.
    2. ReorderInput of a reordered value -> the value before both.
    3. Add of two reordered values of one shape -> Add of the blocked ones. Refused: shapes that are not known to be
       equal, since a broadcast reads blocked data wrongly.
    4. Add as in case 3, where one of the two is a FRN without threshold that only this Add reads -> the FRN's
       residual.
    5. Max with a constant for each channel, and Relu, of a FRN that nothing else reads -> the FRN's threshold.
       Refused: a maximum that is not constant, or not one number for each channel.
    6. Relu, and Max with one number, of any other reordered value -> Relu and Max of the blocked one.
    7. MaxPool, AveragePool and their global forms, and ReduceMean over H and W, of a reordered value -> ONNX
       Runtime's blocked pools. Refused: the indices of MaxPool; an AveragePool that counts padding and rounds its
       size up, where the two forms differ; a mean over other axes, or that drops them.

    A value that is an output of the graph, or that some other node reads, keeps its ReorderOutput. Refused in every
    case: a node where all inputs and the output are such values, since that would only add a reorder.

    Args:
        model: As exported, in float32, with each FRN as one node. It is left untouched.
        source_sha256: Of the file that the model was read from, for the note of this machine in the result's metadata.

    Raises:
        ModelError: The model has no FRN node, is not float32, was rewritten or optimised before, or cannot be run.
        BackendError: onnxruntime or our operator library is missing, or it does not block channels on this processor.
    """
    _refuse(model)
    runtime = ort.import_onnxruntime()
    note = machine.describe(runtime, source_sha256)
    with scratch_folder() as folder:
        save(model, folder / "model.onnx", external_data=True)
        optimized, _ = _optimized_by_onnxruntime(folder / "model.onnx", folder)
        ir.external_data.load_to_model(optimized)
    before = node_counts(optimized.graph.all_nodes())
    changes = move_reorders(optimized, machine.block_size(runtime))
    RemoveUnusedOpsetsPass()(optimized)  # ONNX Runtime writes all that it knows
    optimized.producer_name = PRODUCER
    optimized.metadata_props.update(model.metadata_props)  # ONNX Runtime drops them
    optimized.metadata_props[METADATA_CPU] = json.dumps(note)
    return RewriteResult(optimized, changes, before, node_counts(optimized.graph.all_nodes()))


def _refuse(model: ir.Model) -> None:
    refuse_blocked(model)
    nodes = frn_nodes(model.graph)
    if not nodes:
        problem = f"the file has no node {DOMAIN}::{OP_TYPE}, without which this has no use"
        fix = "export with --lowering custom; a network without FRN is fast as it is"
        raise ModelError("rewrite", problem, fix=fix)
    for node in nodes:
        x = node.inputs[0]
        if x is not None and x.dtype not in (None, ir.DataType.FLOAT):
            problem = f"the FRN of {node.outputs[0].name} is not float32"
            raise ModelError("rewrite", problem, got=x.dtype, fix="export in float32")


def optimize_file(model: str | Path | bytes, folder: Path) -> Path | None:
    """`optimize_for_cpu` on the way to a session: a file in the folder, of use as long as that session opens.

    Its metadata is the model's, and has no note of this machine. None where nothing in the model can be rewritten.

    Raises:
        ModelError, BackendError: ONNX Runtime cannot open the model, or does not block channels on this processor.
    """
    block = machine.block_size(ort.import_onnxruntime())
    optimized, about = _optimized_by_onnxruntime(model, folder)
    if not any(change.outcome == "rewritten" for change in move_reorders(optimized, block)):
        return None
    optimized.graph.name, optimized.graph.doc_string = about.graph_name, about.graph_description
    optimized.domain, optimized.model_version = about.domain, about.version
    optimized.producer_name, optimized.doc_string = about.producer_name, about.description
    optimized.metadata_props.update(about.custom_metadata_map)
    path = folder / "rewritten.onnx"
    ir.save(optimized, path)  # weights stay in the file that ONNX Runtime has written
    return path


def _optimized_by_onnxruntime(model: str | Path | bytes, folder: Path) -> tuple[ir.Model, Any]:
    """The model as ONNX Runtime optimizes it, with weights that stand in the folder, and what it says of its file."""
    options = ort.quiet_options()  # it would warn that what it writes is for this machine only, as it should be
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    # Weights beside the file: one protobuf holds 2 GB at most.
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    about = ort.session(model, options=options, optimize=False).get_modelmeta()
    return ir.load(folder / "optimized.onnx"), about
