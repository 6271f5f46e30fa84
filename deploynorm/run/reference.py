"""ONNX's own reference evaluator, in NumPy: slow, and without a compiled kernel between the file and its numbers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from deploynorm.contract import DOMAIN, OPERATORS
from deploynorm.errors import ModelError
from deploynorm.onnx_file import OnnxFile, OnnxSource
from deploynorm.reference import filter_response_norm
from deploynorm.run.base import Runner, check_feeds, closed_error


class ReferenceRunner(Runner):
    """Runs an ONNX model with onnx.reference.ReferenceEvaluator.

    Args:
        model: A file, with its external data beside it, or a model in memory; see OnnxFile.read.
        use_function: Whether our operators run as the function bodies that the model brings, where it brings them, in
            the types of those bodies. False runs deploynorm.reference instead.
    """

    name = "reference"

    def __init__(self, model: OnnxSource, *, use_function: bool = True) -> None:
        file = OnnxFile.read(model)
        self._where, self.inputs, self.output_names = file.where, file.inputs, file.output_names
        # An operator in new_ops wins over a function of the model.
        new_ops = [] if use_function and file.has_body else _OPERATORS
        whole = file.whole_proto()
        try:
            self._evaluator: ReferenceEvaluator | None = ReferenceEvaluator(whole, new_ops=new_ops)
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
            problem = f"ONNX's reference evaluator failed with {type(error).__name__}: {error}"
            raise ModelError(self._where, problem, got={name: value.shape for name, value in feeds.items()}) from error
        return {name: np.array(value) for name, value in zip(self.output_names, results, strict=True)}

    def close(self) -> None:
        self._evaluator = None


def _run(self: OpRun, *inputs: npt.NDArray[Any], **attributes: object) -> tuple[npt.NDArray[Any]]:
    return (filter_response_norm(*inputs),)


# The evaluator finds an operator by the name of its class, and names stand in contract.py only.
_OPERATORS: list[type[OpRun]] = [type(name, (OpRun,), {"op_domain": DOMAIN, "_run": _run}) for name in OPERATORS]
