"""ONNX Runtime as a backend."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from deploynorm.contract import DOMAIN, OP_TYPE
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.run.base import Runner, check_feeds, closed_error

__all__ = ["PROVIDERS", "OnnxRuntimeRunner", "import_onnxruntime"]

PROVIDERS: Final[Mapping[str, tuple[str, dict[str, str]]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # TF32 keeps 10 bits of a float32 product: no float32 parity could be judged.
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
    "tensorrt": ("TensorrtExecutionProvider", {}),
}
"""The names that `OnnxRuntimeRunner` takes, with ONNX Runtime's own names and the options it is given."""

_INSTALL_CPU = "pip install 'deploynorm[cpu]'"
_INSTALL_GPU = "pip uninstall onnxruntime, then pip install 'deploynorm[gpu]'"

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, without importing onnx


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX model in one session of ONNX Runtime.

    Args:
        model: A file, with its external data beside it, or the bytes of a model.
        providers: Names of `PROVIDERS`, the preferred first. ONNX Runtime itself puts nodes that none of them takes
            on the CPU. It has no switch for TF32 under TensorRT: set NVIDIA_TF32_OVERRIDE=0 in the environment.
        plugins: Libraries of custom operators to register.
        threads: Threads within an operator; None leaves it to ONNX Runtime.
        optimize: False runs the graph as it is written.

    Raises:
        InputError: An unknown provider.
        BackendError: onnxruntime, a provider or a plugin library is missing, cannot be loaded or is too old.
        ModelError: The model cannot be read or run.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        providers: Sequence[str] = ("cpu",),
        plugins: Sequence[Path] = (),
        threads: int | None = None,
        optimize: bool = True,
    ) -> None:
        ort = import_onnxruntime()
        self._where = "model (bytes)" if isinstance(model, bytes) else str(model)
        if not isinstance(model, bytes) and not Path(model).is_file():
            raise ModelError(self._where, "no such file", fix="check the path")
        wanted = [_provider(name, ort) for name in providers]
        self._ort = ort
        self.name = f"onnxruntime ({', '.join(providers)})"
        options = ort.SessionOptions()
        # Fatal errors alone: everything else reaches the user once, in our words.
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        for library in plugins:
            _register(options, Path(library))
        source = model if isinstance(model, bytes) else str(model)
        try:
            # Its fallback would run another provider than the one asked for, and tell that on stdout alone.
            session = ort.InferenceSession(source, options, providers=wanted, enable_fallback=0)
        except Exception as error:
            raise _explain(self._where, error, ort.__version__) from error
        lost = [name for name in providers if PROVIDERS[name][0] not in session.get_providers()]
        if lost:
            raise BackendError(
                self.name,
                f"the provider {lost[0]!r} failed to start, and ONNX Runtime would have used another",
                got=session.get_providers(),
                expected=[PROVIDERS[name][0] for name in providers],
                fix="install the driver, CUDA, cuDNN and TensorRT that this onnxruntime was built for",
            )
        self.inputs = tuple(_spec(self._where, value) for value in session.get_inputs())
        outputs = [_spec(self._where, value) for value in session.get_outputs()]
        self.output_names = tuple(spec.name for spec in outputs)
        self._has_bfloat16 = any(spec.dtype == "bfloat16" for spec in (*self.inputs, *outputs))
        self._session = session

    def infer(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        if self._session is None:
            raise closed_error("OnnxRuntimeRunner.infer")
        check_feeds("OnnxRuntimeRunner.infer", self.inputs, feeds)
        try:
            results = self._run_values(feeds) if self._has_bfloat16 else self._session.run(None, dict(feeds))
        except Exception as error:
            raise _explain(self._where, error, self._ort.__version__) from error
        return dict(zip(self.output_names, results, strict=True))

    def close(self) -> None:
        self._session = None

    def _run_values(self, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """As session.run, which has no bfloat16 because NumPy itself has none."""
        value = self._ort.OrtValue
        arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in feeds.items()}
        results = self._session.run_with_ort_values(
            None,
            {
                name: value.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
                if array.dtype == ml_dtypes.bfloat16
                else value.ortvalue_from_numpy(array)
                for name, array in arrays.items()
            },
        )
        return [_bfloat16_array(r) if r.data_type() == "tensor(bfloat16)" else r.numpy() for r in results]


def import_onnxruntime() -> Any:
    """The module onnxruntime.

    Raises:
        BackendError: It is not installed, or its own libraries are missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("onnxruntime", f"the package cannot be imported: {error}", fix=_INSTALL_CPU) from error
    return onnxruntime


def _provider(name: str, ort: Any) -> tuple[str, dict[str, str]]:
    if name not in PROVIDERS:
        raise InputError("OnnxRuntimeRunner", "unknown provider", got=repr(name), expected=" or ".join(PROVIDERS))
    present = ort.get_available_providers()
    if PROVIDERS[name][0] not in present:
        raise BackendError(
            "OnnxRuntimeRunner",
            f"onnxruntime {ort.__version__} was built without the provider {name!r}",
            got=[known for known, (full, _) in PROVIDERS.items() if full in present],
            expected=name,
            fix=_INSTALL_CPU if name == "cpu" else _INSTALL_GPU,
        )
    return PROVIDERS[name]


def _register(options: Any, library: Path) -> None:
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise BackendError(
            str(library),
            f"ONNX Runtime cannot load this plugin library: {_plain(error)}",
            fix="pass each library once, built for this machine and this onnxruntime",
        ) from error


def _spec(where: str, value: Any) -> TensorSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", value.type)
    if match is None or match[1] == "string":
        raise ModelError(where, f"{value.name!r} is not a numeric tensor", got=value.type)
    dtype = {"float": "float32", "double": "float64"}.get(match[1], match[1])
    shape = ("?" if size is None else size for size in value.shape)
    return TensorSpec(value.name, tuple(shape), dtype)


def _bfloat16_array(value: Any) -> npt.NDArray[Any]:
    shape = tuple(value.shape())
    memory = (ctypes.c_uint16 * prod(shape)).from_address(value.data_ptr())
    # np.array copies: the memory goes with the value.
    array: npt.NDArray[Any] = np.array(memory, np.uint16).view(ml_dtypes.bfloat16)
    return array.reshape(shape)


class _Known(NamedTuple):
    """An error of ONNX Runtime that we foresee, known by its text; `{version}` is filled in."""

    text: str
    kind: type[DeployNormError]
    problem: str
    fix: str


_KNOWN: Final = (
    _Known(
        rf"{DOMAIN}:{OP_TYPE}\S* is not a registered function/op",
        ModelError,
        f"holds {DOMAIN}::{OP_TYPE} without its function body, and no plugin library was given",
        "export again without --no-function, or pass the plugin library with --plugins",
    ),
    _Known(
        "is not a registered function/op|No Op registered for",
        ModelError,
        "holds an operator that onnxruntime {version} does not know",
        "pass the library that brings it with --plugins, or a newer onnxruntime",
    ),
    _Known(
        "Unsupported model IR version|is under development and support for this is limited|unknown model IR version",
        BackendError,
        "is newer than onnxruntime {version} reads",
        "upgrade onnxruntime, or export with a lower --opset",
    ),
    _Known(
        "INVALID_PROTOBUF|No graph was found in the protobuf",
        ModelError,
        "not an ONNX file, or cut short",
        "export it again",
    ),
    _Known(
        "[Ee]xternal data",
        ModelError,
        "its external data cannot be read",
        "keep the data file beside the model, and pass the model as a path",
    ),
    _Known(
        "Could not find an implementation for",
        BackendError,
        "holds an operator that onnxruntime {version} lacks for this type and provider",
        "run it on another provider, or export it in float32",
    ),
    _Known(
        r"Type 'tensor\(\w+\)' of input parameter .* is invalid",
        ModelError,
        "holds an operator of a type that onnxruntime {version} or the plugin library does not take",
        "export it in float32, or build the plugin library for that type",
    ),
)


def _explain(where: str, error: Exception, version: str) -> DeployNormError:
    """The error of ONNX Runtime as one of ours."""
    text = _plain(error)
    for known in _KNOWN:
        if re.search(known.text, str(error)):
            return known.kind(where, known.problem.format(version=version), got=text, fix=known.fix)
    return ModelError(where, f"onnxruntime {version} cannot run the model", got=text)


def _plain(error: Exception) -> str:
    """ONNX Runtime's text without its codes, the path, its source lines and its line breaks."""
    text = re.sub(
        r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:)?", "", " ".join(str(error).split())
    )
    return re.sub(r"/onnxruntime_src/.*?\) (?=[A-Z])", "", text).rstrip(". ")
