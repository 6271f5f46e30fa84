"""FRN and MABN layers of other projects, recognised by what they compute, become ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from deploynorm._adopt.candidates import Call, calls, may_be_computed, may_be_norm, wanted, own_hooks
from deploynorm._adopt.convolutions import Computed, centred, computed
from deploynorm._adopt.layers import Memo, build
from deploynorm._adopt.numbers import UnrecognizedError, shape_for
from deploynorm._adopt.recipes import Question, Recipe, key_of, recipes_of
from deploynorm._adopt.report import AdoptReport, AdoptResult
from deploynorm.changes import Change
from deploynorm.errors import InputError, ModelError
from deploynorm.quiet import first_line, quiet
from deploynorm.trace import (
    ExampleInputs,
    Examples,
    alike,
    check_network,
    copied,
    inference_copy,
    tensors_of,
    unwrapped,
)
from deploynorm.verification import Step, Verifier

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

    Raises whatever the network raises on the examples; it does not run where no layer can be of interest.
    """

    def __init__(self, model: nn.Module, examples: Examples) -> None:
        self.found: dict[str, Found] = {}
        norms, convolutions = set(wanted(model, may_be_norm)), set(wanted(model, may_be_computed))
        if not norms and not convolutions:
            return
        called = calls(model, examples, {*norms, *convolutions})
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
        new = {key: each for key, each in keyed.items() if key not in self._recipes}
        self._recipes |= zip(new, recipes_of(list(new.values())), strict=True)

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
                if recipe.kind == "affine" or _same(layer, build(layer, recipe, *question[1:3], {}), recipe, call):
                    return Found(call, recipe)
            except InputError as error:
                return Found(call, reason=f"ours do not take its numbers: {error.problem}", near=True)
            except UnrecognizedError:
                pass
            # A layer of the same class and arguments computes otherwise: by code of its own, say.
            [own] = recipes_of([question])
            with suppress(UnrecognizedError, InputError):
                if isinstance(own, Recipe) and _same(layer, build(layer, own, *question[1:3], {}), own, call):
                    return Found(call, own)
            why = UnrecognizedError("its numbers were read off its trace, and on a try it computes others", near=True)
        return None if why is None else Found(call, reason=str(why), near=why.near)


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


