"""The checks that a verb makes: a candidate against the network as loaded, in float64."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from deploynorm.check import Report, check
from deploynorm.cli.network import Network
from deploynorm.inputs import TensorSpec, sample_inputs
from deploynorm.run import available, open_runner
from deploynorm.run.base import Runner
from deploynorm.run.eager import EagerRunner

__all__ = ["check_folded", "check_onnx"]


def check_folded(network: Network, folded: nn.Module, arguments: argparse.Namespace) -> Report:
    """The folded network in PyTorch against the network as loaded, on inputs of the base shape."""
    candidate = EagerRunner(folded, network.inputs)
    candidate.name = f"folded, {candidate.name}"
    return _check(candidate, network, network.inputs, arguments)


def check_onnx(network: Network, path: Path, arguments: argparse.Namespace) -> Report:
    """An ONNX file against the network as loaded, on several shapes inside the file's dynamic range."""
    backend: Literal["onnxruntime", "reference"] = arguments.backend
    if backend is None:
        backend = "onnxruntime" if available()["onnxruntime"] is None else "reference"
    with open_runner(path, backend) as candidate:
        return _check(candidate, network, candidate.inputs, arguments)


def _check(
    candidate: Runner, network: Network, inputs: tuple[TensorSpec, ...], arguments: argparse.Namespace
) -> Report:
    # An ONNX file may have been given other names: inputs are paired in order.
    base = {spec.name: shape for spec, shape in zip(inputs, network.base.values(), strict=True)}
    with EagerRunner(network.model, inputs, candidate.output_names or None, dtype=torch.float64) as truth:
        samples = sample_inputs(inputs, seed=arguments.seed, base=base)
        return check(candidate, truth, samples, rtol=arguments.rtol, atol=arguments.atol)
