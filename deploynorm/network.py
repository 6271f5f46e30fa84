"""A network and the inputs that it is traced and checked with: what every stage of the pipeline starts from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from deploynorm import checkpoint
from deploynorm._export.precision import dtype_of
from deploynorm.checkpoint import Checkpoint
from deploynorm.errors import InputError, ModelError
from deploynorm.image import ImageSpec
from deploynorm.inputs import Shape, TensorSpec, shape_text
from deploynorm.memory import check_fits
from deploynorm.trace import ExampleInputs, Examples, Forward, check_network, disposable_copy, unwrapped


class Reading(TypedDict, total=False):
    """How a network is read from its file, and its inputs: the options of `Network.of`."""

    input_shapes: Mapping[str, Shape] | None
    input_dtypes: Mapping[str, str] | None
    factory: str | None
    factory_kwargs: Mapping[str, Any] | None
    key: str | None
    strip_prefix: str | None
    trust_pickle: bool


@dataclass(frozen=True, eq=False)
class Network:
    """A network, an example of each of its inputs, and what its file says of it, where it has one."""

    model: nn.Module
    examples: Examples
    checkpoint: Checkpoint | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module | str | Path,
        example_inputs: ExampleInputs | None = None,
        *,
        input_shapes: Mapping[str, Shape] | None = None,
        input_dtypes: Mapping[str, str] | None = None,
        factory: str | None = None,
        factory_kwargs: Mapping[str, Any] | None = None,
        key: str | None = None,
        strip_prefix: str | None = None,
        trust_pickle: bool = False,
    ) -> Network:
        """The network, read from its file where a path is given, and its inputs.

        The arguments are those of `deploynorm.convert`. Inputs that are left out are random, of the shapes and types
        given or named by the file; a type that is not known is the network's own or, where it refuses that, int64.
        """
        loaded = None
        if isinstance(model, type):
            check_network(model)
        if isinstance(model, nn.Module):
            if any(option is not None for option in (factory, factory_kwargs, key, strip_prefix)) or trust_pickle:
                problem = "factory, factory_kwargs, key, strip_prefix and trust_pickle are for a file"
                raise InputError("network", problem, fix="leave them out")
            model = unwrapped(model)
        elif not isinstance(model, str | Path):
            raise InputError("network", "neither a network nor the path of a file", got=type(model).__name__)
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
            if input_shapes or input_dtypes:
                problem = "example inputs, and shapes or types of inputs too"
                raise InputError("network", problem, fix="pass one of the two")
            return cls(model, Examples.of("network", model, example_inputs), loaded)
        shapes = _shapes(model, loaded, input_shapes or {})
        return cls(model, _random(model, shapes, _dtypes(loaded, shapes, input_dtypes or {})), loaded)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arguments of forward that are its inputs."""
        return self.examples.names

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


def _shapes(model: nn.Module, loaded: Checkpoint | None, given: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of each input: as given, else as the file has it."""
    forward = Forward(model)
    names = forward.names or forward.first(1).names
    known: dict[str, Shape] = {}
    if loaded is not None and loaded.example_inputs is not None:
        known = {name: tuple(x.shape) for name, x in loaded.example_inputs.items()}
    elif loaded is not None and loaded.image is not None:
        known = {names[0]: (2, *loaded.image.shape)}
    shapes = _mapping("input_shapes", given, "{'x': (2, 3, 224, 224)}").items()
    typed = {name or names[0]: _shape(name or names[0], shape) for name, shape in shapes}
    known = typed | {name: shape for name, shape in known.items() if name not in typed}
    try:
        forward.named(known)
    except KeyError as error:
        problem = f"the network has no input {error.args[0]!r}"
        raise InputError("--input-shape", problem, expected=", ".join(names)) from None
    if missing := [name for name in forward.required or names[:1] if name not in known]:
        _refuse_nested(loaded)
        problem = f"the shape of input {', '.join(missing)} is not known"
        options = " ".join(f"--input-shape {name}:1x3x224x224" for name in missing)
        fix = f"pass {options} with your sizes"
        raise InputError("--input-shape", problem, fix=fix)
    return known


def _refuse_nested(loaded: Checkpoint | None) -> None:
    """ModelError for an archive with inputs that are no tensors."""
    program = None if loaded is None else loaded.exported
    positional, named = (program and program.example_inputs) or ((), {})
    others = [type(value).__name__ for value in (*positional, *named.values()) if not isinstance(value, Tensor)]
    if others and loaded is not None:
        problem = "the program takes inputs that are no tensors"
        fix = "wrap the network in one whose forward takes each tensor as an argument of its own, and export that again"
        raise ModelError(str(loaded.path), problem, got=", ".join(others), fix=fix)


def _shape(name: str, given: object) -> Shape:
    """A shape as a tuple; InputError unless it is one that this machine can hold."""
    where = f"shape of input {name}"
    sizes = given if isinstance(given, list | tuple) else (None,)
    shape = tuple(size for size in sizes if type(size) is int and size >= 0)
    if len(shape) != len(sizes):
        raise InputError(where, "is none", got=repr(given), expected="sizes, such as (2, 3, 224, 224)")
    check_fits(where, 8 * math.prod(shape), shape_text(shape))  # checks are in float64
    return shape


def _mapping(option: str, given: object, example: str) -> Mapping[Any, Any]:
    if not isinstance(given, Mapping):
        raise InputError("network", f"{option} is no dict by names of inputs", got=repr(given), expected=example)
    return given


def _dtypes(loaded: Checkpoint | None, shapes: Mapping[str, Shape], given: Mapping[str, str]) -> dict[str, torch.dtype]:
    """The types of inputs that are known: as given, else as the file has them."""
    known = {name: x.dtype for name, x in ((loaded and loaded.example_inputs) or {}).items() if name in shapes}
    for name, text in _mapping("input_dtypes", given, "{'label': 'int64'}").items():
        dtype = getattr(torch, text, None) if isinstance(text, str) else text
        if not isinstance(dtype, torch.dtype) or dtype.is_complex or (name or next(iter(shapes))) not in shapes:
            got, expected = f"{name}:{text}", f"a type such as int64 or bool, of {', '.join(shapes)}"
            raise InputError("--input-dtype", "no such input or type", got=got, expected=expected)
        known[name or next(iter(shapes))] = dtype
    return known


def _random(model: nn.Module, shapes: Mapping[str, Shape], known: Mapping[str, torch.dtype]) -> Examples:
    """Random inputs: standard normal, or integers; an input of unknown type is int64 where the network refuses its own.

    Inputs that it always refuses stay floats, so that the error of the first stage which runs it is of these.
    """
    arguments = Forward(model).named(shapes)
    open_names = [name for name in arguments.names if name not in known]
    tries: Iterator[tuple[str, ...]] = iter([(), *((name,) for name in open_names), tuple(open_names)])
    first = None
    for integers in tries if open_names else [()]:
        dtypes = {name: torch.int64 if name in integers else dtype_of(model) for name in arguments.names} | dict(known)
        generator = torch.Generator().manual_seed(0)
        examples = Examples(
            tuple(_values(shapes[name], dtypes[name], generator) for name in arguments.names), arguments, tuple(shapes)
        )
        if not open_names or _runs(model, examples):
            return examples
        first = first or examples
    assert first is not None
    return first


def _values(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 8, shape, generator=generator).to(dtype)


def _runs(model: nn.Module, examples: Examples) -> bool:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            examples.run(disposable_copy(model))
    except Exception:  # whatever its type, it means that the network does not take these
        return False
    return True
