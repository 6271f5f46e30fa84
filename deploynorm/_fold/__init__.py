"""nn.Module -> nn.Module: constants into weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from deploynorm._fold import local, weights
from deploynorm._fold.producers import Foldable, LayerGraph, Refusal, has_hooks
from deploynorm.errors import ModelError
from deploynorm.layers import TLU
from deploynorm.tables import table
from deploynorm.trace import Dynamic, Sizes, as_inputs, inference_copy, narrowed_axes, trace

__all__ = ["Change", "FoldReport", "FoldResult", "fold"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Change(NamedTuple):
    """What became of one layer.

    Attributes:
        layer: Its path in the network; "" is the network itself.
        kind: Its class before folding.
        outcome: "folded" (gone, or with its constants computed), "affine" (kept as a per-channel affine, in the
            form of a BatchNorm layer with mean zero) or "left" (as it was).
        detail: Where it went, or the reason why it stays.
    """

    layer: str
    kind: str
    outcome: Literal["folded", "affine", "left"]
    detail: str


@dataclass(frozen=True)
class FoldReport:
    """What a fold found and did.

    Attributes:
        found: How many layers of each class that matters here the network has.
        changes: One entry for each layer that folding looked at, in the network's order.
    """

    found: Counter[str]
    changes: tuple[Change, ...]

    def with_outcome(self, outcome: str) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.outcome == outcome)

    @property
    def modified(self) -> bool:
        """Whether the folded network differs from the one given."""
        return any(change.outcome != "left" for change in self.changes)

    def tables(self, verbose: bool = False) -> str:
        rows = []
        for kind, found in sorted(self.found.items()):
            outcomes = Counter(change.outcome for change in self.changes if change.kind == kind)
            counts = (outcomes["folded"], outcomes["affine"], outcomes["left"], found - outcomes.total())
            rows.append((kind, found, *(count or "-" for count in counts)))
        parts = []
        if rows:
            headings = ("layer", "found", "folded", "kept as affine", "not foldable", "unchanged")
            parts.append(table("Layers", headings, rows))
        told = self.changes if verbose else [c for c in self.changes if c.outcome != "folded"]
        if told:
            rows = [(change.layer or "(the network)", change.kind, change.outcome, change.detail) for change in told]
            parts.append(table("Each layer", ("layer", "class", "outcome", "detail"), rows))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {"found": dict(self.found), "changes": [change._asdict() for change in self.changes]}


class FoldResult(NamedTuple):
    """The folded network, in evaluation mode on the CPU, and the report."""

    model: nn.Module
    report: FoldReport


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
    3. MABN -> BatchNorm with mean zero, which computes the same; then each MABN and BatchNorm that follows a
       convolution, transposed convolution or linear layer goes into its weight and bias, and Identity takes its
       place. That needs a trace (torch.export): the layer must be a module of torch.nn, called once, with the
       normalization as its only consumer. Shared layers, outputs used twice, functional calls and control flow
       leave it alone.
    4. A MABN that goes nowhere stays a per-channel affine, in the form of that BatchNorm: the graph is then the one
       that a BatchNorm network gives, for every runtime (benchmarks/affine.py measures the other forms).

    The arithmetic is in float64, and the result is cast back to the weight's type.

    Args:
        model: Any network; it is left untouched.
        example_inputs: Positional inputs of forward, for the trace.
        dynamic: Axes that will be dynamic, as in `export`. None stands for all that the network takes in other sizes;
            where it branches on one, that keeps it from folding, and another choice lets it.
        sizes: What `deploynorm.trace.find_sizes` found, where it was asked already.

    Returns:
        A folded copy, and a report that gives the reason for each layer that was left. Folding the copy again
        changes nothing.

    Raises:
        ModelError: The network cannot be copied.
    """
    twin = inference_copy(model)
    paths = {module: path for path, module in twin.named_modules()}
    folding = _Folding(twin, paths)
    for module, path in paths.items():
        folding.rewrite_locally(module, path)
    folding.fold_norms(as_inputs("fold", example_inputs), dynamic, sizes)
    return folding.result()


class _Folding:
    """One fold under way: the network being changed and what has been said of each layer."""

    def __init__(self, model: nn.Module, paths: dict[nn.Module, str]) -> None:
        self._model = model
        self._order = list(paths.values())
        self._changes: dict[str, Change] = {}
        # Weights and biases of changed layers before they were rounded to the layer's type: rounding comes once.
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
        kind = type(module).__name__
        if has_hooks(module):
            self._say(path, kind, "left", "it has hooks")
            return
        self._put(module, replacement)
        if isinstance(replacement, _NORMS):
            self._norms[replacement] = (path, kind)
        elif isinstance(replacement, local.FRN):
            self._say(path, kind, "folded", "learned epsilon computed")
        elif isinstance(replacement, Foldable):
            self._exact[replacement] = (local.centred_weight(module), replacement.bias)
            self._say(path, kind, "folded", f"weight centred, now {type(replacement).__name__}")

    def fold_norms(self, example_inputs: Sequence[Tensor], dynamic: Dynamic | None, sizes: Sizes | None) -> None:
        """Folds each normalization into the layers before it, or says why not."""
        if not self._norms:
            return
        graph = self._layer_graph(example_inputs, dynamic, sizes)
        for norm in self._norms if isinstance(graph, Refusal) else graph.in_order(self._norms):
            refusal = graph if isinstance(graph, Refusal) else self._fold_norm(norm, graph)
            if refusal is not None:
                path, kind = self._norms[norm]
                self._say(path, kind, "affine" if kind.startswith("MABN") else "left", refusal.reason)

    def result(self) -> FoldResult:
        ordered = tuple(self._changes[path] for path in self._order if path in self._changes)
        return FoldResult(self._model, FoldReport(self._found, ordered))

    def _layer_graph(
        self, example_inputs: Sequence[Tensor], dynamic: Dynamic | None, sizes: Sizes | None
    ) -> LayerGraph | Refusal:
        try:
            program = trace(self._model, example_inputs, dynamic, sizes=sizes)
        except ModelError as error:
            return Refusal(f"the network cannot be traced ({error.problem})")
        narrowed = "; ".join(axis.told for axis in narrowed_axes(program))
        if narrowed:
            return Refusal(f"the network takes other ways for other sizes ({narrowed}): fix them (dynamic)")
        return LayerGraph(self._model, program)

    def _fold_norm(self, norm: nn.Module, graph: LayerGraph) -> Refusal | None:
        assert isinstance(norm, _NORMS)
        path, kind = self._norms[norm]
        if norm.running_mean is None or norm.running_var is None:
            return Refusal("it has no running statistics")
        if type(norm) not in _NORMS:
            return Refusal("it is a subclass of BatchNorm")
        if has_hooks(norm):
            return Refusal("it has hooks")
        layers = graph.producers(norm)
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
        graph.mark_folded(norm)
        self._put(norm, nn.Identity())
        names = {module: name for name, module in self._model.named_modules()}
        self._say(path, kind, "folded", "into " + ", ".join(names[layer] for layer in layers))
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

    def _say(self, path: str, kind: str, outcome: Literal["folded", "affine", "left"], detail: str) -> None:
        self._changes[path] = Change(path, kind, outcome, detail)
