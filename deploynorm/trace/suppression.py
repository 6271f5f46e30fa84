"""Non-maximum suppression of several classes, as torchvision's detectors call it, in a form that a trace takes.

torchvision.ops.batched_nms chooses between two ways of computing one result by the number of boxes, which no trace
knows. While a network is traced it is an operator of its own here, which export writes as NonMaxSuppression.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deploynorm.contract import DOMAIN

OPERATOR = "batched_nms"
"""Its name under the torch.library namespace `DOMAIN`; no ONNX file has it."""
_MODULE = "torchvision.ops.boxes"


@torch.library.custom_op(f"{DOMAIN}::{OPERATOR}", mutates_args=())
def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that are kept, the highest score first; see torchvision.ops.batched_nms.

    boxes (N, 4) as x1, y1, x2, y2; scores (N); idxs (N) the class of each.
    """
    module: Any = sys.modules[_MODULE]
    own = module.batched_nms
    kept: Tensor = getattr(own, "__wrapped__", own)(boxes, scores, idxs, iou_threshold)
    return kept


@batched_nms.register_fake
def _(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@contextmanager
def suppression_as_operator() -> Iterator[None]:
    """Lets torchvision's networks call the operator, where torchvision is imported."""
    module: Any = sys.modules.get(_MODULE)
    if module is None:
        yield
        return
    own = module.batched_nms

    @functools.wraps(own)
    def replaced(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        kept: Tensor = batched_nms(boxes, scores, idxs, float(iou_threshold))
        return kept

    module.batched_nms = replaced
    try:
        yield
    finally:
        module.batched_nms = own
