"""Example inputs of a network, each bound to an argument of its forward, or to a place in one."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from deploynorm.errors import InputError, ModelError

Nested = Tensor | Sequence["Nested"] | Mapping[str, "Nested"]
"""What one argument of forward takes: a tensor, or tensors in lists, tuples and dicts."""

ExampleInputs = Tensor | Sequence[Nested] | Mapping[str, Nested]
"""What users give: the only input, inputs in the order of forward's arguments, or inputs by the names of arguments."""


class Arguments(NamedTuple):
    """Names of arguments of a forward, in its order, and how many of the first are given by position.

    An argument that holds several tensors has a `Tree`, as torch calls it; each of these tensors is an input of a name
    of its own.
    """

    of_forward: tuple[str, ...]
    by_position: int
    trees: Mapping[str, Tree] = MappingProxyType({})

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs: of each argument, or of the tensors in it."""
        return tuple(chain.from_iterable(map(self.names_in, self.of_forward)))

    def names_in(self, argument: str) -> tuple[str, ...]:
        """Of the inputs that an argument holds."""
        return self.trees[argument].names if argument in self.trees else (argument,)

    def sources(self) -> dict[str, str]:
        """The expression by which torch.export's conditions name what an argument holds -> name of that input."""
        return {
            f"L['{argument}']{path}": name
            for argument, tree in self.trees.items()
            for path, name in zip(tree.paths, tree.names, strict=True)
        }

    def split(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the named arguments of a call with these values, one for each input."""
        left = iter(values)
        whole: list[Any] = []
        for argument in self.of_forward:
            own = list(islice(left, len(self.names_in(argument))))
            tree = self.trees.get(argument)
            whole.append(own[0] if tree is None else _pytree.tree_unflatten(own, tree.spec))
        named = zip(self.of_forward[self.by_position :], whole[self.by_position :], strict=True)
        return tuple(whole[: self.by_position]), dict(named)


class Tree(NamedTuple):
    """How an argument holds tensors."""

    spec: _pytree.TreeSpec
    paths: tuple[str, ...]  # of each tensor, as it is indexed: "[0]['mask']"
    names: tuple[str, ...]  # of each as an input: "images_0_mask"


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
        return tuple(name for name in arguments.of_forward[arguments.by_position :] if name not in self.names)

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
    given: tuple[str, ...] = ()  # the names of the inputs, where the user named arguments, in the user's order

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
        fix = "pass the tensors that forward takes, in order or by name: (x,) or x or {'x': x}, or for a list ([x],); "
        fix += "torch.from_numpy makes one of an array"
        inputs: object = given
        if isinstance(inputs, str) or not isinstance(inputs, Sequence | Mapping):
            raise InputError(where, "example_inputs is no tuple of tensors", got=type(inputs).__name__, fix=fix)
        if not inputs:
            raise InputError(where, "there are no example inputs", fix=fix)
        entries: Mapping[object, object] = inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs))
        for key, value in entries.items():
            leaves = _pytree.tree_leaves(value)
            if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
                problem, expected = f"example input {key} is not a tensor", "one, or some in lists, tuples and dicts"
                raise InputError(where, problem, got=type(value).__name__, expected=expected, fix=fix)
            for leaf in leaves:
                _check_plain(where, key, leaf)
        values = tuple(given.values()) if isinstance(given, Mapping) else tuple(given)
        if not isinstance(given, Mapping):
            arguments = forward.first(len(given))
        else:
            try:
                arguments = forward.named(given)
            except KeyError as error:
                problem = f"the network has no input {error.args[0]!r}"
                raise InputError(where, problem, expected=", ".join(forward.names)) from None
            values = tuple(given[name] for name in arguments.of_forward)
        trees = {name: _tree(name, value) for name, value in zip(arguments.of_forward, values, strict=True)}
        arguments = arguments._replace(trees={name: tree for name, tree in trees.items() if tree is not None})
        if twice := [name for name, times in Counter(arguments.names).items() if times > 1]:
            fix = "rename an argument of forward, or a key"
            raise InputError(where, f"two example inputs would be called {twice[0]!r}", fix=fix)
        tensors = tuple(_pytree.tree_leaves(values))
        order = tuple(chain.from_iterable(map(arguments.names_in, given))) if isinstance(given, Mapping) else ()
        if missing := [name for name in forward.required if name not in arguments.of_forward]:
            raise InputError(where, f"no example of input {', '.join(missing)}", got=f"{len(given)} inputs")
        return cls(tensors, arguments, order)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs, each of which is an argument, or a tensor in one."""
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


def _tree(argument: str, value: object) -> Tree | None:
    """How an argument holds its tensors; None where it is one itself."""
    if isinstance(value, Tensor):
        return None
    found, spec = _pytree.tree_flatten_with_path(value)
    paths = [path for path, _ in found]
    keys = [
        [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path] for path in paths
    ]
    return Tree(spec, tuple(map(_pytree.keystr, paths)), tuple("_".join((argument, *each)) for each in keys))


def _check_plain(where: str, key: object, tensor: Tensor) -> None:
    """Raises InputError for a tensor without values, or in another form than one after the other."""
    if tensor.is_meta:
        problem = f"example input {key} is on the meta device, which holds no values"
        got = f"a tensor of shape {tuple(tensor.shape)}"
        raise InputError(where, problem, got=got, expected="a tensor with values", fix="pass one on the CPU")
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        what = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
        problem, expected = f"example input {key} is no plain tensor", "a dense one of floats or integers"
        raise InputError(where, problem, got=what, expected=expected)
