"""Recognises the layers that a swap takes, and builds the layers that take their place."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from deploynorm._fold.local import PLAIN
from deploynorm.layers.frn import FRN1d, FRN2d, FRN3d
from deploynorm.layers.mabn import MABN1d, MABN2d, MABN3d
from deploynorm.trace import has_hooks

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
Memo = dict[int, Any]
"""What copy.deepcopy has copied so far, by the id of the original."""

FRN: dict[int, type[FRN1d | FRN2d | FRN3d]] = {1: FRN1d, 2: FRN2d, 3: FRN3d}
MABN: dict[int, type[MABN1d | MABN2d | MABN3d]] = {1: MABN1d, 2: MABN2d, 3: MABN3d}
"""Layers by the number of spatial axes."""

CENTRED = {plain: kind for kind, plain in PLAIN.items()}

_BATCH_NORMS: dict[type[nn.Module], int | None] = {
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: None,  # takes any
}
_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.modules.instancenorm._InstanceNorm)


def is_norm(layer: nn.Module) -> bool:
    """Whether the report names the layer: one of torch's normalizations, or another library's BatchNorm."""
    known = isinstance(layer, (nn.modules.batchnorm._BatchNorm, *_OTHER_NORMS))
    return known or {"running_mean", "running_var"} <= layer._buffers.keys()


def why_not_swapped(norm: nn.Module) -> str:
    """Why a normalization is not swapped, whatever stands around it; empty where it can be."""
    name = type(norm).__name__
    if isinstance(norm, _OTHER_NORMS):
        return "it is no batch normalization"
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return "it is frozen: a constant affine" if "weight" in norm._buffers else f"a {name} is none of torch.nn's"
    if has_hooks(norm, backward=True):
        return "it has hooks"
    if parametrize.is_parametrized(norm):
        return "its parameters are parametrized"
    if not _has_own_activation(norm) and _stock_kind(norm) is None:
        return f"a {name} with a forward of its own"
    return ""


def _has_own_activation(norm: nn.Module) -> bool:
    """Whether it is a layer of timm that holds `drop` and `act` and calls them behind a plain batch normalization."""
    timm = sys.modules.get("timm.layers.norm_act")
    # By identity: a subclass may compute something else.
    return timm is not None and type(norm) in (timm.BatchNormAct2d, timm.SyncBatchNormAct)


def rank_of(norm: nn.Module) -> int | None:
    """The number of spatial axes that the normalization's class says, or None where it takes any."""
    kind = nn.BatchNorm2d if _has_own_activation(norm) else _stock_kind(norm)
    return None if kind is None else _BATCH_NORMS[kind]


def like(norm: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Device and dtype of a normalization, as arguments for the layer that takes its place."""
    own = (getattr(norm, name) for name in ("weight", "running_var"))
    floating = (tensor for tensor in (*own, *model.parameters()) if tensor is not None and tensor.is_floating_point())
    tensor = next(floating, torch.empty(()))
    return {"device": tensor.device, "dtype": tensor.dtype}


def carried_over(norm: BatchNorm, new: nn.Module, memo: Memo) -> nn.Module:
    """The new layer with the normalization's gamma, beta and mode, and with timm's `drop` and `act` behind it."""
    for name in ("weight", "bias"):
        if (parameter := getattr(norm, name)) is not None:
            setattr(new, name, copy.deepcopy(parameter, memo))
    if _has_own_activation(norm):
        behind = {name: copy.deepcopy(getattr(norm, name), memo) for name in ("drop", "act") if hasattr(norm, name)}
        # The copy of a ReLU that is absorbed is an Identity.
        behind = {name: layer for name, layer in behind.items() if not isinstance(layer, nn.Identity)}
        if behind:
            new = nn.Sequential(OrderedDict(norm=new, **behind))
    return new.train(norm.training)


def centred(conv: nn.modules.conv._ConvNd, memo: Memo) -> nn.Module:
    """The CenConv layer of the same arguments and weights."""
    kind = CENTRED[type(conv)]
    new = kind.__new__(kind)
    # Every argument of a convolution is an attribute, so the new layer differs only in class.
    new.__dict__.update(copy.deepcopy(conv.__dict__, memo))
    return new


def _stock_kind(norm: nn.Module) -> type[nn.Module] | None:
    kinds = (kind for kind in _BATCH_NORMS if isinstance(norm, kind) and type(norm).forward is kind.forward)
    return next(kinds, None)
