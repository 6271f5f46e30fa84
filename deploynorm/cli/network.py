"""From the options of a verb to a network and the inputs that it is traced and checked with."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploynorm import checkpoint
from deploynorm.checkpoint import Checkpoint
from deploynorm.cli.options import factory_kwargs
from deploynorm.errors import InputError
from deploynorm.inputs import TensorSpec, parse_input_shapes

__all__ = ["Network", "load_network"]


@dataclass(frozen=True)
class Network:
    """A network as loaded, and its inputs.

    Attributes:
        checkpoint: The network and what its file says of it.
        base: Shape of each input by name, in forward's order.
    """

    checkpoint: Checkpoint
    base: Mapping[str, tuple[int, ...]]

    @property
    def model(self) -> nn.Module:
        return self.checkpoint.model

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Each input in its base shape, of the parameters' type."""
        dtype = str(self._dtype).removeprefix("torch.")
        return tuple(TensorSpec(name, shape, dtype) for name, shape in self.base.items())

    def example_inputs(self, dynamic: str | None) -> tuple[Tensor, ...]:
        """Random inputs of the base shapes; a batch of 1 becomes 2 where the batch is to be free, for the tracer."""
        generator = torch.Generator().manual_seed(0)
        return tuple(
            torch.randn(
                (2, *shape[1:]) if dynamic not in ("none", "spatial") and shape[:1] == (1,) else shape,
                generator=generator,
            ).to(self._dtype)
            for shape in self.base.values()
        )

    @property
    def _dtype(self) -> torch.dtype:
        parameters = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(parameters, torch.float32)


def load_network(options: argparse.Namespace) -> Network:
    """Reads MODEL as the options say, and settles the shape of each input.

    Raises:
        ModelError: The file is refused; see `deploynorm.checkpoint.load`.
        InputError: No shape is known for an input, or one was given for an input that is not there.
    """
    loaded = checkpoint.load(
        options.model,
        factory=options.factory,
        kwargs=factory_kwargs(options),
        trust_pickle=options.trust_pickle,
    )
    return Network(loaded, _base_shapes(loaded, parse_input_shapes(options.input_shape)))


def _base_shapes(loaded: Checkpoint, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    names, required = _arguments(loaded.model)
    known: dict[str, tuple[int, ...]] = {}
    if loaded.example_inputs is not None:
        known = {name: tuple(x.shape) for name, x in zip(names, loaded.example_inputs, strict=False)}
    elif loaded.image is not None and names:
        known = {names[0]: (2, *loaded.image.shape)}
    for name, shape in given.items():
        if name and name not in names:
            raise InputError("--input-shape", f"the network has no input {name!r}", expected=", ".join(names))
        known[name or names[0]] = shape
    missing = [name for name in required if name not in known]
    if missing:
        raise InputError(
            "--input-shape",
            f"the shape of input {', '.join(missing)} is not known",
            fix=f"pass --input-shape {missing[0]}:1x3x224x224 with your sizes",
        )
    return {name: known[name] for name in names if name in known}


def _arguments(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of forward's positional arguments, and of those without a default."""
    parameters: list[Any] = list(inspect.signature(model.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not positional:  # *args: the module of a torch.export archive says no more
        return ["x"], ["x"]
    return [p.name for p in positional], [p.name for p in positional if p.default is p.empty]
