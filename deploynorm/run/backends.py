"""The backends, and the runner that suits a file. A new backend takes one row here and one file with its runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from deploynorm.errors import BackendError, InputError
from deploynorm.inputs import with_sizes
from deploynorm.packages import load
from deploynorm.run.base import Runner

if TYPE_CHECKING:
    from deploynorm.onnx_file import OnnxFile


class Backend(NamedTuple):
    """One way to run a network."""

    module: str  # where its runner is; imported when it is first asked for
    runner: str  # the class, a `Runner`
    runs: Literal["onnx", "engine", "network"]  # what its runner is made of: a file, or a network in PyTorch
    options: tuple[str, ...]  # those of `open_runner` that it takes
    summary: str  # what it is, for --help

    def load(self) -> Any:
        """The class of its runner, a type[Runner]; BackendError if a package that it imports is not installed."""
        return load(f"{self.module}.{self.runner}")


BACKENDS: Final[Mapping[str, Backend]] = {
    "onnxruntime": Backend(
        "deploynorm.run.onnxruntime", "OnnxRuntimeRunner", "onnx", ("providers", "plugins", "threads"), "ONNX Runtime"
    ),
    "half": Backend(
        "deploynorm.run.half", "HalfRunner", "onnx", ("threads",), "every half tensor rounded, as on a GPU"
    ),
    "reference": Backend("deploynorm.run.reference", "ReferenceRunner", "onnx", (), "ONNX's own evaluator, slow"),
    "openvino": Backend("deploynorm.run.openvino", "OpenVinoRunner", "onnx", ("threads",), "OpenVINO on the CPU"),
    "ncnn": Backend("deploynorm.run.ncnn", "NcnnRunner", "onnx", ("threads",), "ncnn on the CPU, image by image"),
    "mnn": Backend("deploynorm.run.mnn", "MnnRunner", "onnx", ("threads",), "MNN on the CPU"),
    "tensorrt": Backend(
        "deploynorm.run.tensorrt", "TensorRTRunner", "engine", ("plugins", "trust_engine"), "a TensorRT engine"
    ),
    "eager": Backend("deploynorm.run.eager", "EagerRunner", "network", (), "PyTorch itself"),
}

ONNX_BACKENDS: Final = tuple(name for name, backend in BACKENDS.items() if backend.runs == "onnx")
"""Those that run an ONNX file."""

ENGINE_SUFFIXES: Final = (".engine", ".plan")


def available() -> dict[str, str | None]:
    """Each backend, with the reason why it cannot be used here, or None."""
    reasons: dict[str, str | None] = {}
    for name, backend in BACKENDS.items():
        try:
            backend.load().check_available()
            reasons[name] = None
        except BackendError as error:
            reasons[name] = str(error)
    return reasons


def open_runner(
    model: str | Path | OnnxFile,
    backend: str | None = None,
    *,
    providers: Sequence[str] = ("cpu",),
    plugins: Sequence[Path] | None = None,
    threads: int | None = None,
    trust_engine: bool = False,
) -> Runner:
    """A runner of an ONNX file, or of a TensorRT engine.

    Args:
        model: The file, with its external data beside it; or an ONNX file that OnnxFile.read has read.
        backend: One of `BACKENDS` that runs files. None takes "tensorrt" for a file named .engine or .plan; "half" for
            an ONNX file in half precision on the CPU without plugins, since ONNX Runtime computes it in float32 there;
            and "onnxruntime" for all else.
        providers: For onnxruntime: cpu, cuda, tensorrt, the preferred first.
        plugins: For onnxruntime and tensorrt: libraries instead of ours, which is used where it is built; empty for the
            stock runtime, which runs the function body of our operator.
        threads: Of an operator, for all backends on a CPU but reference; None leaves it to the runtime.
        trust_engine: For tensorrt: lets an engine that holds code for the processor run it.

    Raises:
        InputError: An unknown backend or provider, or an option that the backend does not have.
        BackendError: What the backend needs is missing or too old.
        ModelError: The file cannot be read or run.
    """
    options: dict[str, Any] = {} if tuple(providers) == ("cpu",) else {"providers": tuple(providers)}
    options |= {"plugins": plugins, "threads": threads, "trust_engine": trust_engine or None}
    given = {name: value for name, value in options.items() if value is not None}
    files = [name for name, row in BACKENDS.items() if row.runs != "network"]
    if backend is not None and backend not in files:
        raise InputError("open_runner", "unknown backend", got=repr(backend), expected=", ".join(map(repr, files)))
    if backend is None and isinstance(model, str | Path) and Path(model).suffix in ENGINE_SUFFIXES:
        backend = "tensorrt"
    # No other backend of ONNX files takes an option that onnxruntime does not take.
    refused = [name for name in given if name not in BACKENDS[backend or "onnxruntime"].options]
    if refused:
        called = f"the {backend or 'onnxruntime'} backend"
        raise InputError("open_runner", f"{called} takes no {' and no '.join(refused)}", fix="leave it out")
    if backend is not None and BACKENDS[backend].runs == "engine":
        engine: Runner = BACKENDS[backend].load()(model, **given)
        return engine
    file: OnnxFile = load("deploynorm.onnx_file.OnnxFile").read(model)
    file.check_external_data()
    if backend is None:
        backend = "half" if file.half_type and not {"providers", "plugins"} & set(given) else "onnxruntime"
    runner: Runner = BACKENDS[backend].load()(file, **given)
    runner.precision = file.half_type
    runner.inputs = with_sizes(runner.inputs, file.sizes)
    runner.row_groups = file.row_groups
    return runner
