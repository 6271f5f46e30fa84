"""What the layers of a network that are not ours compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deploynorm._adopt.candidates import Call, calls, may_be_computed, may_be_norm, wanted
from deploynorm._adopt.convolutions import Computed, computed
from deploynorm._adopt.layers import build
from deploynorm._adopt.numbers import AT_OTHER_SIZES, STATEFUL, UnrecognizedError, shape_for
from deploynorm._adopt.recipes import Question, Recipe, key_of, recipes_of
from deploynorm._adopt.state import is_unchanged, state
from deploynorm.errors import InputError
from deploynorm.quiet import first_line, quiet
from deploynorm.trace import Examples, alike, copied

_RTOL = 1e-5
"""Of the largest value of a layer that is tried in float64: it may compute in float32 inside."""


class Found(NamedTuple):
    """A layer of another project: what it is, or why it is not adopted.

    Attributes:
        recipe: What it computes for each channel; None where it is none of that.
        plain: The plain convolution that it is, where it computes its weight; else None.
        reason: Why it stays as it is; empty for a recipe that is exact.
        near: Whether it holds FRN all the same.
    """

    call: Call
    recipe: Recipe | None = None
    plain: Computed | None = None
    reason: str = ""
    near: bool = False

    @property
    def channels(self) -> int:
        last = self.recipe is not None and self.recipe.channels_last
        return self.call.shape[-1 if last else 1]


class Survey:
    """What the layers of others in a network compute, each class and its arguments looked at once.

    Args:
        model: An `inference_copy`, or another network in evaluation mode on the CPU.
        examples: Its inputs.

    Attributes:
        found: Layers that are to be told of, by path.

    Raises whatever the network raises on the examples.
    """

    def __init__(self, model: nn.Module, examples: Examples) -> None:
        self.found: dict[str, Found] = {}
        norms, convolutions = set(wanted(model, may_be_norm)), set(wanted(model, may_be_computed))
        if not norms and not convolutions:
            return
        called = calls(model, examples, {*norms, *convolutions})
        layers = {path: layer for path, layer in model.named_modules() if path in called}
        self._recipes: dict[object, Recipe | UnrecognizedError] = {}
        self._compared: set[int] = set()  # ids of recipes
        self._ask([each for path in layers if path in norms for each in _questions(layers[path], called[path])])
        for path, layer in layers.items():
            call = called[path]
            if any(path.startswith(f"{above}.") or not above for above, x in self.found.items() if not x.reason):
                continue
            found = self._of_norm(layer, call) if path in norms else None
            if (found is None or (found.reason and not found.near)) and path in convolutions and len(call.shape) > 1:
                plain = computed(layer, call.shape)
                found = None if plain is None else Found(call, plain=plain)
            if found is not None:
                self.found[path] = found

    def _ask(self, questions: Sequence[Question]) -> None:
        keyed = {self._key(each): each for each in questions}
        apart = {key: each for key, each in keyed.items() if _keeps_apart(each)}
        why = UnrecognizedError("it computes no channel by itself")
        self._recipes |= dict.fromkeys(keyed.keys() - apart.keys(), why)
        self._recipes |= zip(apart, recipes_of(list(apart.values())), strict=True)

    @staticmethod
    def _key(question: Question) -> object:
        return (*key_of(question.layer, question.channels, question.rank), question.channels_last)

    def _of_norm(self, layer: nn.Module, call: Call) -> Found | None:
        if call.problem:
            return Found(call, reason=call.problem)
        why: UnrecognizedError | None = None
        for question in _questions(layer, call):
            key = self._key(question)
            recipe = self._recipes[key]
            large = id(recipe) not in self._compared
            if isinstance(recipe, UnrecognizedError):
                why = recipe if why is None or recipe.near else why
                continue
            if recipe.kind == "affine":  # compared where it is built
                return Found(call, recipe)
            reason = _OTHERS
            try:
                reason = difference(layer, build(layer, recipe, *question[1:3], {}), recipe, call, large=large)
                self._compared.add(id(recipe))
                if not reason:
                    return Found(call, recipe)
            except InputError as error:
                return Found(call, reason=f"ours do not take its numbers: {error.problem}", near=True)
            except UnrecognizedError:
                pass
            # A layer of the same class and arguments computes otherwise: by code of its own, say.
            [own] = recipes_of([question])
            with suppress(UnrecognizedError, InputError):
                if isinstance(own, Recipe) and own.kind != "affine" and own != recipe:
                    reason = difference(layer, build(layer, own, *question[1:3], {}), own, call, large=True)
                    if not reason:
                        return Found(call, own)
            why = UnrecognizedError(reason, near=True)
        return None if why is None else Found(call, reason=f"no FRN as ours is: {why}", near=why.near)


def _keeps_apart(question: Question) -> bool:
    """Whether the layer takes such an input, and another value in one channel changes the output in no other.

    A layer normalization mixes channels; that is seen sooner than by a trace.
    """
    x = torch.randn(shape_for(*question[1:3], channels_last=question.channels_last), dtype=torch.float64)
    axis, rest = -1 if question.channels_last else 1, question.channels - 1
    with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet(), suppress(Exception):
        layer = copied(question.layer).double().eval()
        torch.manual_seed(0)
        before = layer(x.clone())
        x.narrow(axis, 0, 1).mul_(3)
        torch.manual_seed(0)
        after = layer(x)
        return torch.allclose(before.narrow(axis, 1, rest), after.narrow(axis, 1, rest), rtol=1e-9, equal_nan=True)
    return False


def _questions(layer: nn.Module, call: Call) -> list[Question]:
    """The axes that may be a layer's channels: as many as its parameters have numbers."""
    rank = len(call.shape)
    if call.problem or not call.keeps or not 3 <= rank <= 5:
        return []
    sizes = {x.numel() for x in layer.parameters()} - {1} or {x.numel() for x in layer.buffers()}
    return [
        Question(layer, call.shape[axis], rank, axis < 0)
        for axis in (1, -1)
        if call.shape[axis] in sizes or (sizes == {1} and axis > 0)
    ]


