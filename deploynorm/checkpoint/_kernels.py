"""Operators of an archive whose kernels trust their arguments, put into forms that do not.

1. `_native_batch_norm_legit_no_training` reads as many parameters as x has channels, however many there are, which
   `batch_norm` compares first.
2. The least integer divided by -1 ends the process. It is -x divided by 1, which wraps.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from deploynorm.errors import ModelError

_aten: Any = torch.ops.aten
_BATCH_NORM = _aten._native_batch_norm_legit_no_training.default
_ROUNDED = [_aten.div, _aten.divide, _aten.div_, _aten.divide_]
_DIVISIONS = [torch.ops.prims.div.default, *(each for of in _ROUNDED for each in (of.Tensor_mode, of.Scalar_mode))]


def guard_kernels(module: torch.nn.Module, where: str) -> None:
    """Changes the graphs of a program, those of its branches too.

    Raises:
        ModelError: An operator has no such form.
    """
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        for node in list(part.graph.nodes):
            if node.target is _BATCH_NORM:
                _check_batch_norm(node, where)
            elif node.target in _DIVISIONS and _arguments(node).get("rounding_mode", "trunc") == "trunc":
                _check_division(node, where)
        part.recompile()


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _check_batch_norm(node: fx.Node, where: str) -> None:
    given = _arguments(node)
    tensors = [given[name] for name in ("input", "weight", "bias", "running_mean", "running_var")]
    with node.graph.inserting_before(node):
        y = node.graph.call_function(
            _aten.batch_norm.default, (*tensors, False, given["momentum"], given["eps"], False)
        )
    for user in list(node.users):
        if user.users and (user.target is not operator.getitem or user.args[1] != 0):
            raise ModelError(where, f"node {node.name} gives more than its result, which no network reads")
        user.replace_all_uses_with(y)
        node.graph.erase_node(user)
        if user.target is operator.getitem and user.args[1] == 0:
            y.meta = dict(user.meta)
            y.name = user.name  # by which the program lists its outputs
    node.graph.erase_node(node)


def _check_division(node: fx.Node, where: str) -> None:
    x, y = node.args[:2]
    call = node.graph.call_function
    if str(node.target).partition(".")[2].partition(".")[0].endswith("_"):
        raise ModelError(where, f"node {node.name} divides in place, and truncates", fix="divide into a new tensor")
    with node.graph.inserting_before(node):
        if not isinstance(y, fx.Node):
            if y == -1:
                node.args = (call(_aten.neg.default, (x,)), 1, *node.args[2:])
        elif isinstance(y.meta.get("val"), torch.Tensor):
            minus = call(_aten.eq.Scalar, (y, -1))
            negated = call(_aten.where.self, (minus, call(_aten.neg.default, (x,)), x))
            node.args = (negated, call(_aten.masked_fill.Scalar, (y, minus, 1)), *node.args[2:])
        else:
            raise ModelError(where, f"node {node.name} divides by a size that the archive computes, and truncates")
