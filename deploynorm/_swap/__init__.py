"""BatchNorm network -> FRN or MABN network, to be trained."""

from deploynorm._swap.report import SwapReport
from deploynorm._swap.swapping import SwapResult, swap

__all__ = ["SwapReport", "SwapResult", "swap"]
