"""Eager PyTorch layers: the first stage, where a network is trained. And what a training does with them.

Filter response normalization: FRN2d (FRN1d, FRN3d) and TLU. Moving average batch normalization: MABN2d (MABN1d, MABN3d)
behind the centred convolutions CenConv2d (CenConv1d, CenConv3d, CenConvTranspose2d). The 2d classes have the full text.
"""

from deploynorm.layers.cenconv import CenConv1d, CenConv2d, CenConv3d, CenConvTranspose2d
from deploynorm.layers.freeze import freeze_mabn, unfreeze_mabn
from deploynorm.layers.frn import TLU, FRN1d, FRN2d, FRN3d
from deploynorm.layers.loss_scale import track_loss_scale
from deploynorm.layers.mabn import MABN1d, MABN2d, MABN3d
from deploynorm.layers.recalibration import recalibrate
from deploynorm.layers.weight_decay import parameter_groups

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
    "parameter_groups",
    "track_loss_scale",
    "freeze_mabn",
    "unfreeze_mabn",
    "recalibrate",
]
