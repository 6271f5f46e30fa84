"""One traced network, and all that is asked of it."""

from deploynorm.trace.reader import LINEAR_OPERATORS, TraceReader, aten_operators, has_hooks, operator_name, walk
from deploynorm.trace.sizes import Sizes, axis_letter, find_sizes
from deploynorm.trace.tracing import (
    Dynamic,
    argument_names,
    as_inputs,
    doubled,
    dynamic_places,
    first_line,
    inference_copy,
    narrowed_axes,
    quiet,
    trace,
)

__all__ = [
    "LINEAR_OPERATORS",
    "Dynamic",
    "Sizes",
    "TraceReader",
    "argument_names",
    "aten_operators",
    "as_inputs",
    "axis_letter",
    "doubled",
    "dynamic_places",
    "find_sizes",
    "first_line",
    "has_hooks",
    "inference_copy",
    "narrowed_axes",
    "operator_name",
    "quiet",
    "trace",
    "walk",
]
