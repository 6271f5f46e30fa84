"""FRN layers of timm, replaced by ours."""

from __future__ import annotations

import sys
from functools import cache

from torch import nn

from deploynorm.layers.frn import FRN2d

_TIMM = "timm.layers.filter_response_norm"


def adopt(model: nn.Module) -> nn.Module:
    """Replaces the FRN layers of timm by FRN2d layers that compute the same, in place, and returns the network.

    Another object is returned only where the network itself is such a layer. Only these classes themselves are
    replaced, and no subclass, which may compute something else.

        FilterResponseNormTlu2d            -> FRN2d(tlu=True); without apply_act, tlu=False
        FilterResponseNormAct2d            -> FRN2d(tlu=False) and the layer's own activation

    Source: timm/layers/filter_response_norm.py. timm's epsilon is 1e-5 where the paper has 1e-6, and it squares
        in half precision before it casts; the new layers keep the epsilon and do not overflow.
    """
    timm_frn = sys.modules.get(_TIMM)
    if timm_frn is None:  # not imported, so no such layer exists
        return model

    @cache  # a layer that is used in two places is one object and must stay one
    def ours(layer: nn.Module) -> nn.Module:
        if type(layer) is timm_frn.FilterResponseNormTlu2d:
            return _frn(layer, layer.tau)
        if type(layer) is timm_frn.FilterResponseNormAct2d:
            return nn.Sequential(_frn(layer, None), layer.get_submodule("act"))
        return layer

    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and ours(child) is not child:
                parent._modules[name] = ours(child)
    return ours(model)


def _frn(layer: nn.Module, tau: object) -> FRN2d:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    frn = FRN2d(len(weight), eps=float(layer.eps), tlu=tau is not None)  # type: ignore[arg-type]
    frn.weight, frn.bias = weight, bias
    if isinstance(tau, nn.Parameter):
        frn.tau = tau
    return frn.train(layer.training)
