"""Whether two forms of a network compute the same numbers."""

from deploynorm._check.comparison import DEFAULT_TOLERANCE, Comparison, Report, Tolerance, check
from deploynorm._check.parity import Parity, check_file, check_folded, check_onnx

__all__ = [
    "DEFAULT_TOLERANCE",
    "Comparison",
    "Parity",
    "Report",
    "Tolerance",
    "check",
    "check_file",
    "check_folded",
    "check_onnx",
]
