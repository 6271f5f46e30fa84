"""Eager PyTorch layers: the first stage, where a network is trained. And what a training does with them."""

from deploynorm.layers.cenconv import CenConv1d, CenConv2d, CenConv3d, CenConvTranspose2d
from deploynorm.layers.freeze import freeze_mabn, unfreeze_mabn
from deploynorm.layers.frn import FRN1d, FRN2d, FRN3d
from deploynorm.layers.loss_scale import track_loss_scale
from deploynorm.layers.mabn import MABN1d, MABN2d, MABN3d
from deploynorm.layers.recalibrate import recalibrate
from deploynorm.layers.tlu import TLU

__all__ = [
    "FRN1d",
    "FRN2d",
    "FRN3d",
    "TLU",
    "MABN1d",
    "MABN2d",
    "MABN3d",
    "CenConv1d",
    "CenConv2d",
    "CenConv3d",
    "CenConvTranspose2d",
    "track_loss_scale",
    "freeze_mabn",
    "unfreeze_mabn",
    "recalibrate",
]
