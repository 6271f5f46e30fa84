"""Folds a network: first layer by layer, then normalizations into the layers before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploynorm._fold import local, weights
from deploynorm._fold.producers import Foldable, Producers, Refusal
from deploynorm._fold.report import FoldReport, FoldResult, Outcome
from deploynorm.changes import Change
from deploynorm.errors import ModelError
from deploynorm.layers import TLU
from deploynorm.trace import Dynamic, Sizes, TraceReader, as_inputs, has_hooks, inference_copy, narrowed_axes, trace

__all__ = ["fold"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
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
       normalization as its only reader. Shared layers, outputs read twice, functional calls and control flow make a
       normalization not foldable.
    4. A MABN that cannot be folded stays a per-channel affine, in the form of that BatchNorm: the graph is then the
       one that a BatchNorm network gives, for every runtime (benchmarks/affine.py measures the other forms).

    The arithmetic is in float64, and the result is cast back to the weight's type.

    Args:
        model: Any network; it is left untouched.
        example_inputs: Positional inputs of forward, for the trace; a bare tensor is the only one.
        dynamic: Axes that will be dynamic, as in `export`. None stands for all that the network takes in other
            sizes. Where it branches on the size of one, no normalization folds until that axis is left out here.
        sizes: What `deploynorm.trace.find_sizes` found, where it was asked already.

    Returns:
        A folded copy, and a report with the reason for each layer that is not foldable. Folding the copy again
        changes nothing.

    Raises:
        InputError: An example input is not a tensor.
        ModelError: The network cannot be copied.
    """
    examples = as_inputs("fold", example_inputs)
    twin = inference_copy(model)
    paths = {module: path for path, module in twin.named_modules()}
    folding = _Folding(twin, paths)
    for module, path in paths.items():
        folding.rewrite_locally(module, path)
    folding.fold_norms(examples, dynamic, sizes)
    return folding.result()


class _Folding:
    """One fold under way: the network being changed, and the report so far; cases as in `fold`."""

    def __init__(self, model: nn.Module, paths: dict[nn.Module, str]) -> None:
        self._model = model
        self._order = list(paths.values())
        self._changes: dict[str, Change] = {}
        # Weights and biases of changed layers in float64, so that a second change is not rounded twice.
        self._exact: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        kinds = (*local.PLAIN, *local.BATCH_NORM, *local.FRN, *_NORMS, TLU)
        self._found = Counter(type(module).__name__ for module in paths if isinstance(module, kinds))
        # Each normalization: its path, and the class that the user wrote.
        self._norms: dict[nn.Module, tuple[str, str]] = {
            module: (path, type(module).__name__) for module, path in paths.items() if isinstance(module, _NORMS)
        }

    def rewrite_locally(self, module: nn.Module, path: str) -> None:
        """Replaces a layer by its equivalent, if it has one, wherever it stands."""
        replacement = local.rewrite_locally(module)
        if replacement is None:
            return
        kind, became = type(module).__name__, type(replacement).__name__
        if has_hooks(module):
            self._report(path, kind, "not foldable", "", "it has hooks")
            return
        self._put(module, replacement)
        if isinstance(replacement, Foldable):  # case 1
            self._exact[replacement] = (local.centred_weight(module), replacement.bias)
            self._report(path, kind, "folded", became, f"weight centred, now {became}")
        elif isinstance(replacement, local.FRN):  # case 2
            self._report(path, kind, "folded", became, "learned epsilon computed")
        elif isinstance(replacement, _NORMS):  # case 3 or 4
            self._norms[replacement] = (path, kind)

    def fold_norms(self, examples: Sequence[Tensor], dynamic: Dynamic | None, sizes: Sizes | None) -> None:
        """Folds each normalization into the layers before it, or reports why not."""
        if not self._norms:
            return
        reader = self._traced(examples, dynamic, sizes)
        if isinstance(reader, Refusal):
            for norm in self._norms:
                self._refuse(norm, reader)
            return
        producers = Producers(reader)
        for norm in sorted(self._norms, key=reader.first_call):
            if refusal := self._fold_norm(norm, producers):
                self._refuse(norm, refusal)

    def result(self) -> FoldResult:
        ordered = tuple(self._changes[path] for path in self._order if path in self._changes)
        return FoldResult(self._model, FoldReport(self._found, ordered))

    def _traced(
        self, examples: Sequence[Tensor], dynamic: Dynamic | None, sizes: Sizes | None
    ) -> TraceReader | Refusal:
        try:
            program = trace(self._model, examples, dynamic, sizes=sizes)
        except ModelError as error:
            return Refusal(f"the network cannot be traced ({error.problem})")
        if narrowed := "; ".join(axis.text for axis in narrowed_axes(program)):
            return Refusal(f"the network branches on sizes ({narrowed}): leave these axes out of dynamic")
        return TraceReader(self._model, program)

    def _fold_norm(self, norm: nn.Module, producers: Producers) -> Refusal | None:
        """Case 3 for one normalization, or why it cannot be folded."""
        assert isinstance(norm, _NORMS)
        path, kind = self._norms[norm]
        if norm.running_mean is None or norm.running_var is None:
            return Refusal("it has no running statistics")
        if type(norm) not in _NORMS:
            return Refusal("it is a subclass of BatchNorm")
        if has_hooks(norm):
            return Refusal("it has hooks")
        layers = producers.of(norm)
        if isinstance(layers, Refusal):
            return layers
        affine = weights.batch_norm_as_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        exact = [self._scaled(layer, *affine) for layer in layers]
        folded = [[tensor.to(layer.weight.dtype) for tensor in pair] for layer, pair in zip(layers, exact, strict=True)]
        if not all(bool(torch.isfinite(tensor).all()) for pair in folded for tensor in pair):
            return Refusal(f"the folded weight overflows {layers[0].weight.dtype}")
        for layer, pair, (weight, bias) in zip(layers, exact, folded, strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.bias = nn.Parameter(bias, requires_grad=False)
            self._exact[layer] = pair
        producers.mark_folded(norm)
        self._put(norm, nn.Identity())
        names = {module: name for name, module in self._model.named_modules()}
        self._report(path, kind, "folded", "Identity", "into " + ", ".join(names[layer] for layer in layers))
        return None

    def _scaled(self, layer: Foldable, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of scale * layer(x) + shift, in float64."""
        weight, bias = self._exact.get(layer, (layer.weight, layer.bias))
        return weights.scale_and_shift(
            weight,
            bias,
            scale,
            shift,
            groups=1 if isinstance(layer, nn.Linear) else layer.groups,
            transposed=not isinstance(layer, nn.Linear) and layer.transposed,
        )

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        new.eval()
        if old is self._model:
            self._model = new
        for parent in self._model.modules():
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new

    def _refuse(self, norm: nn.Module, refusal: Refusal) -> None:
        path, kind = self._norms[norm]
        if kind.startswith("MABN"):  # case 4
            self._report(path, kind, "affine", type(norm).__name__, refusal.reason)
        else:
            self._report(path, kind, "not foldable", "", refusal.reason)

    def _report(self, path: str, kind: str, outcome: Outcome, became: str, detail: str) -> None:
        self._changes[path] = Change(path, kind, outcome, became, detail)
