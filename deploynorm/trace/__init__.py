"""One traced network, and all that is asked of it."""

from deploynorm.trace.branches import branches
from deploynorm.trace.copies import copied, disposable_copy, inference_copy, is_archive, repeats, unwrapped
from deploynorm.trace.examples import Arguments, ExampleInputs, Examples, Forward, check_network
from deploynorm.trace.outputs import alike, tensors_of
from deploynorm.trace.reader import LINEAR_OPERATORS, TraceReader, aten_operators, has_hooks, operator_name, walk
from deploynorm.trace.sizes import Sizes, axis_letter, find_sizes
from deploynorm.trace.tracing import Dynamic, doubled, dynamic_places, narrowed_axes, trace

__all__ = [
    "LINEAR_OPERATORS",
    "Arguments",
    "Dynamic",
    "ExampleInputs",
    "Examples",
    "Forward",
    "Sizes",
    "TraceReader",
    "alike",
    "aten_operators",
    "axis_letter",
    "branches",
    "check_network",
    "copied",
    "disposable_copy",
    "doubled",
    "dynamic_places",
    "find_sizes",
    "has_hooks",
    "inference_copy",
    "is_archive",
    "narrowed_axes",
    "operator_name",
    "tensors_of",
    "trace",
    "repeats",
    "unwrapped",
    "walk",
]
