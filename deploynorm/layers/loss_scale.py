"""Gradient scaling, for layers that remember gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploynorm.errors import BackendError, InputError
from deploynorm.layers.mabn import _MABN


def track_loss_scale(model: nn.Module, scaler: torch.amp.GradScaler | None) -> None:
    """Links every MABN in a model to the scaler that multiplies its loss; call it once, before training.

        scaler = torch.amp.GradScaler()
        track_loss_scale(model, scaler)

    MABN averages psi, a mean of gradients, over several iterations: when the scale changes between them, the psi of
    earlier steps is off by that factor, and so are the gradients of x until the window has passed. A linked MABN stores
    psi of the unscaled loss, so that a run may also go on with another scale or with none. It reads the scaler's own
    tensor, which stays on the device: the host does not wait, and a compiled step has no graph break. A copy made by
    copy.deepcopy has this scaler too; a model loaded from a file has none.

    Args:
        model: On the device on which it is trained: the scaler makes its tensor there if it has none yet.
        scaler: The loss is scaled by it in every training step of the model. None, or a scaler that is not enabled:
            the loss is not scaled.

    Raises:
        InputError: The model has no MABN, or is on another kind of device than the scaler.
        BackendError: This version of PyTorch keeps the scale in another place.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _MABN)]
    if not layers:
        raise InputError("track_loss_scale", "the model has no MABN", got=type(model).__name__)
    scale = None if scaler is None or not scaler.is_enabled() else _scale_of(scaler, layers[0].running_var.device)
    for layer in layers:
        layer._loss_scale = scale


def _scale_of(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    kind = getattr(scaler, "_device", device.type)
    if kind != device.type:
        problem = "the model is on another kind of device than the scaler"
        got = f"a model on {device}"
        raise InputError("track_loss_scale", problem, got=got, expected=kind, fix="move the model to its device first")
    # A scaler makes its tensor with the first value that it scales, and changes it in place from then on.
    scaler.scale(torch.zeros((), device=device))
    scale = getattr(scaler, "_scale", None)
    if not isinstance(scale, Tensor):
        raise BackendError(
            "track_loss_scale", f"PyTorch {torch.__version__} has no GradScaler._scale", fix="use another version"
        )
    return scale
