"""Fold a network, export it to ONNX, and check the file against the network.

Each FRN layer becomes one node; the file carries its body in standard operators too, so that any runtime can run
it. The file is written only if it computes the same numbers as the network in float64, on several shapes. A file in
half precision is checked with every tensor rounded, and overflowing, as on a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploynorm.cli import options
from deploynorm.contract import MAX_OPSET, MIN_OPSET

if TYPE_CHECKING:
    from deploynorm.checkpoint import Checkpoint

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("-o", "--output", type=Path, help="default: MODEL with the ending .onnx")
    group = parser.add_argument_group("the ONNX file")
    options.add_precision(group)
    options.add_dynamic(group)
    group.add_argument(
        "--opset", type=int, help=f"{MIN_OPSET} to {MAX_OPSET} (default 20; 22 for bfloat16, 23 for rmsnorm)"
    )
    group.add_argument(
        "--lowering",
        choices=("custom", "rmsnorm", "primitives"),
        default="custom",
        help="FRN as one node (default), on RMSNormalization, or in primitive operators",
    )
    group.add_argument(
        "--no-function", action="store_true", help="leave the node's body out: only our libraries run the file then"
    )
    group.add_argument("--no-fold", action="store_true", help="export the network as it is")
    group.add_argument("--external-data", action="store_true", help="weights in a file of their own (always past 2 GB)")
    options.add_parity(parser)
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    import json

    import torch

    from deploynorm._export import export
    from deploynorm._export.precision import DTYPES, HALF, dtype_of, kept_layers, to_precision
    from deploynorm._fold import fold
    from deploynorm.cli.manifest import manifest
    from deploynorm.cli.network import load_network
    from deploynorm.cli.parity import check_folded, check_onnx, raise_if_broken
    from deploynorm.cli.tables import fold_to_dict, print_checks, print_fold
    from deploynorm.cli.terminal import Terminal
    from deploynorm.files import staging

    terminal = Terminal(verbose=arguments.verbose, quiet=arguments.quiet)
    output: Path = arguments.output or arguments.model.with_suffix(".onnx")
    with staging(output) as folder:
        with terminal.step(f"reading {arguments.model}"):
            network = load_network(arguments)
        examples = network.example_inputs(arguments.dynamic)
        own, dtype = dtype_of(network.model), DTYPES.get(arguments.dtype)
        kept_layers(network.model, arguments.keep_float32)  # a name that is wrong is told at once
        model, checks, folding = network.model, [], None
        if own in HALF and dtype not in (None, own) and (dtype == torch.float32 or not arguments.keep_io_types):
            # Folding in the network's own half type would round its weights once more.
            model = to_precision(model, torch.float32, keep_io_types=arguments.keep_io_types)
            examples = tuple(x if arguments.keep_io_types else x.float() for x in examples)
        if not arguments.no_fold:
            with terminal.step("folding"):
                model, folding = fold(model, examples, dynamic=arguments.dynamic)
            if folding.modified:
                with terminal.step("checking the folded network"):
                    checks.append(check_folded(network, model, arguments, dtype=dtype_of(model)))
        with terminal.step("exporting"):
            exported = export(
                model,
                examples,
                dtype=dtype,
                keep_float32=arguments.keep_float32,
                keep_io_types=arguments.keep_io_types,
                dynamic=arguments.dynamic,
                opset=arguments.opset,
                lowering=arguments.lowering,
                function=not arguments.no_function,
                input_names=list(network.base),
                metadata=_metadata(network.checkpoint),
            )
        onnx_file = folder / output.name
        exported.save(onnx_file, external_data=arguments.external_data or None)
        with terminal.step("checking the ONNX file"):
            checks.extend(check_onnx(terminal, network, onnx_file, arguments))

        if folding is not None:
            print_fold(terminal, folding)
        terminal.table("Nodes", ("operator", "count"), sorted(exported.node_counts().items()))
        print_checks(terminal, checks)
        for note in (*network.checkpoint.notes, *exported.notes):
            terminal.line(f"note: {note}")
        record = manifest(arguments, network.checkpoint, exported, onnx_file) | {
            "fold": None if folding is None else fold_to_dict(folding),
            "checks": [report.to_dict() for report in checks],
        }
        terminal.write_json(arguments.json, record)
        raise_if_broken(terminal, checks, network, arguments)
        (folder / f"{output.stem}.deploynorm.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    terminal.line(f"wrote {output} and {output.with_suffix('.deploynorm.json')}")
    return 0


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What `deploynorm run` needs of the checkpoint, inside the ONNX file."""
    import json

    from deploynorm.contract import METADATA_IMAGE, METADATA_LABELS

    entries: dict[str, Any] = {}
    if checkpoint.image is not None:
        entries[METADATA_IMAGE] = checkpoint.image.to_dict()
    if checkpoint.labels is not None:
        entries[METADATA_LABELS] = list(checkpoint.labels)
    return {key: json.dumps(value) for key, value in entries.items()}
