"""One traced network, and all that is asked of it."""

from deploynorm.trace.sizes import Sizes, axis_letter, find_sizes
from deploynorm.trace.tracing import (
    Dynamic,
    DynamicKind,
    NarrowedAxis,
    argument_names,
    as_inputs,
    dynamic_places,
    first_line,
    inference_copy,
    narrowed_axes,
    quiet,
    trace,
)

__all__ = [
    "Dynamic",
    "DynamicKind",
    "NarrowedAxis",
    "Sizes",
    "argument_names",
    "as_inputs",
    "axis_letter",
    "dynamic_places",
    "find_sizes",
    "first_line",
    "inference_copy",
    "narrowed_axes",
    "quiet",
    "trace",
]
