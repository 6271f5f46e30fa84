"""Running a network on any backend through one protocol; a backend is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from deploynorm.errors import BackendError, InputError
from deploynorm.run.base import Runner

__all__ = ["Runner", "open_runner", "available"]


def open_runner(
    model: str | Path,
    backend: Literal["onnxruntime", "reference", "half", "tensorrt"] | None = None,
    *,
    providers: Sequence[str] = ("cpu",),
    plugins: Sequence[Path] | None = None,
    threads: int | None = None,
    trust_engine: bool = False,
) -> Runner:
    """A runner of an ONNX file, or of a TensorRT engine.

    Args:
        model: The file, with its external data beside it.
        backend: "onnxruntime"; "half", which rounds every half tensor as a GPU does; or "reference" for ONNX's own
            evaluator in NumPy. None takes "half" for a half graph on the CPU without plugins, since ONNX Runtime
            computes it in float32 there, "tensorrt" for a file named .engine or .plan, and "onnxruntime" for all else.
        providers: For onnxruntime: cpu, cuda, tensorrt, the preferred first.
        plugins: For onnxruntime and tensorrt: libraries instead of ours; empty for the stock runtime.
        threads: For onnxruntime: threads within an operator.
        trust_engine: For tensorrt: lets an engine that holds code for the processor run it.

    Raises:
        InputError: An unknown backend or provider, or an option that the backend does not have.
        BackendError: What the backend needs is missing or too old.
        ModelError: The file cannot be read or run.
    """
    if backend == "tensorrt" or (backend is None and Path(model).suffix in (".engine", ".plan")):
        if tuple(providers) != ("cpu",) or threads is not None:
            raise InputError("open_runner", "the tensorrt backend takes no providers or threads", fix="leave them out")
        from deploynorm.run.tensorrt import TensorRTRunner

        return TensorRTRunner(model, plugins=plugins, trust_engine=trust_engine)
    if trust_engine:
        raise InputError("open_runner", "trust_engine is for engines", got=model, fix="leave it out")
    from deploynorm.graph import half_type

    precision = half_type(model)
    plain = tuple(providers) == ("cpu",) and plugins is None
    if backend is None:
        backend = "half" if precision is not None and plain else "onnxruntime"
    runner: Runner
    if backend == "onnxruntime":
        from deploynorm.run.onnxruntime import OnnxRuntimeRunner

        runner = OnnxRuntimeRunner(model, providers=providers, plugins=plugins, threads=threads)
    elif backend not in ("half", "reference"):
        known = "'onnxruntime', 'half', 'reference' or 'tensorrt'"
        raise InputError("open_runner", "unknown backend", got=repr(backend), expected=known)
    elif not plain or (backend == "reference" and threads is not None):
        options = "providers, plugins or threads" if backend == "reference" else "providers or plugins"
        raise InputError(
            "open_runner", f"the {backend} backend takes no {options}", fix="leave them out, or use onnxruntime"
        )
    elif backend == "half":
        from deploynorm.run.half import HalfRunner

        runner = HalfRunner(model, threads=threads)
    else:
        from deploynorm.run.reference import ReferenceRunner

        runner = ReferenceRunner(model)
    runner.precision = precision
    return runner


def available() -> dict[str, str | None]:
    """Each backend, with the reason why it cannot be used here, or None."""
    from deploynorm.ort import import_onnxruntime

    reasons: dict[str, str | None] = {"eager": None, "reference": None, "half": None, "onnxruntime": None}
    try:
        import_onnxruntime()
    except BackendError as error:
        reasons["onnxruntime"] = reasons["half"] = str(error)
    reasons["tensorrt"] = _why_not_tensorrt()
    return reasons


def _why_not_tensorrt() -> str | None:
    from deploynorm.trt import gpu_here, import_tensorrt

    try:
        found = import_tensorrt()
    except BackendError as error:
        return str(error)
    return None if gpu_here() is not None else f"{found.name} is here, but PyTorch finds no GPU"
