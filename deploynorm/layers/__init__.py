"""Eager PyTorch layers: the first stage, where a network is trained."""

from deploynorm.layers.cenconv import CenConv1d, CenConv2d, CenConv3d, CenConvTranspose2d
from deploynorm.layers.frn import FRN1d, FRN2d, FRN3d
from deploynorm.layers.mabn import MABN1d, MABN2d, MABN3d
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
]
