"""Swaps the batch normalizations of a network for FRN or MABN."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from deploynorm._adopt import adopted, adopted_notes
from deploynorm._swap.activations import Thresholds
from deploynorm._swap.layers import FRN, MABN, BatchNorm, Memo, is_norm, rank_of, why_not_swapped
from deploynorm._swap.observing import Observed, observe
from deploynorm._swap.plan import Network, Plan, planned
from deploynorm._swap.report import SwapReport
from deploynorm._swap.to_frn import plan_frn
from deploynorm._swap.to_mabn import plan_mabn, why_not_mabn
from deploynorm.errors import InputError, ModelError
from deploynorm.trace import ExampleInputs, Examples, check_network, unwrapped

Norm = Literal["frn", "mabn"]
Weights = Literal["keep", "reset"]


class SwapResult(NamedTuple):
    """The new network, on the device and in the mode of the one given, and the report."""

    model: nn.Module
    report: SwapReport


def swap(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    norm: Norm,
    thresholds: Thresholds = "own",
    weights: Weights = "keep",
    **options: Any,
) -> SwapResult:
    """Turns a network with batch normalization into one with FRN or MABN, to be trained or fine-tuned.

    Given:  x -> Conv2d -> BatchNorm2d -> ReLU -> y
    FRN:    x -> Conv2d -> FRN2d (with TLU) -> Identity -> y
    MABN:   x -> CenConv2d -> MABN2d -> ReLU -> y

    1. BatchNorm1d, 2d and 3d, SyncBatchNorm and timm's BatchNormAct2d become FRN or MABN. Frozen and hooked ones,
       subclasses with a forward of their own, and other kinds of normalization stay.
    2. FRN: a ReLU layer goes into the FRN before it as its TLU where it is provably that normalization's own, and
       Identity takes its place. One that reads normalizations in another way, as behind the addition of a residual
       block, stays, or becomes a TLU layer with thresholds="all". A functional call stays, and so does a layer that
       is called in several ways. The FRN before a ReLU that stays has no TLU: max(y, tau, 0) would give tau no
       gradient at the start, tau = 0. Epsilon is learned where the example inputs give maps of one value.
    3. MABN: a convolution whose output goes only to MABN becomes CenConv. Activations stay. MABN keeps the
       BatchNorm's epsilon and momentum.

    Who reads what is seen in traces (torch.export) in evaluation and in training mode, for the height and width of
    the example and any batch size from 2 up. Where a network cannot be traced the normalizations are swapped anyway,
    but every activation stays and no convolution is centred.

    The network keeps its classes, methods and training branches: only layers are replaced, wherever it holds them.
    FRN, TLU, MABN and CenConv layers of other projects become ours as in `deploynorm.adopt`, and a note says so.
    Parameters are new objects, so create the optimiser afterwards.

    Args:
        model: Any network; it is left untouched.
        example_inputs: As in `deploynorm.export`, of the sizes of training.
        norm: "frn" or "mabn".
        thresholds: For FRN, which ReLUs become TLUs: those that are a normalization's "own", "all" that
            normalizations reach, or "none", which leaves every activation where it is.
        weights: "keep" copies every weight, gamma and beta among them. MABN's second moment starts anew: it does not
            follow from BatchNorm's statistics, since the input that they describe is centred now. "reset" draws all
            anew by each layer's reset_parameters.
        options: Further arguments of the new layers: `eps` and `learned_eps` of FRN2d; `eps`, `momentum`,
            `moving_batch_size` and so on of MABN2d.

    Returns:
        The new network, and a report of each layer, with the reason where it stayed.

    Raises:
        InputError: An argument is none of those named, the network is none, or an example input is not a tensor.
        ModelError: The network has no batch normalization, cannot be copied, is compiled, scripted, wrapped (as
            in DataParallel) or lazy, or does not run on the example inputs.
    """
    _check_arguments(norm, thresholds, weights, options)
    _check_model(model)
    examples = Examples.of("swap", model, example_inputs)
    model, adopted_layers = adopted(model, examples, training=True)
    layers = dict(model.named_modules())
    observed = observe(model, examples)
    plans: dict[str, Plan] = {}
    norms: dict[str, tuple[BatchNorm, int]] = {}
    for path, layer in layers.items():
        if is_norm(layer):  # case 1
            reason, rank = why_not_swapped(layer), rank_of(layer)
            if not reason and (reader := observed.trace.foreign_reader(observed.modules[path])):
                reason = f"its parameters or statistics are used outside its own forward, by {reader}"
            if not reason and rank is None and (shapes := observed.trace.input_shapes(observed.modules[path])):
                rank = max(len(shapes[0]) - 2, 1)
            if not reason and norm == "mabn" and isinstance(layer, BatchNorm):
                reason = why_not_mabn(layer, options)
            if isinstance(layer, BatchNorm) and rank is not None and not reason:
                norms[path] = layer, rank
            else:
                plans[path] = planned(path, layer, "unchanged", reason or "the number of its axes is not known")
    network = Network(model, layers, observed, norms, options)
    others = plan_frn(network, thresholds) if norm == "frn" else plan_mabn(network)  # case 2 or 3
    plans |= {plan.change.name: plan for plan in others}

    memo: Memo = {}  # copy finds the new layers in it, also where a list or attribute holds the old one
    for path, plan in plans.items():
        if plan.build is not None:
            memo[id(layers[path])] = plan.build(memo)
    swapped = copy.deepcopy(model, memo)
    notes = [*adopted_notes(adopted_layers), *_notes(norm, thresholds, observed, plans)]
    if weights == "reset" and (unknown := _reset(swapped)):
        notes.append(f"not reset, because no reset_parameters of a layer draws them: {', '.join(unknown)}")
    changes = tuple(plans[path].change for path in layers if path in plans)
    return SwapResult(swapped, SwapReport(Counter(change.kind for change in changes), changes, tuple(notes)))


def _check_arguments(norm: str, thresholds: str, weights: str, options: Mapping[str, Any]) -> None:
    for name, value, choices in (
        ("norm", norm, get_args(Norm)),
        ("thresholds", thresholds, get_args(Thresholds)),
        ("weights", weights, get_args(Weights)),
    ):
        if value not in choices:
            raise InputError("swap", f"unknown {name}", got=repr(value), expected=" or ".join(map(repr, choices)))
    if norm == "mabn" and thresholds != "own":
        raise InputError("swap", "only FRN has thresholds", got=repr(thresholds), fix="leave them out for MABN")
    kind = FRN[2] if norm == "frn" else MABN[2]
    if taken := {"num_features", "tlu", "affine", "device", "dtype"} & options.keys():
        raise InputError("swap", f"{', '.join(sorted(taken))} of a layer follows from the network", got=dict(options))
    try:
        kind(1, **options)
    except TypeError as error:
        raise InputError("swap", f"{kind.__name__} does not take these options: {error}", got=dict(options)) from error


def _check_model(model: nn.Module) -> None:
    check_network(model, "swap")
    where = f"swap of {type(model).__name__}"
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ModelError(where, "the network has lazy layers", fix="run it once, so that they get their sizes")
    for module in model.modules():
        if isinstance(module, (torch._dynamo.OptimizedModule, torch.jit.ScriptModule)) or module._compiled_call_impl:
            raise ModelError(where, "the network is compiled or scripted", fix="swap first, compile afterwards")
        if unwrapped(module) is not module:
            problem, fix = "the network is wrapped", "swap the network inside (.module), and wrap the result"
            raise ModelError(where, problem, got=type(module).__name__, fix=fix)
    norms = Counter(type(module).__name__ for module in model.modules() if is_norm(module))
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(norms.items()))
        raise ModelError(where, "the network has no batch normalization", got=found or "no normalization at all")


def _notes(norm: Norm, thresholds: Thresholds, observed: Observed, plans: Mapping[str, Plan]) -> Iterator[str]:
    if observed.untraced:
        what = "every activation stays" if norm == "frn" else "no convolution is centred"
        yield f"{what}, because the network cannot be examined: {observed.untraced}"
    partly = [plan for plan in plans.values() if plan.change.outcome == "partly"]
    if norm == "frn" and partly and thresholds != "none" and not observed.untraced:
        yield (
            f"FRN layers that learn no threshold, because the ReLU behind them stays: {len(partly)}; "
            "give each normalization an nn.ReLU of its own to have it absorbed"
        )
    if norm == "mabn":
        yield "MABN's running second moments start anew: train, or recalibrate them, before evaluating"


def _reset(model: nn.Module) -> list[str]:
    """Draws every layer's parameters anew, and names the parameters of which no layer knows how."""
    unknown = []
    for path, module in model.named_modules():
        # A parametrized or hooked weight is computed from others, which reset_parameters does not see.
        computed = parametrize.is_parametrized(module) or module._forward_pre_hooks
        if hasattr(module, "reset_parameters") and not computed:
            module.reset_parameters()
        else:
            unknown += [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
    return unknown
