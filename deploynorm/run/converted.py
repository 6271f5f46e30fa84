"""For runtimes that read files of their own: a model in ONNX's operators, and the call of their converter."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from deploynorm.errors import BackendError, ModelError
from deploynorm.lowering import frn_nodes
from deploynorm.onnx_file import OnnxFile
from deploynorm.rewrite.expand import expand
from deploynorm.rewrite.fuse import fuse
from deploynorm.rewrite.intake import check_graph, infer_shapes


def standard_model(file: OnnxFile, runtime: str, *, maps: bool = False) -> ir.Model:
    """The file as a converter takes it: each FRN in primitives, with the shapes of its values.

    FRN in loose operators is written anew too, since ncnn computes other numbers of some forms of it, without a word.

    Args:
        file: With its external data beside it.
        runtime: What it is called in errors.
        maps: Whether the runtime is right about FRN on (N, C, H, W) alone.

    Raises:
        ModelError: An input or output is not float32, the file computes in a half type, or an FRN is none of maps.
    """
    check_graph(file)
    if file.half_types:
        problem, got = f"{runtime} is asked for float32 alone", f"a graph in {' and '.join(file.half_types)}"
        raise ModelError(file.where, problem, got=got, fix="export it in float32")
    whole = replace(file, proto=file.whole_proto()).to_ir()
    graph = whole.graph
    graph.inputs[:] = [value for value in graph.inputs if value.name not in graph.initializers]
    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            if value.dtype != ir.DataType.FLOAT:
                problem = f"{kind} {value.name!r} is of a type that this runner does not take to {runtime}"
                got = "an unknown type" if value.dtype is None else value.dtype.name.lower()
                raise ModelError(file.where, problem, got=got, expected="float32")
            if kind == "input" and value.shape and value.shape[0] == ir.SymbolicDim(None):
                value.shape = ir.Shape(["deploynorm_batch", *value.shape[1:]])  # so that it can be found again
    try:
        fused = fuse(whole).model
        infer_shapes(fused)
        for node in frn_nodes(fused.graph) if maps else ():
            x = node.inputs[0]
            if x is None or x.shape is None or len(x.shape) != 4:
                problem = f"node {node.name}: {runtime} computes FRN of (N, C, H, W) alone"
                raise ModelError(
                    file.where, problem, got="X of unknown rank" if x is None or x.shape is None else f"X of {x.shape}"
                )
        model = expand(fused).model
        infer_shapes(model)
    except ModelError as error:
        raise ModelError(file.where, error.problem, got=error.got, fix=error.fix) from error
    return model


def convert(where: str, converter: str, words: Sequence[str | Path], made: Path) -> None:
    """Runs a converter in the folder of the file that it is to make.

    Raises:
        BackendError: It cannot be started.
        ModelError: It ends without having made the file; with the last lines that it printed.
    """
    made.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            list(map(str, words)), cwd=made.parent, capture_output=True, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise BackendError(
            converter, f"cannot be started: {error.strerror or error}", fix="install it again"
        ) from error
    if done.returncode != 0 or not made.exists():
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip(" #=-")]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        last = f", its last words {'; '.join(lines[-3:])[-300:]!r}" if lines else ""
        raise ModelError(where, f"{converter} does not convert the model: it ended with {ended}{last}")
