"""Folds a network: first layer by layer, then normalizations into the layers before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.export import ExportedProgram

from deploynorm import foreign
from deploynorm._adopt.adopting import name_of
from deploynorm._adopt.survey import Survey
from deploynorm._fold import local, weights
from deploynorm._fold.others import Replacement, replacements
from deploynorm._fold.producers import Foldable, NotFoldableError, Producers
from deploynorm._fold.report import FoldReport, FoldResult, Outcome
from deploynorm.changes import Change
from deploynorm.errors import ModelError
from deploynorm.layers import TLU
from deploynorm.trace import (
    Dynamic,
    ExampleInputs,
    Examples,
    Sizes,
    TraceReader,
    branches,
    has_hooks,
    inference_copy,
    narrowed_axes,
    trace,
    unwrapped,
)
from deploynorm.verification import Step, Verifier

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold(
    model: nn.Module,
    example_inputs: ExampleInputs | Examples,
    *,
    dynamic: Dynamic | None = None,
    sizes: Sizes | None = None,
) -> FoldResult:
    """Folds running statistics and weight centralisation into plain layers.

    Given:  x -> CenConv2d -> MABN2d -> y
    Result: x -> Conv2d -> y

    1. CenConv -> the plain convolution with W - mean(W): always, since it concerns the layer alone.
    2. FRN with a learned epsilon -> FRN with the constant eps + |eps_l|.
    3. MABN -> BatchNorm of mean zero, which computes the same values. Then each MABN and BatchNorm that follows a
       convolution, transposed convolution or linear layer goes into its weight and bias, and Identity takes its
       place. That requires a trace (torch.export): the layer must be a module of torch.nn, called once, with the
       normalization as its only reader.
    4. A MABN that cannot be folded stays a per-channel affine, in the form of that BatchNorm: the graph is then the
       one that a BatchNorm network gives, for every runtime (benchmarks/affine.py measures the other forms).

    Before that, layers of other projects take the form of ours or of torch's, by what they compute: FRN and MABN become
    ours (see `deploynorm.adopt`), a convolution that computes its weight becomes a plain one, and a scale and a shift
    for each channel fold as a BatchNorm does, or stay what they were.

    At last the network runs on the examples, in float64, and a fold without which it computes what it did is undone:
    the network's own code may read a layer's bias, eps or class.

    The arithmetic is in float64, and the result is cast back to the weight's type.

    Args:
        model: Any network; it is left untouched.
        example_inputs: For the trace, as in `deploynorm.export`.
        dynamic: Axes that will be dynamic, as in `deploynorm.export`. Where the network branches on the size of one, no
            normalization folds until that axis is left out here.
        sizes: What `deploynorm.trace.find_sizes` found, where it was asked already.

    Returns:
        A folded copy, and a report with the reason for each layer that is not foldable. Folding the copy again
        changes nothing.

    Raises:
        InputError: An example input is not a tensor.
        ModelError: The network cannot be copied.
    """
    model = unwrapped(model)
    examples = Examples.of("fold", model, example_inputs)
    folding = _Folding(inference_copy(model))
    verifier = Verifier(model, examples)
    folding.take_in(examples, verifier)
    folding.rewrite_locally()
    folding.fold_norms(examples, dynamic, sizes)
    verifier.settle(folding.steps, lambda: folding.model, folding.exact)
    return folding.result()


class _Norm(NamedTuple):
    """A normalization: the path and the class that the user wrote, and what puts its own layer back, if it has one."""

    path: str
    kind: str
    put_back: Callable[[], None] | None = None
    is_mabn: bool = False


class _Folding:
    """One fold under way: the network being changed, and the report so far; cases as in `fold`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps: list[Step] = []
        self._paths = {module: path for path, module in model.named_modules()}
        self._order = tuple(self._paths.values())
        self._changes: dict[str, Change] = {}
        self._found: Counter[str] = Counter()  # of other projects
        self._kinds: dict[nn.Module, str] = {}  # of what took the place of a layer of others: that layer's
        self._others: set[nn.Module] = set()  # those, and what took their places
        # Weights and biases of changed layers in float64, so that a second change is not rounded twice.
        self.exact: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self._norms: dict[nn.Module, _Norm] = {
            module: _Norm(path, type(module).__name__)
            for module, path in self._paths.items()
            if isinstance(module, _NORMS)
        }

    def take_in(self, examples: Examples, verifier: Verifier) -> None:
        """Layers of others take the form of ours or of torch's; where the network does not bear it, it is undone."""
        taken: list[Replacement] = []
        steps: list[Step] = []
        with suppress(Exception):  # of the network itself: the trace says what is wrong
            taken += replacements(self.model, Survey(self.model, examples))
        refused: dict[str, str] = {}
        for path, layer, new, reason, _, _ in taken:
            if new is None:
                refused[path] = reason
                continue
            self._put(layer, new)
            undo, redo = partial(self._put, new, layer), partial(self._put, layer, new)
            steps.append(Step(undo, redo, partial(refused.__setitem__, path)))
        verifier.settle(steps, lambda: self.model, {})
        for path, layer, new, _, norm, exact in taken:
            kind = type(layer).__name__
            self._found[kind] += 1
            self._others |= {layer, *(() if new is None else new.modules())}
            if new is None or path in refused:
                self._report(path, kind, "not foldable", "", refused[path])
                continue
            inside = [each for each in new.modules() if isinstance(each, (*local.BATCH_NORM, *local.FRN))]
            self._paths |= dict.fromkeys(inside, path)
            self._kinds |= dict.fromkeys(inside, kind)
            self._norms.pop(layer, None)
            if exact is not None:
                self.exact[new] = exact
                self._report(path, kind, "folded", type(new).__name__, "its weight is computed once")
            elif norm is None:
                self._report(path, kind, "adopted", name_of(new), "")
            else:
                self._norms[norm] = _Norm(path, kind, partial(self._put, new, layer))

    def rewrite_locally(self) -> None:
        """Replaces each layer by its equivalent, if it has one, wherever it stands."""
        for module, path in list(self._paths.items()):
            replacement = local.rewrite_locally(module)
            if replacement is None:
                continue
            kind, became = self._kinds.get(module, type(module).__name__), type(replacement).__name__
            if has_hooks(module):
                self._report(path, kind, "not foldable", "", "it has hooks")
                continue
            replacement.eval()
            self._put(module, replacement)
            self.steps.append(
                Step(
                    partial(self._put, replacement, module),
                    partial(self._put, module, replacement),
                    partial(self._report, path, kind, "not foldable", ""),
                )
            )
            if isinstance(replacement, Foldable):  # case 1
                self.exact[replacement] = (weights.centred_weight(module), replacement.bias)
                self._report(path, kind, "folded", became, f"weight centred, now {became}")
            elif isinstance(replacement, local.FRN):  # case 2
                self._report(path, kind, "folded", became, "learned epsilon computed")
            else:  # case 3 or 4
                self._norms[replacement] = _Norm(path, kind, is_mabn=True)

    def fold_norms(self, examples: Examples, dynamic: Dynamic | None, sizes: Sizes | None) -> None:
        """Folds each normalization into the layers before it, or reports why not."""
        if not self._norms and not any(x.is_floating_point() and x.numel() > 1 for x in self.model.buffers()):
            return
        try:
            program = self._traced(examples, dynamic, sizes)
        except NotFoldableError as reason:
            for norm in self._norms:
                self._refuse(norm, str(reason))
            return
        for path, kind in foreign.loose_mabn(program):
            self._found[kind] += 1
            self._report(path, kind, "not foldable", "", f"MABN of another project: {foreign.replace_by('MABN2d')}")
        reader = TraceReader(self.model, program)
        producers = Producers(reader)
        called = [module for module in reader.called if module in self._norms]
        for norm in dict.fromkeys((*called, *self._norms)):
            try:
                self._fold_norm(norm, producers)
            except NotFoldableError as reason:
                self._refuse(norm, str(reason))

    def result(self) -> FoldResult:
        kinds = (*local.PLAIN, *local.BATCH_NORM, *local.FRN, *_NORMS, TLU)
        own = self._paths.keys() - self._others
        found = self._found + Counter(type(module).__name__ for module in own if isinstance(module, kinds))
        changes = tuple(self._changes[path] for path in self._order if path in self._changes)
        return FoldResult(self.model, FoldReport(found, changes))

    def _traced(self, examples: Examples, dynamic: Dynamic | None, sizes: Sizes | None) -> ExportedProgram:
        try:
            program = trace(self.model, examples, dynamic, sizes=sizes)
        except ModelError as error:
            raise NotFoldableError(f"the network cannot be traced ({error.problem})") from error
        if dynamic is not None:  # `trace` has asked the same
            return program
        if narrowed := "; ".join(narrowed_axes(program) or branches(program, self.model, examples, sizes)):
            raise NotFoldableError(f"the network branches on sizes ({narrowed}): leave these axes out of dynamic")
        return program

    def _fold_norm(self, norm: nn.Module, producers: Producers) -> None:
        """Case 3 for one normalization."""
        assert isinstance(norm, _NORMS)
        if norm.running_mean is None or norm.running_var is None:
            raise NotFoldableError("it has no running statistics")
        if type(norm) not in _NORMS:
            raise NotFoldableError("it is a subclass of BatchNorm")
        if has_hooks(norm):
            raise NotFoldableError("it has hooks")
        layers = producers.of(norm)
        affine = weights.batch_norm_as_affine(norm)
        exact = {
            layer: weights.scale_and_shift(layer, *self.exact.get(layer, (layer.weight, layer.bias)), *affine)
            for layer in layers
        }
        folded = {layer: [tensor.to(layer.weight.dtype) for tensor in pair] for layer, pair in exact.items()}
        if not all(bool(tensor.isfinite().all()) for pair in folded.values() for tensor in pair):
            raise NotFoldableError(f"the folded weight overflows {layers[0].weight.dtype}")
        identity = nn.Identity().eval()
        before = {layer: (layer.weight, layer.bias, self.exact.get(layer)) for layer in layers}
        after = {
            layer: (nn.Parameter(weight, False), nn.Parameter(bias, False), exact[layer])
            for layer, (weight, bias) in folded.items()
        }

        def put(old: nn.Module, new: nn.Module, values: Mapping[Foldable, tuple[Any, Any, Any]]) -> None:
            for layer, (weight, bias, rounded_from) in values.items():
                layer.weight, layer.bias = weight, bias
                self.exact[layer] = rounded_from or (weight, bias)
            self._put(old, new)

        put(norm, identity, after)
        producers.mark_folded(norm)
        self.steps.append(
            Step(
                partial(put, identity, norm, before),
                partial(put, norm, identity, after),
                partial(self._refuse, norm),
            )
        )
        names = {module: name for name, module in self.model.named_modules()}
        self._report(
            *self._norms[norm][:2], "folded", "Identity", "into " + ", ".join(names[layer] for layer in layers)
        )

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        if old is self.model:
            self.model = new
        for parent in self.model.modules():
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new

    def _refuse(self, norm: nn.Module, reason: str) -> None:
        path, kind, put_back, is_mabn = self._norms[norm]
        if put_back is not None:
            put_back()
        if is_mabn:  # case 4
            self._report(path, kind, "affine", type(norm).__name__, reason)
        else:
            self._report(path, kind, "not foldable", "", reason)

    def _report(self, path: str, kind: str, outcome: Outcome, became: str, detail: str) -> None:
        self._changes[path] = Change(path, kind, outcome, became, detail)
