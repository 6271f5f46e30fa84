"""A network and the inputs that it is traced and checked with: what every stage of the pipeline starts from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from deploynorm import checkpoint
from deploynorm._export.precision import dtype_of
from deploynorm.checkpoint import Checkpoint
from deploynorm.errors import InputError
from deploynorm.image import ImageSpec
from deploynorm.inputs import Shape, TensorSpec
from deploynorm.trace import argument_names, as_inputs


class Reading(TypedDict, total=False):
    """How a network is read from its file, and the shapes of its inputs: the options of `Network.of`."""

    input_shapes: Mapping[str, Shape] | None
    factory: str | None
    factory_kwargs: Mapping[str, Any] | None
    key: str | None
    strip_prefix: str | None
    trust_pickle: bool


@dataclass(frozen=True, eq=False)
class Network:
    """A network, an example of each positional input, by name, and what its file says of it, where it has one."""

    model: nn.Module
    examples: tuple[Tensor, ...]
    names: tuple[str, ...]
    checkpoint: Checkpoint | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module | str | Path,
        example_inputs: Tensor | Sequence[Tensor] | None = None,
        *,
        input_shapes: Mapping[str, Shape] | None = None,
        factory: str | None = None,
        factory_kwargs: Mapping[str, Any] | None = None,
        key: str | None = None,
        strip_prefix: str | None = None,
        trust_pickle: bool = False,
    ) -> Network:
        """The network, read from its file where a path is given, and its inputs.

        The arguments are those of `deploynorm.convert`. Inputs that are left out are random, of the shapes given or
        named by the file.
        """
        loaded = None
        if isinstance(model, type):
            fix = f"pass {model.__name__}(...)"
            raise InputError("network", "a class, and not a network", got=model.__name__, fix=fix)
        if isinstance(model, nn.Module):
            if any(option is not None for option in (factory, factory_kwargs, key, strip_prefix)) or trust_pickle:
                problem = "factory, factory_kwargs, key, strip_prefix and trust_pickle are for a file"
                raise InputError("network", problem, fix="leave them out")
        else:
            loaded = checkpoint.load(
                model,
                factory=factory,
                kwargs=factory_kwargs,
                key=key,
                strip_prefix=strip_prefix,
                trust_pickle=trust_pickle,
            )
            model = loaded.model
        if example_inputs is not None:
            if input_shapes:
                raise InputError("network", "example inputs and input shapes together", fix="pass one of the two")
            examples = as_inputs("network", example_inputs)
            if missing := _required(model)[len(examples) :]:
                raise InputError("network", f"no example of input {', '.join(missing)}", got=f"{len(examples)} inputs")
            return cls(model, examples, tuple(argument_names(model, len(examples))), loaded)
        shapes = _shapes(model, loaded, input_shapes or {})
        generator = torch.Generator().manual_seed(0)
        dtype = dtype_of(model)
        examples = tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes.values())
        return cls(model, examples, tuple(shapes), loaded)

    @property
    def base(self) -> dict[str, Shape]:
        """Shape of each example by its name."""
        return {name: tuple(example.shape) for name, example in zip(self.names, self.examples, strict=True)}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Each input in the shape and type of its example."""
        return tuple(
            TensorSpec(name, tuple(example.shape), str(example.dtype).removeprefix("torch."))
            for name, example in zip(self.names, self.examples, strict=True)
        )

    @property
    def image(self) -> ImageSpec | None:
        return None if self.checkpoint is None else self.checkpoint.image

    @property
    def labels(self) -> tuple[str, ...] | None:
        return None if self.checkpoint is None else self.checkpoint.labels

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the file was read."""
        return () if self.checkpoint is None else self.checkpoint.notes


def _required(model: nn.Module) -> list[str]:
    """The positional arguments of forward that have no default."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [p.name for p in positional if p.default is p.empty]


def _shapes(model: nn.Module, loaded: Checkpoint | None, given: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of each input in forward's order: as given, else as the file has it."""
    names = argument_names(model)
    known: dict[str, Shape] = {}
    if loaded is not None and loaded.example_inputs is not None:
        known = {name: tuple(x.shape) for name, x in zip(names, loaded.example_inputs, strict=False)}
    elif loaded is not None and loaded.image is not None:
        known = {names[0]: (2, *loaded.image.shape)}
    for name, shape in given.items():
        if name and name not in names:
            raise InputError("--input-shape", f"the network has no input {name!r}", expected=", ".join(names))
        known[name or names[0]] = shape
    if missing := [name for name in _required(model) or ["x"] if name not in known]:
        problem = f"the shape of input {', '.join(missing)} is not known"
        fix = f"pass --input-shape {missing[0]}:1x3x224x224 with your sizes"
        raise InputError("--input-shape", problem, fix=fix)
    return {name: known[name] for name in names if name in known}
