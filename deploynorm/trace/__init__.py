"""One traced network, and all that is asked of it."""

from deploynorm.trace.tracing import (
    Dynamic,
    NarrowedAxis,
    first_line,
    inference_copy,
    narrowed_axes,
    quiet,
    sizes_taken,
    trace,
)

__all__ = ["Dynamic", "NarrowedAxis", "first_line", "inference_copy", "narrowed_axes", "quiet", "sizes_taken", "trace"]