def difference(
    layer: nn.Module,
    new: nn.Module,
    recipe: Recipe,
    call: Call,
    *,
    large: bool,
    training: bool = False,
    ours_trains: bool = True,
) -> str:
    """In what two layers differ, in float64; empty where in nothing.

    Besides maps of several sizes it tries small values, which tell the epsilon, and what tells a bound: large values,
    and a spike, whose normalized value is the root of the map's size.

    Args:
        layer, new: The layers, called in copies of theirs.
        recipe, call: Of the layer.
        large: Whether on maps of 257 pixels along an axis too: once for layers of one code is enough.
        training: Whether in training mode, with the gradient of the input.
        ours_trains: Whether that holds for the new one too.
    """
    theirs = copied(layer).cpu().double().train(training)
    ours = copied(new).cpu().double().train(training and ours_trains)
    before = state(theirs)
    channels = call.shape[-1 if recipe.channels_last else 1]
    with torch.random.fork_rng(devices=[]), quiet():
        for place, x in enumerate(_maps(channels, len(call.shape), large)):
            x = x.movedim(1, -1) if recipe.channels_last else x
            with_gradients = training and ours_trains and place == 0
            torch.manual_seed(0)
            try:
                want = _tried(theirs, x, with_gradients)
            except Exception as error:
                if place == 0:
                    return f"it fails on a small input ({type(error).__name__}: {first_line(error)})"
                continue  # a size that the layer refuses
            got = _tried(ours, x, with_gradients)
            if not alike(got, want, _RTOL):
                return _OTHERS if place == 0 else f"{AT_OTHER_SIZES}, or of other values"
    return "" if is_unchanged(before, state(theirs)) else STATEFUL


_OTHERS = "its numbers were read off its trace, and on a try it computes others"


def _maps(channels: int, rank: int, large: bool) -> Iterator[Tensor]:
    """Inputs (N, C, ...): of ordinary size, of one value, of one row and one column, odd, and long along each axis."""
    axes = rank - 2
    generator = torch.Generator().manual_seed(0)

    def drawn(batch: int, *space: int) -> Tensor:
        return torch.randn(batch, channels, *space, dtype=torch.float64, generator=generator)

    scales = torch.tensor([1, 1e-2, 1e-4, 1e3], dtype=torch.float64)
    yield drawn(4, *(3, 2, 2)[:axes]) * scales.reshape(4, *[1] * (rank - 1))
    yield drawn(1, *[1] * axes)
    yield drawn(3, *[1] * axes)
    yield drawn(2, *(5, 3, 3)[:axes])
    spiked = drawn(2, *((256,), (16, 16), (7, 6, 6))[axes - 1])
    spiked.flatten(2)[..., 0] = torch.tensor([[1e3], [-1e3]], dtype=torch.float64)
    yield spiked
    for axis in range(axes):
        for size, rest in ((7, 1), (257, (9, 9, 3)[axes - 1]))[: 1 + large]:
            x = drawn(1, *(size if each == axis else rest for each in range(axes)))
            x.flatten(2)[..., -1] = 1e3 if axis else -1e3
            yield x


def _tried(layer: nn.Module, x: Tensor, with_gradients: bool) -> list[Any]:
    """What it makes of each map, and the gradient of it."""
    x = x.clone()
    if not with_gradients:
        with torch.no_grad():
            return list(layer(x))
    layer.zero_grad()
    x.requires_grad_()
    y = layer(x + 0)  # a layer may work in place
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).cos().view_as(y))
    assert x.grad is not None
    return [*y.detach(), *x.grad]
