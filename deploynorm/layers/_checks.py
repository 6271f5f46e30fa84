"""Checks of arguments and inputs that the layers share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deploynorm.errors import InputError


def check_input(layer: str, x: Tensor, num_features: int, ranks: Sequence[int]) -> None:
    """Raises InputError unless x has one of the ranks and num_features channels on axis 1."""
    got = f"a tensor of shape {tuple(x.shape)}"
    if x.dim() not in ranks:
        fix = "use the 1d, 2d or 3d layer that matches the data, channels on axis 1"
        raise InputError(layer, "wrong rank", got=got, expected=" or ".join(f"{rank}-D" for rank in ranks), fix=fix)
    if x.shape[1] != num_features:
        fix = "set num_features to the channels of the layer before"
        raise InputError(layer, "wrong number of channels", got=got, expected=f"{num_features} on axis 1", fix=fix)
    if not x.is_floating_point():
        raise InputError(layer, "the input is not floating point", got=x.dtype, fix="convert it with x.float()")


def check_positive(layer: str, name: str, value: float) -> None:
    """Raises InputError unless value > 0."""
    if not value > 0:
        raise InputError(layer, f"{name} must be positive", got=value)
