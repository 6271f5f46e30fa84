"""What the layers of a network that are not ours compute."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from deploynorm._adopt.candidates import Call, calls, may_be_computed, may_be_norm, wanted
from deploynorm._adopt.convolutions import Computed, computed
from deploynorm._adopt.layers import build
from deploynorm._adopt.numbers import UnrecognizedError, shape_for
from deploynorm._adopt.recipes import Question, Recipe, key_of, recipes_of
from deploynorm.errors import InputError
from deploynorm.quiet import quiet
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
        outputs: What the network gives on the examples, where it was run: where a layer can be of interest.

    Raises whatever the network raises on the examples.
    """

    def __init__(self, model: nn.Module, examples: Examples) -> None:
        self.found: dict[str, Found] = {}
        self.outputs: list[Any] = []
        norms, convolutions = set(wanted(model, may_be_norm)), set(wanted(model, may_be_computed))
        if not norms and not convolutions:
            return
        called, self.outputs = calls(model, examples, {*norms, *convolutions})
        layers = {path: layer for path, layer in model.named_modules() if path in called}
        self._recipes: dict[object, Recipe | UnrecognizedError] = {}
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
            if isinstance(recipe, UnrecognizedError):
                why = recipe if why is None or recipe.near else why
                continue
            try:
                if recipe.kind == "affine" or same(layer, build(layer, recipe, *question[1:3], {}), recipe, call):
                    return Found(call, recipe)
            except InputError as error:
                return Found(call, reason=f"ours do not take its numbers: {error.problem}", near=True)
            except UnrecognizedError:
                pass
            # A layer of the same class and arguments computes otherwise: by code of its own, say.
            [own] = recipes_of([question])
            with suppress(UnrecognizedError, InputError):
                if isinstance(own, Recipe) and same(layer, build(layer, own, *question[1:3], {}), own, call):
                    return Found(call, own)
            why = UnrecognizedError("its numbers were read off its trace, and on a try it computes others", near=True)
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


def same(layer: nn.Module, new: nn.Module, recipe: Recipe, call: Call, *, training: bool = False) -> bool:
    """Whether two layers compute the same in float64, for small values too, which tell the epsilon."""
    shape = list(call.shape[:1] + (3, 2, 2)[: len(call.shape) - 2])
    shape.insert(len(shape) if recipe.channels_last else 1, call.shape[-1 if recipe.channels_last else 1])
    scales = torch.tensor([1, 1e-2, 1e-4], dtype=torch.float64)
    pair = [copied(each).cpu().double().train(training) for each in (new, layer)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        x = torch.randn(3, *shape[1:], dtype=torch.float64) * scales.reshape(3, *[1] * (len(shape) - 1))
        got, want = (list(each(x.clone())) for each in pair)
        return alike(got, want, _RTOL)
