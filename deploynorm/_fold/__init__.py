"""nn.Module -> nn.Module: constants into weights."""

from deploynorm._fold.folding import fold
from deploynorm._fold.report import FoldReport, FoldResult

__all__ = ["FoldReport", "FoldResult", "fold"]
