"""Show what is in a model or an ONNX file.

Of a model: how it was read, its layers that matter here, its parameters. Of an ONNX file: inputs and outputs, nodes,
functions, weights by type, and what it says of its origin. Nothing is run.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from deploynorm.cli import options

if TYPE_CHECKING:
    import onnx

    from deploynorm.cli.terminal import Terminal

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    from deploynorm.cli.terminal import Terminal

    terminal = Terminal(verbose=arguments.verbose, quiet=arguments.quiet)
    tell = _tell_onnx if arguments.model.suffix == ".onnx" else _tell_model
    terminal.write_json(arguments.json, tell(terminal, arguments))
    return 0


def _tell_model(terminal: Terminal, arguments: argparse.Namespace) -> dict[str, Any]:
    from deploynorm import checkpoint

    loaded = checkpoint.load(
        arguments.model,
        factory=arguments.factory,
        kwargs=options.factory_kwargs(arguments),
        trust_pickle=arguments.trust_pickle,
    )
    facts: dict[str, Any] = {
        "file": str(loaded.path),
        "sha256": loaded.sha256,
        "kind": loaded.kind,
        "factory": loaded.factory,
        "network": type(loaded.model).__name__,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "input": None if loaded.image is None else loaded.image.to_dict(),
        "labels": None if loaded.labels is None else list(loaded.labels),
        "training": None if loaded.training is None else dict(loaded.training),
        "notes": list(loaded.notes),
    }
    _print_facts(terminal, facts)
    leaves = (module for module in loaded.model.modules() if not any(module.children()))
    facts["layers"] = dict(Counter(type(module).__name__ for module in leaves).most_common())
    terminal.table("Layers", ("class", "count"), facts["layers"].items())
    return facts


def _tell_onnx(terminal: Terminal, arguments: argparse.Namespace) -> dict[str, Any]:
    from deploynorm.cli.onnx_file import read_graph

    model = read_graph(arguments.model)
    nodes = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    facts: dict[str, Any] = {
        "file": str(arguments.model),
        "producer": model.producer_name,
        "ir version": model.ir_version,
        "opsets": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "inputs": {value.name: _type(value) for value in model.graph.input},
        "outputs": {value.name: _type(value) for value in model.graph.output},
        "functions": [f"{function.domain}::{function.name}" for function in model.functions],
        "weights": _weights(model),
        "external data": any(tensor.external_data for tensor in model.graph.initializer),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
    }
    _print_facts(terminal, facts)
    facts["nodes"] = dict(nodes.most_common())
    terminal.table("Nodes", ("operator", "count"), facts["nodes"].items())
    return facts


def _print_facts(terminal: Terminal, facts: dict[str, Any]) -> None:
    rows = []
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {each}" for key, each in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        rows.append((name, "-" if value in (None, "") else value))
    terminal.table(str(facts["file"]), ("", ""), rows[1:])


def _weights(model: onnx.ModelProto) -> dict[str, int]:
    """How many numbers the weights of each type have."""
    import math

    import onnx

    counts: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        counts[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += math.prod(tensor.dims)
    return dict(counts.most_common())


def _type(value: onnx.ValueInfoProto) -> str:
    import onnx

    tensor = value.type.tensor_type
    sizes = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} ({', '.join(sizes)})"
