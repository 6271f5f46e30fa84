"""Layers of other projects in the form of ours, or of torch's: what folding begins with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deploynorm._adopt.candidates import own_hooks
from deploynorm._adopt.layers import Memo, build
from deploynorm._adopt.numbers import Numbers, Tried, numbers_of
from deploynorm._adopt.survey import Found, Survey, difference
from deploynorm.layers import TLU
from deploynorm.layers._precision import compute_dtype
from deploynorm.trace import copied

_BATCH_NORM = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""By the rank of the input."""


class Replacement(NamedTuple):
    """What takes the place of a layer.

    Attributes:
        path, layer: The layer.
        new: What takes its place; None where it stays, for the reason.
        norm: In it, the BatchNorm layer that a scale and a shift for each channel have become.
        exact: Weight and bias in float64 of the plain layer that it is.
    """

    path: str
    layer: nn.Module
    new: nn.Module | None = None
    reason: str = ""
    norm: nn.Module | None = None
    exact: tuple[Tensor, Tensor | None] | None = None


def replacements(model: nn.Module, survey: Survey) -> Iterator[Replacement]:
    """What takes the places of the layers of others.

    1. FRN, TLU and MABN -> ours.
    2. A convolution or linear layer that computes its weight (centred, standardised, parametrized) -> the plain layer
       with the weight that it computes.
    3. A scale and a shift for each channel (a frozen batch normalization, one with its activation, statistics that are
       parameters) -> BatchNorm, with the layer's threshold and its own children behind.
    """
    memo: Memo = {}
    layers = dict(model.named_modules())
    affine: list[tuple[str, Found]] = []
    for path, found in survey.found.items():
        layer, recipe = layers[path], found.recipe
        if recipe is None and found.plain is None:
            continue
        if own_hooks(layer):
            yield Replacement(path, layer, reason="it has hooks")
        elif found.plain is not None:  # case 2
            yield Replacement(path, layer, found.plain.plain.eval(), exact=(found.plain.weight, found.plain.bias))
        elif recipe is not None and recipe.channels_last and recipe.kind != "frn":
            continue  # between transpositions it would be slower than as it is
        elif recipe is not None and recipe.kind != "affine":  # case 1
            yield Replacement(path, layer, build(layer, recipe, found.channels, len(found.call.shape), memo))
        else:
            affine.append((path, found))
    made = _batch_norms([(layers[path], found) for path, found in affine])  # case 3
    for (path, _), pair in zip(affine, made, strict=True):
        if pair is not None:
            yield Replacement(path, layers[path], pair[1], norm=pair[0])


def _batch_norms(layers: Sequence[tuple[nn.Module, Found]]) -> list[tuple[nn.Module, nn.Module] | None]:
    """For each layer a BatchNorm layer that computes the same, and it with what is behind it; None without one."""
    tried = [Tried(_bare(layer, found), found.channels, len(found.call.shape), False) for layer, found in layers]
    bounded = [_has_threshold(found) for _, found in layers]
    known = iter(numbers_of([each for each, has in zip(tried, bounded, strict=True) if has]))
    made: list[tuple[nn.Module, nn.Module] | None] = []
    compared: set[int] = set()  # ids of recipes
    for each, has, (layer, found) in zip(tried, bounded, layers, strict=True):
        numbers = next(known) if has else _of_two_points(each)
        pair = _made(layer, found, numbers) if isinstance(numbers, Numbers) else None
        assert found.recipe is not None
        # Its recipe may be that of another layer, of one class and arguments.
        large = id(found.recipe) not in compared
        compared.add(id(found.recipe))
        same = pair is not None and not difference(layer, pair[1], found.recipe, found.call, large=large)
        made.append(pair if same else None)
    return made


def _bare(layer: nn.Module, found: Found) -> nn.Module:
    """A copy in float64, without what is called behind it."""
    twin = copied(layer).double().eval()
    for name in found.recipe.behind if found.recipe is not None else ():
        setattr(twin, name, nn.Identity())
    return twin


def _has_threshold(found: Found) -> bool:
    tau = None if found.recipe is None else found.recipe.parts["tau"]
    return tau is None or bool(tau.tensor) or np.isfinite(tau.plus)


def _of_two_points(tried: Tried) -> Numbers:
    """The numbers of a layer that has no threshold, from what it makes of 0 and of 1."""
    shape = (1, tried.channels, *[1] * (tried.rank - 2))
    with torch.no_grad():
        shift, sum_ = (tried.layer(torch.full(shape, value, dtype=torch.float64)).reshape(-1) for value in (0.0, 1.0))
    tau = np.full(tried.channels, -np.inf)
    return Numbers((sum_ - shift).numpy(), shift.numpy(), tau, None, False)


def _made(layer: nn.Module, found: Found, numbers: Numbers) -> tuple[nn.Module, nn.Module]:
    assert found.recipe is not None
    first: Tensor = next(iter([*layer.parameters(), *layer.buffers()]))
    norm = _BATCH_NORM[len(found.call.shape)](found.channels, dtype=compute_dtype(first.dtype)).requires_grad_(False)
    assert norm.running_var is not None
    norm.weight.copy_(torch.tensor(numbers.scale))
    norm.bias.copy_(torch.tensor(numbers.shift))
    norm.running_var.fill_(1 - norm.eps)  # so that the root is 1
    behind: list[nn.Module] = []
    if (numbers.tau == 0).all():
        behind.append(nn.ReLU())
    elif np.isfinite(numbers.tau).any():
        tlu = TLU(found.channels, dtype=first.dtype).requires_grad_(False)
        tlu.tau.copy_(torch.tensor(numbers.tau))
        behind.append(tlu)
    behind += [layer.get_submodule(name) for name in found.recipe.behind]
    behind = [each for each in behind if not isinstance(each, nn.Identity)]
    return norm, (nn.Sequential(norm, *behind) if behind else norm).eval()
