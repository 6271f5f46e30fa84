"""FRN and MABN layers of other projects, recognised by what they compute, become ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from torch import nn

from deploynorm._adopt.candidates import may_be_computed, may_be_norm, own_hooks, wanted
from deploynorm._adopt.convolutions import centred
from deploynorm._adopt.layers import Memo, build
from deploynorm._adopt.report import AdoptReport, AdoptResult
from deploynorm._adopt.survey import Found, Survey, difference
from deploynorm.changes import Change
from deploynorm.errors import ModelError
from deploynorm.quiet import first_line
from deploynorm.trace import (
    ExampleInputs,
    Examples,
    check_network,
    copied,
    inference_copy,
    unwrapped,
)
from deploynorm.verification import Step, Verifier


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
        self._compared: set[int] = set()  # ids of recipes
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
            self.changes[path] = Change(path, kind, "adopted", name_of(new), _detail(found))

    def _new(self, layer: nn.Module, found: Found, memo: Memo, training: bool) -> tuple[nn.Module | None, str]:
        """Ours in place of the layer, or why it stays; neither for one that is none of ours."""
        if found.plain is not None:
            new = centred(layer, found.plain) if training else None
            if new is not None and own_hooks(layer):
                return None, "it has hooks"
            return new, ""
        if found.recipe is None or found.recipe.kind == "affine":
            return None, found.reason if found.near else ""
        if found.recipe.channels_last and found.recipe.kind != "frn":
            # Between transpositions it would be slower than as it is.
            return None, "its channels are last, where MABN does not fold" if found.recipe.kind == "mabn" else ""
        if own_hooks(layer):
            return None, "it has hooks"
        new = build(layer, found.recipe, found.channels, len(found.call.shape), memo)
        if not training:
            return new, ""
        mabn, large = found.recipe.kind == "mabn", id(found.recipe) not in self._compared
        self._compared.add(id(found.recipe))
        alike_in_training = not difference(
            layer, new, found.recipe, found.call, large=large, training=True, ours_trains=not mabn
        )
        if mabn and alike_in_training:
            return None, "in training mode it does as in evaluation: a scale that is frozen, and no MABN"
        return (new, "") if mabn or alike_in_training else (None, "in training mode it computes something else")

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


def name_of(new: nn.Module) -> str:
    """The class of a layer that took another's place, with those of what is called behind it."""
    return " and ".join(type(each).__name__ for each in (new if type(new) is nn.Sequential else [new]))


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
        survey = Survey(seen, examples)
        adopting = Adopting(copied(model) if training else seen, survey, training=training)
        Verifier(model, examples).settle(adopting.steps, lambda: adopting.model, {})
        changes = tuple(adopting.changes.values())
        return adopting.model if any(change.outcome == "adopted" for change in changes) else model, changes
    return model, ()


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
        raise ModelError(
            f"adopt of {type(model).__name__}", problem, got=got, fix="pass what its forward takes"
        ) from error
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
