"""Freezing MABN for fine-tuning, as detectors freeze batch normalization."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deploynorm.errors import InputError
from deploynorm.layers.mabn import _MABN


def freeze_mabn(model: nn.Module, within: str | Sequence[str] = (), *, affine: bool = True) -> list[str]:
    """Fixes MABN layers with their present statistics: in training they compute what they compute in evaluation.

    The gradient of x is that of the evaluation's expression (see MABN2d), and statistics do not change. Loading a
    state_dict replaces them, and the layer stays frozen; a state_dict does not record it, copies by copy.deepcopy and
    pickle do. Folding and export see no difference. `recalibrate` skips the layer.

    Freeze before you make the optimiser (`parameter_groups` leaves fixed parameters out): an optimiser with momentum
    moves a parameter for as long as it has a gradient.

    Args:
        model: Changed in place.
        within: Names of submodules, as in model.named_modules(), to freeze the MABN in; by default the whole model.
        affine: Whether weight and bias are fixed too. False leaves them trainable, if they were.

    Returns the names of the layers that are frozen now.

    Raises:
        InputError: A name in `within` is no submodule, or there is no MABN where it says.
    """
    layers = _layers("freeze_mabn", model, within)
    for layer in layers.values():
        _unfreeze(layer)
        layer.frozen = True
        if affine:
            trained = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
            layer._fixed_parameters = tuple(trained)
            for name in trained:
                layer.get_parameter(name).requires_grad_(False).grad = None
    return list(layers)


def unfreeze_mabn(model: nn.Module, within: str | Sequence[str] = ()) -> list[str]:
    """Undoes `freeze_mabn`: statistics change again, and the parameters that it fixed are trained again.

    Arguments and errors are those of `freeze_mabn`. Layers that were not frozen do not change. Returns the names of
    those that were.
    """
    layers = {name: layer for name, layer in _layers("unfreeze_mabn", model, within).items() if layer.frozen}
    for layer in layers.values():
        _unfreeze(layer)
    return list(layers)


def _unfreeze(layer: _MABN) -> None:
    layer.frozen = False
    for name in layer._fixed_parameters:
        layer.get_parameter(name).requires_grad_(True)
    layer._fixed_parameters = ()


def _layers(where: str, model: nn.Module, within: str | Sequence[str]) -> dict[str, _MABN]:
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, _MABN] = {}
    for part in [within] if isinstance(within, str) else within or [""]:
        if part not in modules:
            expected = "a name that model.named_modules() gives"
            raise InputError(where, "no such submodule", got=repr(part), expected=expected)
        prefix = f"{part}." if part else ""
        within_part = {name: module for name, module in modules.items() if f"{name}.".startswith(prefix)}
        inside = {name: module for name, module in within_part.items() if isinstance(module, _MABN)}
        if not inside:
            raise InputError(where, "there is no MABN", got=repr(part) if part else type(model).__name__)
        found |= inside
    return found
