"""Loading checkpoints into FRN: an epsilon that the file has, into a layer that was built with another form of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deploynorm.errors import InputError

if TYPE_CHECKING:
    from deploynorm.layers.frn import _FRN

_ROUNDING = 1e-6
"""Relative; of an epsilon that was stored in float32."""


def fit(state: dict[str, Any], prefix: str, layer: _FRN) -> None:
    """Makes layer and entries of a state_dict agree about an epsilon (C,) that the state_dict holds.

    - A layer whose epsilon is a number takes the tensor in its place.
    - A layer with a learned epsilon, which the state_dict lacks, learns on from it: eps_l becomes what is above its
      lower bound.

    Raises:
        InputError: The layer's learned epsilon cannot be what the state_dict holds: that is below the lower bound, or
            differs between channels where the layer has one for all.
    """
    eps = state.get(f"{prefix}eps")
    if not isinstance(eps, Tensor) or not isinstance(layer.eps, float) or eps.shape != (layer.num_features,):
        return
    if layer.eps_l is None or f"{prefix}eps_l" in state:
        number = layer.eps
        del layer.eps
        try:
            layer._set_eps(eps, layer.weight.device)
        except InputError:
            layer.eps = number
            raise
        return
    above = eps.double() - layer.eps
    where = f"{prefix.rstrip('.') or type(layer).__name__}, {type(layer).__name__}"
    if bool((above < -_ROUNDING * layer.eps).any()):
        problem = "the epsilon of the state dict is below the lower bound of the learned one"
        got, fix = f"{float(eps.min()):.3g}", "build the layer without learned_eps, or with a smaller eps"
        raise InputError(where, problem, got=got, expected=f"at least {layer.eps:.3g}", fix=fix)
    if layer.eps_l.dim() == 0:
        if bool((eps.max() - eps.min() > _ROUNDING * eps.max()).item()):
            problem = "the epsilon of the state dict differs between channels, and the layer learns one for all"
            raise InputError(where, problem, fix="build the layer with learned_eps='channel'")
        above = above[0]
    del state[f"{prefix}eps"]
    state[f"{prefix}eps_l"] = torch.clamp(above, min=0).to(layer.eps_l.dtype)
