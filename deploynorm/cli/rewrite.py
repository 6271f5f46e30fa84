"""Rewrite an exported ONNX file for one machine, and check it against the file.

--optimize-for-cpu puts FRN, its residual additions and its thresholds on the layout that ONNX Runtime's convolutions
use on this processor, so that nothing is reordered between them. The result runs on this kind of processor, with this
version of onnxruntime and with our operator library alone; keep the file that it was made from. It is written only if
both compute the same numbers, on several shapes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deploynorm.cli import options

if TYPE_CHECKING:
    from deploynorm._check import Report
    from deploynorm.cli.terminal import Terminal
    from deploynorm.rewrite import RewriteResult
    from deploynorm.run.base import Runner

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="an ONNX file that deploynorm export has written")
    parser.add_argument("-o", "--output", type=Path, help="default: MODEL with the ending .cpu.onnx")
    rewrites = parser.add_argument_group("rewrites").add_mutually_exclusive_group(required=True)
    rewrites.add_argument(
        "--optimize-for-cpu", action="store_true", help="for ONNX Runtime on this machine's processor, in float32"
    )
    group = parser.add_argument_group("parity check")
    options.add_input_shape(group)
    options.add_tolerance(group)
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    import json

    import onnx_ir as ir

    from deploynorm.cli.onnx_file import read_graph
    from deploynorm.cli.tables import print_checks
    from deploynorm.cli.terminal import Terminal
    from deploynorm.contract import METADATA_CPU
    from deploynorm.errors import InputError, ModelError
    from deploynorm.files import sha256, staging
    from deploynorm.onnx_file import save
    from deploynorm.ort import import_onnxruntime, library_path
    from deploynorm.rewrite import optimize_for_cpu
    from deploynorm.run import open_runner

    terminal = Terminal(verbose=arguments.verbose, quiet=arguments.quiet)
    source: Path = arguments.model
    output: Path = arguments.output or source.with_suffix(".cpu.onnx")
    read_graph(source)
    if output.exists() and output.samefile(source):
        raise InputError("--output", "is MODEL itself, which other machines need", fix="choose another output file")
    import_onnxruntime()
    library_path()
    # Opening the source first tells of what is wrong with it under its own name.
    with staging(output) as folder, open_runner(source) as truth:
        with terminal.step("rewriting"):
            result = optimize_for_cpu(ir.load(source), source_sha256=sha256(source))
        _print_result(terminal, result)
        if not result.modified:
            raise ModelError(
                str(source), "nothing in it can be rewritten, for the reasons above", fix="use it as it is"
            )
        rewritten = folder / output.name
        save(result.model, rewritten)
        with terminal.step("checking the rewritten file"), open_runner(rewritten) as candidate:
            candidate.name, truth.name = f"{candidate.name}, rewritten", f"{truth.name}, as exported"
            report = _check(candidate, truth, arguments)
        print_checks(terminal, [report], title=f"Parity with {source}")
        machine = json.loads(result.model.metadata_props[METADATA_CPU])
        record = {
            "rewrite": "optimize_for_cpu",
            "machine": machine,
            "nodes": {"before": dict(result.before), "after": dict(result.after)},
            "changes": [change._asdict() for change in result.changes],
            "checks": [report.to_dict()],
        }
        terminal.write_json(arguments.json, record)
        report.raise_if_broken()
    terminal.line(
        f"wrote {output}, for onnxruntime {machine['onnxruntime']} on {machine['machine']} processors with blocks of "
        f"{machine['block']} channels alone"
    )
    return 0


def _print_result(terminal: Terminal, result: RewriteResult) -> None:
    from collections import Counter

    done = Counter((change.kind, change.detail) for change in result.changes if change.outcome == "rewritten")
    terminal.table(
        "Rewritten", ("operator", "count", "is now"), ((kind, n, detail) for (kind, detail), n in done.items())
    )
    left = [change for change in result.changes if change.outcome == "left"]
    if left:
        terminal.table(
            "Left, and why",
            ("value", "operator", "reason"),
            ((change.node, change.kind, change.detail) for change in left),
        )
    terminal.table(
        "Nodes",
        ("operator", "optimised by onnxruntime", "rewritten"),
        (
            (name, result.before[name] or "-", result.after[name] or "-")
            for name in sorted(result.before | result.after)
        ),
    )


def _check(candidate: Runner, truth: Runner, arguments: argparse.Namespace) -> Report:
    """The rewritten file against the file it was made from, on several shapes."""
    from deploynorm._check import check
    from deploynorm.cli.onnx_file import image_and_labels
    from deploynorm.inputs import parse_input_shapes, sample_inputs

    base = parse_input_shapes(arguments.input_shape)
    image, _ = image_and_labels(arguments.model)
    if not base and image is not None and len(truth.inputs) == 1:
        batch = truth.inputs[0].shape[0]
        base = {"": (batch if isinstance(batch, int) else 2, *image.shape)}
    samples = sample_inputs(truth.inputs, seed=arguments.seed, base=base)
    return check(candidate, truth, samples, rtol=arguments.rtol, atol=arguments.atol)
