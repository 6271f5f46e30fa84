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
    backend: Literal["onnxruntime", "reference"] = "onnxruntime",
    *,
    providers: Sequence[str] = ("cpu",),
    plugins: Sequence[Path] | None = None,
    threads: int | None = None,
) -> Runner:
    """A runner of an ONNX file.

    Args:
        model: The file, with its external data beside it.
        backend: "onnxruntime", or "reference" for ONNX's own evaluator in NumPy.
        providers: For onnxruntime: cpu, cuda, tensorrt, the preferred first.
        plugins: For onnxruntime: libraries of custom operators instead of ours; empty for the stock runtime.
        threads: For onnxruntime: threads within an operator.

    Raises:
        InputError: An unknown backend or provider, or an option that the backend does not have.
        BackendError: What the backend needs is missing or too old.
        ModelError: The file cannot be read or run.
    """
    if backend == "onnxruntime":
        from deploynorm.run.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(model, providers=providers, plugins=plugins, threads=threads)
    if backend == "reference":
        if tuple(providers) != ("cpu",) or plugins is not None or threads is not None:
            raise InputError(
                "open_runner",
                "the reference backend takes no providers, plugins or threads",
                fix="leave them out, or use onnxruntime",
            )
        from deploynorm.run.reference import ReferenceRunner

        return ReferenceRunner(model)
    raise InputError("open_runner", "unknown backend", got=repr(backend), expected="'onnxruntime' or 'reference'")


def available() -> dict[str, str | None]:
    """Each backend, with the reason why it cannot be used here, or None."""
    from deploynorm.ort import import_onnxruntime

    reasons: dict[str, str | None] = {"eager": None, "reference": None, "onnxruntime": None}
    try:
        import_onnxruntime()
    except BackendError as error:
        reasons["onnxruntime"] = str(error)
    return reasons