def _same(layer: nn.Module, new: nn.Module, recipe: Recipe, call: Call, *, training: bool = False) -> bool:
    """Whether two layers compute the same in float64, for small values too, which tell the epsilon."""
    channels = call.shape[-1 if recipe.channels_last else 1]
    shape = shape_for(channels, len(call.shape), channels_last=recipe.channels_last)
    pair = [copied(each).cpu().double().train(training) for each in (new, layer)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        for scale in (1, 1e-2, 1e-4):
            x = torch.randn(shape, dtype=torch.float64) * scale
            got, want = ([each(x.clone())] for each in pair)
            if not alike(got, want, _RTOL):
                return False
    return True


class Adopting:
    """Puts our layers into a network, in place: those for training (CenConv among them), or for evaluation alone.

    Args:
        model: The network; its layers stand where those of the survey's network do.
        survey: Of a copy of it.
        training: Whether a layer must compute the same in training mode too, MABN excepted.
    """

    def __init__(self, model: nn.Module, survey: Survey, *, training: bool) -> None:
        self.model = model
        self.changes: dict[str, Change] = {}
        self.steps: list[Step] = []
        memo: Memo = {}
        layers = dict(model.named_modules())
        for path, found in survey.found.items():
            layer = layers[path]
            kind = type(layer).__name__
            new, reason = self._new(layer, found, memo, training)
            if new is None:
                if reason:
                    self.changes[path] = Change(path, kind, "left", "", reason)
                continue
            self._put(layer, new)
            undo, redo = partial(self._put, new, layer), partial(self._put, layer, new)
            self.steps.append(Step(undo, redo, partial(self._refuse, path, kind)))
            became = " and ".join(type(each).__name__ for each in new) if type(new) is nn.Sequential else type(new).__name__
            self.changes[path] = Change(path, kind, "adopted", became, _detail(found))

    def _new(self, layer: nn.Module, found: Found, memo: Memo, training: bool) -> tuple[nn.Module | None, str]:
        """Ours in place of the layer, or why it stays; neither for one that is none of ours."""
        if found.plain is not None:
            new = centred(layer, found.plain)
            if new is not None and own_hooks(layer):
                return None, "it has hooks"
            return new, ""
        if found.recipe is None or found.recipe.kind == "affine":
            return None, found.reason if found.near else ""
        if own_hooks(layer):
            return None, "it has hooks"
        new = build(layer, found.recipe, found.channels, len(found.call.shape), memo)
        if training and found.recipe.kind != "mabn":
            with suppress(Exception):
                if _same(layer, new, found.recipe, found.call, training=True):
                    return new, ""
            return None, "in training mode it computes something else"
        return new, ""

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        if old is self.model:
            self.model = new
        for parent in list(self.model.modules()):
            if parent is new:
                continue
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new

    def _refuse(self, path: str, kind: str, reason: str) -> None:
        self.changes[path] = Change(path, kind, "left", "", reason)


def _detail(found: Found) -> str:
    """What a user should know of an adopted layer."""
    recipe = found.recipe
    if recipe is None:
        return ""
    told = []
    if not recipe.exact:
        names = ", ".join(name for name, part in recipe.parts.items() if part is None)
        told.append(f"{names} computed from its parameters, and no longer trained")
    if recipe.kind == "mabn":
        told.append("in training its history starts anew, with the momentum and window of MABN2d")
    if recipe.channels_last:
        told.append("its channels are last: it stands between transpositions")
    return "; ".join(told)


def adopted(model: nn.Module, examples: Examples, *, training: bool = False) -> tuple[nn.Module, tuple[Change, ...]]:
    """The network with our layers, for the other stages: itself where it has none of others.

    A network that does not run on the examples, or does not run with our layers, comes back as it is.

    Args:
        model: Any network; it is left untouched.
        examples: Its inputs.
        training: Whether it is to be trained: CenConv is adopted too. Else the copy is in evaluation mode.
    """
    if next(wanted(model, may_be_norm), None) is None and not (
        training and next(wanted(model, may_be_computed), None) is not None
    ):
        return model, ()
    with suppress(Exception):
        seen = inference_copy(model)
        adopting = Adopting(copied(model) if training else seen, Survey(seen, examples), training=training)
        changes = tuple(adopting.changes.values())
        if not adopting.steps or not _runs_alike(model, adopting.model, examples):
            return model, tuple(change for change in changes if change.outcome == "left")
        return adopting.model, changes
    return model, ()


def _runs_alike(model: nn.Module, other: nn.Module, examples: Examples) -> bool:
    """Whether a network runs with other layers too, and computes nothing grossly different in its own type."""
    examples = examples.replaced(x.detach().cpu().clone() for x in examples)
    results = []
    for each in (model, other):
        with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            twin = inference_copy(each)
            results.append([x.clone() if isinstance(x, torch.Tensor) else x for x in tensors_of(examples.run(twin))])
    return alike(*results, rtol=1e-2)


def adopt(model: nn.Module, example_inputs: ExampleInputs) -> AdoptResult:
    """Replaces FRN, TLU, MABN and CenConv layers of other projects by ours, to be trained or deployed.

    Given:  x -> Conv2d -> FilterResponseNorm2d of any project (gamma, beta, tau, eps of shape (1, C, 1, 1)) -> y
    Result: x -> Conv2d -> FRN2d (weight, bias, tau, eps_l of shape (C,)) -> y

    A layer is recognised by what it computes, and not by its name: it is traced alone (torch.export), and its output
    must be the layer's formula of its input. Its tensors are then given values of their own, so that each number of the
    formula tells which tensor it is.

    1. x * (mean(x^2) + eps)^-0.5 with a scale, a shift and a threshold for each channel -> FRN1d, 2d or 3d. What
       follows in the layer (a ReLU, its own children) follows then too. eps is learned where the layer adds |eps| of a
       parameter that requires a gradient, and a constant elsewhere.
    2. A threshold for each channel -> TLU.
    3. In evaluation x * (buffer + eps)^-0.5 * weight + bias, which subtracts no mean -> MABN, the buffer being its
       running second moment, so that it folds. In training it goes on by MABN's own rule, with its history empty.
    4. A convolution with a weight that is centred over its fan-in in each call -> CenConv.
    5. Channels on the last axis: the layer stands between transpositions.

    A parameter that is one number for each channel goes on being trained; all else becomes a constant. Each layer is
    compared with the one that it replaces in float64, and then the whole network on the examples; a replacement that
    the network does not bear, because its code reads the old layer's attributes, is undone.

    Args:
        model: Any network; it is left untouched.
        example_inputs: As in `deploynorm.export`.

    Returns:
        The new network, and a report of each layer, with the reason where FRN or MABN stays as it is: in the forward
        of a layer that computes other things too, or with hooks. `deploynorm.export` fuses such FRN in the graph.

    Raises:
        InputError: An example input is not a tensor.
        ModelError: The network cannot be copied, or does not run on the examples.
    """
    check_network(model)
    model = unwrapped(model)
    examples = Examples.of("adopt", model, example_inputs)
    seen = inference_copy(model)
    try:
        survey = Survey(seen, examples)
    except Exception as error:
        problem = f"the network does not run on the example inputs: {type(error).__name__}: {first_line(error)}"
        got = "inputs of shape " + ", ".join(str(tuple(example.shape)) for example in examples)
        raise ModelError(f"adopt of {type(model).__name__}", problem, got=got, fix="pass what its forward takes") from error
    adopting = Adopting(copied(model), survey, training=True)
    Verifier(model, examples).settle(adopting.steps, lambda: adopting.model, {})
    changes = adopting.changes
    for path, kind, reason in _loose(adopting.model, examples):
        changes.setdefault(path, Change(path, kind, "left", "", reason))
    found = Counter(change.kind for change in changes.values())
    return AdoptResult(adopting.model, AdoptReport(found, tuple(changes.values())))


def _loose(model: nn.Module, examples: Examples) -> Iterator[tuple[str, str, str]]:
    """The layers that compute FRN or MABN among other things, with the reason why they stay."""
    from deploynorm._export.translation import to_onnx
    from deploynorm.foreign import loose_frn, loose_mabn
    from deploynorm.trace import trace

    try:
        program = trace(inference_copy(model), examples, "none")
        graph = to_onnx(program, 20)[0].graph
    except ModelError:
        return
    frn = "FRN in a layer that computes other things, or has other parameters: export fuses it where it can"
    mabn = "MABN in a layer that computes other things, or has other parameters: it does not fold"
    for layers, reason in ((loose_frn(graph), frn), (loose_mabn(program), mabn)):
        yield from ((layer.name, layer.kind, reason) for layer in dict.fromkeys(layers))
