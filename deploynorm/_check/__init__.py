"""Whether two forms of a network compute the same numbers: two runners here, a network and its files in `parity`."""

from deploynorm._check.comparison import DEFAULT_TOLERANCE, Comparison, Report, Tolerance, check, parity_table

__all__ = ["DEFAULT_TOLERANCE", "Comparison", "Report", "Tolerance", "check", "parity_table"]
