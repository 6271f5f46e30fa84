"""OpenVINO as a backend."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from deploynorm.dtypes import numpy_dtype
from deploynorm.errors import ModelError
from deploynorm.onnx_file import OnnxFile, OnnxSource
from deploynorm.openvino import import_openvino, openvino_extension
from deploynorm.run.base import Runner, check_feeds, closed_error

_FRAME = re.compile(r"Exception from |Check '|FrontEnd API failed|Model wasn't fully|Summary:|To facilitate")
"""Lines of OpenVINO's errors that say nothing of the model."""


class OpenVinoRunner(Runner):
    """Runs an ONNX model in OpenVINO on the CPU, in float32 also where the processor has a coarser type.

    Our custom nodes are read by `deploynorm.openvino_extension`; their bodies are not.

    Args:
        model: A file, with its external data beside it, or a model in memory; see OnnxFile.read.
        threads: Threads of an inference; None leaves it to OpenVINO.
    """

    name = "openvino (cpu)"

    def __init__(self, model: OnnxSource, *, threads: int | None = None) -> None:
        self._openvino = import_openvino()
        file = OnnxFile.read(model)
        self._where, self.inputs, self.output_names = file.where, file.inputs, file.output_names
        file.check_external_data()
        core = self._openvino.Core()
        core.add_extension(openvino_extension())
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            read = core.read_model(file.proto.SerializeToString() if file.path is None else file.path)
            self._request: Any = core.compile_model(read, "CPU", options).create_infer_request()
        except Exception as error:  # OpenVINO has RuntimeError and its own kinds of it
            raise ModelError(self._where, f"OpenVINO refuses the model: {_reason(error)}") from error

    @classmethod
    def check_available(cls) -> None:
        import_openvino()

    def infer(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        if self._request is None:
            raise closed_error("OpenVinoRunner.infer")
        check_feeds("OpenVinoRunner.infer", self.inputs, feeds)
        try:
            self._request.infer({name: self._tensor(array) for name, array in feeds.items()})
            outputs = [self._request.get_output_tensor(position) for position in range(len(self.output_names))]
        except Exception as error:
            got = {name: array.shape for name, array in feeds.items()}
            raise ModelError(self._where, f"OpenVINO failed: {_reason(error)}", got=got) from error
        return dict(zip(self.output_names, map(self._array, outputs), strict=True))

    def close(self) -> None:
        self._request = None

    def _tensor(self, array: npt.NDArray[Any]) -> Any:
        array = np.ascontiguousarray(array).reshape(array.shape)
        if array.dtype.name == "bfloat16":  # which OpenVINO's binding does not know
            return self._openvino.Tensor(array.view(np.uint16), array.shape, self._openvino.Type.bf16)
        return self._openvino.Tensor(array)

    def _array(self, tensor: Any) -> npt.NDArray[Any]:
        array = np.array(tensor.data)  # a copy: the tensor is that of the next call
        return array.view(numpy_dtype("bfloat16")) if tensor.element_type == self._openvino.Type.bf16 else array


def _reason(error: Exception) -> str:
    """What OpenVINO says of the model, in one line: without the places in its sources, and its headings."""
    lines = [line.strip().removeprefix("-- ") for line in str(error).partition("At:")[0].splitlines()]
    return " ".join(line for line in lines if line and not _FRAME.match(line)) or type(error).__name__
