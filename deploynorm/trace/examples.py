"""Example inputs of a network, each bound to an argument of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deploynorm.errors import InputError, ModelError

ExampleInputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What users give: the only input, inputs in the order of forward's arguments, or inputs by the names of arguments."""


class Arguments(NamedTuple):
    """Names of arguments of a forward, in its order, and how many of the first are given by position."""

    names: tuple[str, ...]
    by_position: int

    def split(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the named arguments of a call with these values."""
        named = zip(self.names[self.by_position :], values[self.by_position :], strict=True)
        return tuple(values[: self.by_position]), dict(named)


def check_network(given: object, where: str = "network") -> None:
    """Raises InputError for what is no network."""
    if isinstance(given, type):
        raise InputError(where, "a class, and not a network", got=given.__name__, fix=f"pass {given.__name__}(...)")
    if not isinstance(given, nn.Module):
        raise InputError(where, "not a network", got=type(given).__name__, expected="an nn.Module")


class Forward:
    """The arguments that a network's forward takes.

    Attributes:
        names: Of all of them, in order; without *args and **kwargs.
        required: Of those that have no default.

    Raises:
        InputError: It is no network.
        ModelError: The network has no forward that can be called, or one without a signature.
    """

    def __init__(self, model: nn.Module) -> None:
        check_network(model)
        self._signature = _signature(model)
        parameters = self._signature.parameters.values()
        kinds = {parameter.name: parameter.kind for parameter in parameters}
        # The module of a torch.export archive wants each argument as the trace had it, whatever its signature says.
        traced = getattr(model, "_in_spec", None)
        self._named = [name for name, kind in kinds.items() if kind == inspect.Parameter.KEYWORD_ONLY]
        self._named += [] if traced is None else traced.child(1).context
        self._star = inspect.Parameter.VAR_POSITIONAL in kinds.values()
        self._any_name = inspect.Parameter.VAR_KEYWORD in kinds.values()
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        ordinary = [p for p in parameters if p.kind not in variable]
        self._positional = [p.name for p in ordinary if p.name not in self._named]
        self.names = (*self._positional, *self._named)
        self.required = tuple(p.name for p in ordinary if p.default is p.empty)

    def first(self, number: int) -> Arguments:
        """The first arguments, to which a sequence of inputs is bound; those of *args are x, x_1 and so on."""
        names = self._positional if self._star else self.names
        names = tuple([*names, *islice(self._spare(), max(number - len(names), 0))][:number])
        return Arguments(names, sum(name not in self._named for name in names))

    def named(self, names: Collection[str]) -> Arguments:
        """Arguments of these names.

        Raises:
            KeyError: forward has no such argument.
        """
        positional = [*self._positional, *islice(self._spare(), len(names) if self._star else 0)]
        known = [*positional, *self._named]
        unknown = [name for name in names if name not in known]
        if unknown and not self._any_name:
            raise KeyError(unknown[0])
        given = [*(name for name in known if name in names), *unknown]
        agree = [name == own for name, own in zip(given, positional, strict=False)]
        return Arguments(tuple(given), (*agree, False).index(False))

    def bind(self, arguments: Arguments, values: Sequence[Any]) -> dict[str, Any]:
        """Values as forward's body sees them: those of *args in a tuple, those of **kwargs in a dict."""
        positional, named = arguments.split(values)
        return self._signature.bind(*positional, **named).arguments

    def loose(self, arguments: Arguments) -> tuple[str, ...]:
        """The arguments that go into **kwargs."""
        return tuple(name for name in arguments.names[arguments.by_position :] if name not in self.names)

    def _spare(self) -> Iterator[str]:
        return (name for name in chain(["x"], map("x_{}".format, count(1))) if name not in self.names)


def _signature(model: nn.Module) -> inspect.Signature:
    where, forward = type(model).__name__, getattr(model, "forward", None)
    if not callable(forward) or getattr(forward, "__func__", None) is nn.Module.forward:
        problem = "the network has no forward that can be called"
        raise ModelError(where, problem, fix="give it a method forward(self, x)")
    try:
        return inspect.signature(forward)
    except (TypeError, ValueError) as error:  # of torch.jit.trace, or written in C
        fix = "pass the network in Python, which is neither traced nor scripted"
        raise ModelError(where, f"its forward says not which arguments it takes: {error}", fix=fix) from error


@dataclass(frozen=True, eq=False)
class Examples:
    """An example of each input of a network, and the argument of forward that it is bound to.

    Iterating gives the tensors.
    """

    tensors: tuple[Tensor, ...]
    arguments: Arguments
    given: tuple[str, ...] = ()  # the names of the arguments, where the user named them, in the user's order

    @classmethod
    def of(cls, where: str, model: nn.Module, given: ExampleInputs | Examples) -> Examples:
        """What a user gives as examples.

        Raises:
            InputError: There is none, one of them is not a tensor, or forward has no such argument or requires others.
        """
        if isinstance(given, Examples):
            return given
        forward = Forward(model)
        if isinstance(given, Tensor):
            given = (given,)
        fix = "pass the tensors that forward takes, in order or by name: (x,) or x or {'x': x}; torch.from_numpy makes "
        fix += "one of an array"
        inputs: object = given
        if isinstance(inputs, str) or not isinstance(inputs, Sequence | Mapping):
            raise InputError(where, "example_inputs is no tuple of tensors", got=type(inputs).__name__, fix=fix)
        if not inputs:
            raise InputError(where, "there are no example inputs", fix=fix)
        entries: Mapping[object, object] = inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs))
        for key, tensor in entries.items():
            if not isinstance(tensor, Tensor):
                problem = f"example input {key} is not a tensor"
                if isinstance(tensor, list | tuple | dict):
                    fix = "let forward take each tensor as an argument of its own, or wrap the network in one that does"
                raise InputError(where, problem, got=type(tensor).__name__, fix=fix)
            if tensor.is_meta:
                problem = f"example input {key} is on the meta device, which holds no values"
                got = f"a tensor of shape {tuple(tensor.shape)}"
                raise InputError(where, problem, got=got, expected="a tensor with values", fix="pass one on the CPU")
            if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
                what = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
                problem, expected = f"example input {key} is no plain tensor", "a dense one of floats or integers"
                raise InputError(where, problem, got=what, expected=expected)
        if not isinstance(given, Mapping):
            arguments = forward.first(len(given))
            tensors = tuple(given)
        else:
            try:
                arguments = forward.named(given)
            except KeyError as error:
                problem = f"the network has no input {error.args[0]!r}"
                raise InputError(where, problem, expected=", ".join(forward.names)) from None
            tensors = tuple(given[name] for name in arguments.names)
        order = tuple(given) if isinstance(given, Mapping) else ()
        if missing := [name for name in forward.required if name not in arguments.names]:
            raise InputError(where, f"no example of input {', '.join(missing)}", got=f"{len(tensors)} inputs")
        return cls(tensors, arguments, order)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arguments."""
        return self.arguments.names

    def by_argument(self, names: Sequence[str]) -> tuple[str, ...]:
        """Names for the inputs, which come in the order in which the user gave these, in the order of the arguments."""
        of = dict(zip(self.given or self.names, names, strict=True))
        return tuple(of[name] for name in self.names)

    def replaced(self, tensors: Iterable[Tensor]) -> Examples:
        """Other tensors for the same arguments."""
        return replace(self, tensors=tuple(tensors))

    def grown_shapes(self, growth: Mapping[tuple[int, int], int]) -> tuple[tuple[int, ...], ...]:
        """Their shapes, with axes longer by these amounts, each named by the position of its input and its number."""
        return tuple(
            tuple(size + growth.get((position, axis), 0) for axis, size in enumerate(example.shape))
            for position, example in enumerate(self)
        )

    def run(self, model: nn.Module) -> Any:
        """What the network returns for them, or for copies, since it may work in place."""
        positional, named = self.arguments.split([tensor.clone() for tensor in self.tensors])
        return model(*positional, **named)
