"""From a file to the runner that suits it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploynorm.errors import InputError
from deploynorm.inputs import with_sizes
from deploynorm.packages import load
from deploynorm.run.backends import BACKENDS, ENGINE_SUFFIXES
from deploynorm.run.base import Runner

if TYPE_CHECKING:
    from deploynorm.onnx_file import OnnxFile

__all__ = ["open_runner"]


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
        plugins: For onnxruntime and tensorrt: libraries instead of ours; empty for the stock runtime.
        threads: For onnxruntime and half: threads within an operator.
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
        return _make(backend, model, given)
    file: OnnxFile = load("deploynorm.onnx_file.OnnxFile").read(model)
    if backend is None:
        backend = "half" if file.half_type and not {"providers", "plugins"} & set(given) else "onnxruntime"
    runner = _make(backend, file, given)
    runner.precision = file.half_type
    runner.inputs = with_sizes(runner.inputs, file.sizes)
    return runner


def _make(backend: str, model: object, options: dict[str, Any]) -> Runner:
    runner: Any = BACKENDS[backend].load()
    made: Runner = runner(model, **options)
    return made
