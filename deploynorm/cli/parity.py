"""The checks that a verb makes: a candidate against the network as loaded, in float64."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch import nn

from deploynorm.check import Report, check
from deploynorm.cli.network import Network
from deploynorm.cli.onnx_file import read_graph
from deploynorm.cli.tables import print_checks
from deploynorm.cli.terminal import Terminal
from deploynorm.contract import DOMAIN
from deploynorm.errors import ModelError
from deploynorm.inputs import TensorSpec, sample_inputs
from deploynorm.plugins import find_library
from deploynorm.run import available, open_runner
from deploynorm.run.base import Runner
from deploynorm.run.eager import EagerRunner

__all__ = ["check_folded", "check_onnx", "raise_if_broken"]

Sample: TypeAlias = tuple[str, Mapping[str, npt.NDArray[Any]]]


def check_folded(network: Network, folded: nn.Module, arguments: argparse.Namespace) -> Report:
    """The folded network in PyTorch against the network as loaded, on inputs of the base shape."""
    candidate = EagerRunner(folded, network.inputs)
    candidate.name = f"folded, {candidate.name}"
    return _check(candidate, network, network.inputs, arguments)


def check_onnx(network: Network, path: Path, arguments: argparse.Namespace) -> list[Report]:
    """An ONNX file against the network as loaded, on several shapes inside the file's dynamic range.

    ONNX Runtime runs it stock, and where it holds our operator, with our library too, if that is built: the one file
    is to give the same numbers in both. A file without function bodies runs with the library alone.
    """
    if arguments.backend == "reference" or (arguments.backend is None and available()["onnxruntime"] is not None):
        with open_runner(path, "reference") as candidate:
            return [_check(candidate, network, candidate.inputs, arguments)]
    model = read_graph(path)
    ours = any(node.domain == DOMAIN for node in model.graph.node)
    ways: list[tuple[str, Sequence[Path] | None]] = []
    if not ours or model.functions or find_library() is None:
        ways.append(("", []))
    if ours and find_library() is not None:
        ways.append((", deploynorm library", None))
    reports = []
    for suffix, plugins in ways:
        with open_runner(path, plugins=plugins) as candidate:
            candidate.name += suffix
            reports.append(_check(candidate, network, candidate.inputs, arguments))
    return reports


def raise_if_broken(
    terminal: Terminal, reports: Sequence[Report], network: Network, arguments: argparse.Namespace
) -> None:
    """Raises ParityError for a broken report, after showing how far the network's own rounding goes.

    Some networks amplify rounding: FRN over maps of one or two pixels does, with random weights above all. The
    network in its own type is then as far from float64 as the candidate is, and no export could be nearer.
    """
    broken = [report for report in reports if not report]
    if not broken:
        return
    with EagerRunner(network.model, network.inputs) as itself:
        itself.name = f"the network itself, {network.inputs[0].dtype}"
        own = _check(itself, network, network.inputs, arguments)
    print_checks(terminal, [own], title="For comparison, with nothing exported")
    if not own:
        terminal.line("The network itself is as far off: it amplifies rounding. Try larger inputs or trained weights.")
    broken[0].raise_if_broken()


def _check(
    candidate: Runner, network: Network, inputs: tuple[TensorSpec, ...], arguments: argparse.Namespace
) -> Report:
    # An ONNX file may have been given other names: inputs are paired in order.
    base = {spec.name: shape for spec, shape in zip(inputs, network.base.values(), strict=True)}
    samples = sample_inputs(inputs, seed=arguments.seed, base=base)
    with EagerRunner(network.model, inputs, candidate.output_names or None, dtype=torch.float64) as truth:
        taken = _taken(network, inputs, samples)
        return check(candidate, truth, taken, rtol=arguments.rtol, atol=arguments.atol)


def _taken(network: Network, inputs: tuple[TensorSpec, ...], samples: Iterable[Sample]) -> Iterator[Sample]:
    """The samples that the network itself takes: a U-net refuses odd sizes. The first, of the base shape, must do."""
    with EagerRunner(network.model, inputs) as itself:
        for index, (label, feeds) in enumerate(samples):
            try:
                itself.infer(feeds)
            except ModelError:
                if index == 0:
                    raise
                continue
            yield label, feeds
