"""ONNX's own reference evaluator, in NumPy: slow, and without a compiled kernel between the file and its numbers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from deploynorm.contract import DOMAIN, OP_TYPE
from deploynorm.errors import ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.reference import filter_response_norm
from deploynorm.run.base import Runner, check_feeds, closed_error

__all__ = ["ReferenceRunner"]


class ReferenceRunner(Runner):
    """Runs an ONNX model with onnx.reference.ReferenceEvaluator.

    Args:
        model: A file, with its external data beside it, or a model in memory.
        use_function: Whether the operator of deploynorm runs as the function that the model brings along, where it
            brings one, in the types of that function (half arithmetic is half arithmetic). False runs
            deploynorm.reference instead.

    Raises:
        ModelError: The file cannot be read, or holds what the evaluator cannot run.
    """

    name = "reference"

    def __init__(self, model: str | Path | onnx.ModelProto, *, use_function: bool = True) -> None:
        self._where = "ReferenceRunner" if isinstance(model, onnx.ModelProto) else str(model)
        proto = model if isinstance(model, onnx.ModelProto) else _read(Path(model))
        has_function = any((f.domain, f.name) == (DOMAIN, OP_TYPE) for f in proto.functions)
        self.inputs = _input_specs(self._where, proto.graph)
        self.output_names = tuple(output.name for output in proto.graph.output)
        # An operator in new_ops wins over a function of the model.
        new_ops = [] if use_function and has_function else [_FilterResponseNorm]
        try:
            self._evaluator: ReferenceEvaluator | None = ReferenceEvaluator(proto, new_ops=new_ops)
        except Exception as error:
            raise ModelError(self._where, f"ONNX's reference evaluator refuses the model: {error}") from error

    def infer(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        if self._evaluator is None:
            raise closed_error("ReferenceRunner.infer")
        check_feeds("ReferenceRunner.infer", self.inputs, feeds)
        try:
            with warnings.catch_warnings():
                # NumPy warns of inf, NaN and means of nothing; here they are the answer.
                warnings.simplefilter("ignore", RuntimeWarning)
                results = self._evaluator.run(None, dict(feeds))
        except Exception as error:
            raise ModelError(
                self._where,
                f"ONNX's reference evaluator failed with {type(error).__name__}: {error}",
                got={name: value.shape for name, value in feeds.items()},
            ) from error
        return {name: np.array(value) for name, value in zip(self.output_names, results, strict=True)}

    def close(self) -> None:
        self._evaluator = None


def _run(self: OpRun, *inputs: npt.NDArray[Any], **attributes: object) -> tuple[npt.NDArray[Any]]:
    return (filter_response_norm(*inputs),)


# The evaluator finds an operator by the name of its class, and names stand in contract.py alone.
_FilterResponseNorm: type[OpRun] = type(OP_TYPE, (OpRun,), {"op_domain": DOMAIN, "_run": _run})


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(str(path), "no such file", fix="check the path")
    try:
        model = onnx.load(path)
    except (onnx.checker.ValidationError, OSError) as error:
        raise ModelError(
            str(path), f"its external data cannot be read: {error}", fix="keep the data file beside the model"
        ) from error
    except Exception as error:
        raise ModelError(str(path), f"not an ONNX file, or cut short: {error}", fix="export it again") from error
    if not model.HasField("graph"):
        raise ModelError(str(path), "not an ONNX file, or cut short", fix="export it again")
    return model


def _input_specs(where: str, graph: onnx.GraphProto) -> tuple[TensorSpec, ...]:
    constants = {tensor.name for tensor in graph.initializer}
    return tuple(_input_spec(where, value) for value in graph.input if value.name not in constants)


def _input_spec(where: str, value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or tensor.elem_type == onnx.TensorProto.STRING:
        raise ModelError(
            where,
            f"input {value.name!r} is not a numeric tensor of known rank",
            fix="give it a type and shape in the graph",
        )
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    return TensorSpec(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name)
