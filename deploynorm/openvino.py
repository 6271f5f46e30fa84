"""OpenVINO: importing it, and our operators as operators of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploynorm.contract import DOMAIN, OPERATORS, RESIDUAL
from deploynorm.errors import BackendError, ModelError


def import_openvino() -> Any:
    """The module openvino, its reader of ONNX with it; BackendError where it cannot be imported."""
    try:
        import openvino.frontend.onnx
    except ImportError as error:
        fix = "pip install 'deploynorm[openvino]'"
        raise BackendError("openvino", f"the package cannot be imported: {error}", fix=fix) from error
    return openvino


def openvino_extension() -> list[Any]:
    """What OpenVINO needs to read our custom nodes: it takes no function bodies of ONNX.

        core = openvino.Core()
        core.add_extension(deploynorm.openvino_extension())
        compiled = core.compile_model("model.onnx", "CPU")

    Each FRN becomes operators of OpenVINO, which it fuses by itself: X of rank 2 to 5, in any float type, computed in
    float32 (float64 for float64) and rounded once, with or without residual and threshold. Files with and without
    bodies are read. Also for `openvino.convert_model(path, extension=...)`.

    Returns:
        One openvino.frontend.onnx.ConversionExtension for each of our operators.

    Raises:
        BackendError: The package openvino is not installed.
    """
    openvino = import_openvino()
    extension = openvino.frontend.onnx.ConversionExtension
    return [extension(op_type, DOMAIN, _converter(openvino, op_type)) for op_type in OPERATORS]


def _converter(openvino: Any, op_type: str) -> Any:
    """The function by which OpenVINO translates a node."""
    names, kinds, ops = OPERATORS[op_type], openvino.Type, openvino.opset13

    def axes(*numbers: int) -> Any:
        return ops.constant(np.array(numbers, np.int64))

    def convert(node: Any) -> list[Any]:
        x, *parameters = (node.get_input(position) for position in range(len(names)))
        given = x.get_element_type()
        compute = kinds.f64 if given == kinds.f64 else kinds.f32

        def widened(tensor: Any) -> Any:
            return tensor if given == compute else ops.convert(tensor, compute.get_type_name())

        shape = x.get_partial_shape()
        if shape.rank.is_dynamic:
            raise ModelError(op_type, "the rank of X is not known", fix="export it with a shape")
        rank = shape.rank.get_length()
        # (N, C, L, 1) for (N, C, L): behind a mean over (N, C, L), OpenVINO 2026.4 adds the epsilons of channels to
        # samples instead.
        added = axes(3) if rank == 3 else None
        inner = rank if added is None else 4

        def prepared(tensor: Any) -> Any:
            wide = widened(tensor)
            return wide if added is None else ops.unsqueeze(wide, added)

        columns = axes(0, *range(2, inner))  # of (1, C, 1, ...)
        gamma, beta, tau, eps = (ops.unsqueeze(parameter, columns) for parameter in parameters[:4])
        v = prepared(x)
        square = ops.multiply(v, v)
        mean = ops.reduce_mean(square, axes(*range(2, inner)), keep_dims=True) if inner > 2 else square
        y = ops.add(ops.multiply(v, ops.divide(gamma, ops.sqrt(ops.add(mean, eps)))), beta)
        if RESIDUAL in names:
            y = ops.add(y, prepared(parameters[4]))
        # No maximum, which would take the threshold for a NaN.
        y = ops.select(ops.less(y, tau), tau, y)
        y = y if added is None else ops.squeeze(y, added)
        return [(y if given == compute else ops.convert(y, given.get_type_name())).output(0)]

    return convert
