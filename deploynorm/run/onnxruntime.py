"""ONNX Runtime as a backend."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deploynorm.contract import METADATA_SIZES
from deploynorm.dtypes import numpy_dtype
from deploynorm.errors import ModelError
from deploynorm.inputs import TensorSpec, read_sizes
from deploynorm.ort import PROVIDERS, explain, import_onnxruntime, quiet_options
from deploynorm.ort import session as open_session
from deploynorm.run.base import Runner, check_feeds, closed_error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deploynorm.onnx_file import OnnxFile

BFLOAT16 = 16
"""onnx.TensorProto.BFLOAT16, without importing onnx: NumPy has no such type."""


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX model in one session of ONNX Runtime.

    Args:
        model: A file, with its external data beside it, the bytes of a model, or what OnnxFile.read has read.
        providers, plugins, threads: As for deploynorm.open_runner, and so are the errors.
        optimize: False runs the graph as it is written.
    """

    def __init__(
        self,
        model: str | Path | bytes | OnnxFile,
        *,
        providers: Sequence[str] = ("cpu",),
        plugins: Sequence[Path] | None = None,
        threads: int | None = None,
        optimize: bool = True,
    ) -> None:
        ort = import_onnxruntime()
        if not isinstance(model, str | Path | bytes):
            model = model.proto.SerializeToString() if model.path is None else model.path
        self._where = "model (bytes)" if isinstance(model, bytes) else str(model)
        self.name = f"onnxruntime ({', '.join(providers)})"
        options = quiet_options()
        if threads is not None:
            options.intra_op_num_threads = threads
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # As every host opens the file: this is what `check` judges.
        session = open_session(model, providers=providers, plugins=plugins, options=options, optimize=False)
        self.inputs = tuple(_spec(self._where, value) for value in session.get_inputs())
        outputs = [_spec(self._where, value) for value in session.get_outputs()]
        self.output_names = tuple(spec.name for spec in outputs)
        self._has_bfloat16 = any(spec.dtype == "bfloat16" for spec in (*self.inputs, *outputs))
        self._limits = read_sizes(session.get_modelmeta().custom_metadata_map.get(METADATA_SIZES)).get("notes")
        self._value = ort.OrtValue
        self._session: Any = session
        self._on_the_cpu = session.get_providers()[0] == PROVIDERS["cpu"][0]

    @classmethod
    def check_available(cls) -> None:
        import_onnxruntime()

    def infer(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        if self._session is None:
            raise closed_error("OnnxRuntimeRunner.infer")
        check_feeds("OnnxRuntimeRunner.infer", self.inputs, feeds)
        with self._explained():
            results = self._run_values(feeds) if self._has_bfloat16 else self._session.run(None, dict(feeds))
        return dict(zip(self.output_names, results, strict=True))

    @property
    def device(self) -> torch.device:
        """Where `run` takes its tensors and gives its own: that of the first provider."""
        import torch  # which `infer` does without

        return torch.device("cpu") if self._on_the_cpu else torch.device("cuda", 0)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As infer, on PyTorch's tensors on `device`, without copying inputs or outputs.

        On a GPU, ONNX Runtime has a stream of its own: the call waits for the work on the caller's current stream, and
        returns when the outputs are there. A tensor that is not contiguous is copied; one on another device is an
        InputError. Outputs lie in memory of ONNX Runtime, which they keep, and the session with it.
        """
        import torch

        from deploynorm.run.bound import bind, check_tensor, outputs_of

        where, device = "OnnxRuntimeRunner.run", self.device
        if self._session is None:
            raise closed_error(where)
        check_feeds(where, self.inputs, feeds, partial(check_tensor, device=device))
        with self._explained():
            binding = self._session.io_binding()
            bound = [bind(binding, name, tensor) for name, tensor in feeds.items()]
            for name in self.output_names:
                binding.bind_output(name, device.type)
            if not self._on_the_cpu:
                torch.cuda.current_stream(device).synchronize()
            self._session.run_with_iobinding(binding)
        del bound  # their memory may be given away from here on
        results = outputs_of(binding, device, self._session)
        return dict(zip(self.output_names, results, strict=True))

    def close(self) -> None:
        self._session = None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of ONNX Runtime inside the block, in our words."""
        try:
            yield
        except Exception as error:
            explained = explain(self._where, error)
            if self._limits and isinstance(explained, ModelError):
                takes = f"feed sizes that the network takes: {'; '.join(map(str, self._limits))}"
                explained = ModelError(explained.where, explained.problem, got=explained.got, fix=takes)
            raise explained from error

    def _run_values(self, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """As session.run, which has no bfloat16 because NumPy itself has none."""
        values = {}
        for name, array in feeds.items():
            array = np.ascontiguousarray(array).reshape(array.shape)
            if array.dtype.name == "bfloat16":
                values[name] = self._value.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
            else:
                values[name] = self._value.ortvalue_from_numpy(array)
        results = self._session.run_with_ort_values(None, values)
        return [_bfloat16_array(r) if r.data_type() == "tensor(bfloat16)" else r.numpy() for r in results]


def element_type(kind: str) -> str | None:
    """Our name of a type that ONNX Runtime calls "tensor(float)" or the like; None for what is no numeric tensor."""
    match = re.fullmatch(r"tensor\((\w+)\)", kind)
    if match is None or match[1] == "string":
        return None
    return {"float": "float32", "double": "float64"}.get(match[1], match[1])


def _spec(where: str, value: Any) -> TensorSpec:
    dtype = element_type(value.type)
    if dtype is None:
        raise ModelError(where, f"{value.name!r} is not a numeric tensor", got=value.type)
    shape = ("?" if size is None else size for size in value.shape)
    return TensorSpec(value.name, tuple(shape), dtype)


def _bfloat16_array(value: Any) -> npt.NDArray[Any]:
    shape = tuple(value.shape())
    memory = (ctypes.c_uint16 * prod(shape)).from_address(value.data_ptr())
    # np.array copies: the memory goes with the value.
    array: npt.NDArray[Any] = np.array(memory, np.uint16).view(numpy_dtype("bfloat16"))
    return array.reshape(shape)
