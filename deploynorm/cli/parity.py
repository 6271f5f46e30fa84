"""The checks that a verb makes: a candidate against the network as loaded, in float64."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deploynorm._check import Report, check
from deploynorm._export.precision import DTYPES, dtype_of, first_overflow, to_precision
from deploynorm.cli.network import Network
from deploynorm.cli.onnx_file import read_graph
from deploynorm.cli.tables import print_checks
from deploynorm.cli.terminal import Terminal
from deploynorm.contract import DOMAIN
from deploynorm.errors import BackendError, ModelError
from deploynorm.inputs import TensorSpec, sample_inputs
from deploynorm.libraries import find_library
from deploynorm.onnx_file import OnnxFile
from deploynorm.ort import import_onnxruntime
from deploynorm.run import open_runner
from deploynorm.run.base import Runner
from deploynorm.run.eager import EagerRunner

__all__ = ["check_folded", "check_onnx", "raise_if_broken"]

Sample: TypeAlias = tuple[str, Mapping[str, npt.NDArray[Any]]]


def check_folded(
    network: Network, folded: nn.Module, arguments: argparse.Namespace, *, dtype: torch.dtype | None = None
) -> Report:
    """The folded network in PyTorch against the network as loaded, on inputs of the base shape.

    Args:
        network: As loaded.
        folded: To be checked.
        arguments: Of the verb.
        dtype: The type that it is folded in, where that is not the network's own.
    """
    candidate = EagerRunner(folded, network.inputs, dtype=None if dtype == dtype_of(network.model) else dtype)
    candidate.name = f"folded, {candidate.name}"
    return _check(candidate, network, network.inputs, arguments)


def check_onnx(terminal: Terminal, network: Network, path: Path, arguments: argparse.Namespace) -> list[Report]:
    """An ONNX file against the network as loaded, on several shapes inside the file's dynamic range.

    A file in half precision is judged by "half", which rounds every tensor. ONNX Runtime then shows that it loads: its
    CPU computes half graphs in float32, where nothing overflows.

    ONNX Runtime runs a file stock, and where it holds our operator, with our library too, if that is built: the one
    file is to give the same numbers in both. A file without function bodies runs with the library alone.
    """
    backend = arguments.backend
    if backend is None and not _has_onnxruntime():
        backend = "reference"
    if backend in ("half", "reference"):
        return [_check_file(path, backend, network, arguments)]
    precision = OnnxFile.read(path).half_type
    reports = [_check_file(path, "half", network, arguments)] if precision and backend is None else []
    model = read_graph(path)
    ours = any(node.domain == DOMAIN for node in model.graph.node)
    ways: list[tuple[str, Sequence[Path] | None]] = []
    if not ours or model.functions or find_library() is None:
        ways.append(("", []))
    if ours and find_library() is not None:
        ways.append((", deploynorm library", None))
    for suffix, plugins in ways:
        suffix += f", {precision} as float32" if precision else ""
        try:
            reports.append(_check_file(path, "onnxruntime", network, arguments, plugins, suffix))
        except BackendError as error:
            if precision is None or backend is not None:
                raise
            terminal.line(f"note: onnxruntime cannot load it on the CPU: it {error.problem} ({error.got})")
            break
    return reports


def _has_onnxruntime() -> bool:
    try:
        import_onnxruntime()
    except BackendError:
        return False
    return True


def raise_if_broken(
    terminal: Terminal, reports: Sequence[Report], network: Network, arguments: argparse.Namespace
) -> None:
    """Raises ParityError for a broken report, after showing how far the network's own rounding goes.

    Some networks amplify rounding: FRN over maps of one or two pixels does, with random weights above all. The
    network in its own type, or in the half type of the candidate, is then as far from float64 as the candidate is, and
    no export could be nearer.
    """
    broken = [report for report in reports if not report]
    if not broken:
        return
    model, inputs, precision = network.model, network.inputs, broken[0].precision
    if precision is not None:
        model = to_precision(model, DTYPES[precision], keep_float32=getattr(arguments, "keep_float32", ()))
        inputs = tuple(TensorSpec(spec.name, spec.shape, precision) for spec in inputs)
    with EagerRunner(model, inputs) as itself:
        itself.name = f"the network itself, {inputs[0].dtype}"
        own = _check(itself, network, inputs, arguments)
    print_checks(terminal, [own], title="For comparison, with nothing exported")
    layer = None
    if not own and precision is not None:
        examples = [example.to(DTYPES[precision]) for example in network.example_inputs("none")]
        layer = first_overflow(model, examples)
    if layer is not None:
        terminal.line(
            f"In {precision} the output of layer {layer or '(the network)'} is not finite. Take bfloat16, or keep the "
            "network in float32 from there to where its values are small again (--keep-float32)."
        )
    elif not own:
        terminal.line("The network itself is as far off: it amplifies rounding. Try larger inputs or trained weights.")
    broken[0].raise_if_broken()


def _check_file(
    path: Path,
    backend: Literal["onnxruntime", "half", "reference"],
    network: Network,
    arguments: argparse.Namespace,
    plugins: Sequence[Path] | None = None,
    suffix: str = "",
) -> Report:
    with open_runner(path, backend, plugins=plugins) as candidate:
        candidate.name += suffix
        return _check(candidate, network, candidate.inputs, arguments)


def _check(
    candidate: Runner, network: Network, inputs: tuple[TensorSpec, ...], arguments: argparse.Namespace
) -> Report:
    # An ONNX file may have been given other names: inputs are paired in order.
    base = {spec.name: shape for spec, shape in zip(inputs, network.base.values(), strict=True)}
    samples = _rounded(sample_inputs(inputs, seed=arguments.seed, base=base), candidate.precision)
    with EagerRunner(network.model, inputs, candidate.output_names or None, dtype=torch.float64) as truth:
        taken = _taken(network, inputs, samples)
        return check(candidate, truth, taken, rtol=arguments.rtol, atol=arguments.atol)


def _rounded(samples: Iterable[Sample], precision: str | None) -> Iterator[Sample]:
    """The samples with what a half network would round away at its inputs already gone."""
    for label, feeds in samples:
        if precision is None:
            yield label, feeds
        else:
            low = np.dtype(getattr(ml_dtypes, precision, precision))
            yield label, {k: x.astype(low).astype(x.dtype) if x.dtype.kind == "f" else x for k, x in feeds.items()}


def _taken(network: Network, inputs: tuple[TensorSpec, ...], samples: Iterable[Sample]) -> Iterator[Sample]:
    """The samples that the network itself takes: a U-net refuses odd sizes. The first, of the base shape, must do."""
    same = all(spec.dtype == own.dtype for spec, own in zip(inputs, network.inputs, strict=True))
    with EagerRunner(network.model, inputs, dtype=None if same else dtype_of(network.model)) as itself:
        for index, (label, feeds) in enumerate(samples):
            try:
                itself.infer(feeds)
            except ModelError:
                if index == 0:
                    raise
                continue
            yield label, feeds
