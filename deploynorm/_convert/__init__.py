"""The checked pipeline in one call: fold, export, check."""

from deploynorm._convert.conversion import Conversion, convert
from deploynorm._convert.folding import Folding, fold_checked

__all__ = ["Conversion", "Folding", "convert", "fold_checked"]
