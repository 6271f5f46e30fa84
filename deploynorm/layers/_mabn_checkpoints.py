"""Loading checkpoints into MABN: of earlier versions, with another window, or without what only training requires."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deploynorm.sources import OF_THE_AUTHORS

if TYPE_CHECKING:
    from deploynorm.layers.mabn import _MABN

_HISTORIES = ("recent_x2", "recent_gz")


def fit(state: dict[str, Any], prefix: str, layer: _MABN) -> None:
    """Changes the entries of a state_dict that begin with prefix into what the layer can load.

    - Histories of version 1 become those of version 2.
    - Histories of another window are cut to the newest rows, or filled up with empty ones.
    - running_var may be (1, C, 1, 1), as in the authors' code, whose other buffers are dropped.
    - Where running_var comes without histories or counter, histories start empty and the counter at 1, so that
      training begins with a warm-up and goes on from running_var, and a warning says so.
    """
    _upgrade(state, prefix)
    R = state.get(f"{prefix}running_var")
    if not isinstance(R, Tensor):
        return
    for name in OF_THE_AUTHORS:
        state.pop(prefix + name, None)
    if R.numel() == layer.num_features:
        state[f"{prefix}running_var"] = R.reshape(-1)
    training = {"num_batches_tracked": torch.ones_like(layer.num_batches_tracked, device=R.device)}
    training |= {name: torch.zeros_like(getattr(layer, name), device=R.device) for name in _HISTORIES}
    missing = [name for name in training if f"{prefix}{name}" not in state]
    if missing:
        what = f"the checkpoint has running_var and no {' or '.join(missing)}"
        so = "nothing is missing for evaluation, and training starts with the history empty"
        warnings.warn(f"{type(layer).__name__}: {what}: {so}", stacklevel=2)
    for name in missing:
        state[prefix + name] = training[name]
    for name in _HISTORIES:
        kept = state[prefix + name][: layer.moving_batch_size]
        empty = kept.new_zeros(layer.moving_batch_size - len(kept), *kept.shape[1:])
        state[prefix + name] = torch.cat([kept, empty])


def upgraded_pickle(state: dict[str, Any], unsaved: dict[str, Tensor]) -> dict[str, Any]:
    """The attributes of a pickled layer of any version, as those of this one.

    unsaved are the buffers that are not in a state_dict, as a new layer has them.
    """
    buffers = dict(state["_buffers"])
    _upgrade(buffers, "")
    buffers.pop("recent_steps", None)
    added = {"process_group": None, "frozen": False, "_fixed_parameters": (), "_loss_scale": None}
    for name, value in unsaved.items():
        buffers.setdefault(name, value)  # last, as in a new layer: others pair buffers by their order
    return {**added, **state, "_buffers": buffers, "_non_persistent_buffers_set": set(unsaved)}


def _upgrade(state: dict[str, Any], prefix: str) -> None:
    # Version 1: means (K, C) and samples (K,), oldest first. Recognised by its names: _metadata may be lost.
    for name in _HISTORIES:
        samples = state.pop(f"{prefix}{name}_samples", None)
        if samples is not None:
            means = state[f"{prefix}{name}"]
            state[f"{prefix}{name}"] = torch.cat([means * samples[:, None], samples[:, None]], 1).flip(0)
