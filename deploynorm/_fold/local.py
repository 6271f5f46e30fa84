"""Rewrites of one layer alone, whatever stands around it."""

from __future__ import annotations

from torch import Tensor, nn

from deploynorm._fold.weights import centred_weight
from deploynorm.layers import (
    CenConv1d,
    CenConv2d,
    CenConv3d,
    CenConvTranspose2d,
    FRN1d,
    FRN2d,
    FRN3d,
    MABN1d,
    MABN2d,
    MABN3d,
)

PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    CenConv1d: nn.Conv1d,
    CenConv2d: nn.Conv2d,
    CenConv3d: nn.Conv3d,
    CenConvTranspose2d: nn.ConvTranspose2d,
}
BATCH_NORM = {MABN1d: nn.BatchNorm1d, MABN2d: nn.BatchNorm2d, MABN3d: nn.BatchNorm3d}
FRN = (FRN1d, FRN2d, FRN3d)


def rewrite_locally(layer: nn.Module) -> nn.Module | None:
    """The layer that computes the same values with its constants computed, or None where there is none.

    1. CenConv -> the torch.nn convolution of the same arguments, with the centred weight.
    2. MABN -> BatchNorm with mean zero.
    3. FRN with a learned epsilon -> FRN with the constant eps + |eps_l|.

    A subclass may compute something else, so only the classes themselves are rewritten.
    """
    if type(layer) in PLAIN:  # case 1
        return _to_plain(layer)
    if type(layer) in BATCH_NORM:  # case 2
        return _to_batch_norm(layer)
    if type(layer) in FRN and layer.eps_l is not None:  # case 3
        return _to_fixed_eps(layer)
    return None


def _to_plain(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, nn.modules.conv._ConvNd)
    plain = PLAIN[type(layer)].__new__(PLAIN[type(layer)])
    # Every argument of a convolution is an attribute, so the plain layer differs only in class and weight.
    plain.__dict__.update(layer.__dict__)
    plain._parameters = dict(layer._parameters)
    plain.weight = nn.Parameter(centred_weight(layer).to(layer.weight.dtype), requires_grad=False)
    return plain


def _to_batch_norm(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, (MABN1d, MABN2d, MABN3d))
    # The parameters take the statistics' type, which BatchNorm requires with a half-precision input.
    norm = BATCH_NORM[type(layer)](
        layer.num_features, layer.eps, affine=layer.affine, dtype=layer.running_var.dtype
    ).requires_grad_(False)
    assert norm.running_var is not None
    norm.running_var.copy_(layer.running_var)
    if layer.affine:
        norm.weight.copy_(layer.weight)
        norm.bias.copy_(layer.bias)
    return norm


def _to_fixed_eps(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, FRN)
    eps = layer.effective_eps()
    assert isinstance(eps, Tensor)
    values = float(eps) if eps.dim() == 0 else eps
    fixed = type(layer)(layer.num_features, values, tlu=layer.tau is not None, dtype=layer.weight.dtype)
    fixed.weight, fixed.bias, fixed.tau = layer.weight, layer.bias, layer.tau
    return fixed
