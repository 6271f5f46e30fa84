"""Non-maximum suppression of several classes as ONNX's NonMaxSuppression."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import opset18

op: Any = opset18  # whose types are those of the decorator's language
_NEVER = float(np.finfo(np.float32).min)
"""Below every score that a network computes, and above the -inf of boxes that are of other classes."""


def translate(boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> Any:
    """The nodes for a call of `deploynorm.trace.suppression.batched_nms`; torch.onnx calls it with symbolic values.

    Each class has a row of scores, in which the boxes of the others are -inf. torchvision moves the boxes of a class to
    where no others are instead, and so rounds their coordinates: with many classes a box of some pixels then overlaps
    with others by up to 1e-3 more or less.
    """
    numbers = op.Cast(idxs, to=7)
    last = op.ReduceMax(op.Concat(numbers, op.Constant(value_ints=[0]), axis=0), keepdims=0)  # of no boxes too
    classes = op.Range(op.Constant(value_int=0), op.Add(last, op.Constant(value_int=1)), op.Constant(value_int=1))
    own = op.Equal(
        op.Unsqueeze(classes, op.Constant(value_ints=[1])), op.Unsqueeze(numbers, op.Constant(value_ints=[0]))
    )
    exact = op.Cast(scores, to=1)
    rows = op.Where(own, exact, op.Constant(value_float=-np.inf))
    found = op.NonMaxSuppression(
        op.Unsqueeze(op.Cast(boxes, to=1), op.Constant(value_ints=[0])),
        op.Unsqueeze(rows, op.Constant(value_ints=[0])),
        op.Size(scores),
        op.Constant(value_float=iou_threshold),
        op.Constant(value_float=_NEVER),
    )
    kept = op.Gather(found, op.Constant(value_int=2), axis=1)
    count = op.Shape(kept)
    kept, _ = op.TopK(kept, count, largest=0)  # of equal scores the first box comes first, as in torchvision
    _, order = op.TopK(op.Gather(exact, kept), count)
    return op.Gather(kept, order)
