"""The backends. A new one takes one row here and one file with its runner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

from deploynorm.errors import BackendError
from deploynorm.packages import load
from deploynorm.run.base import Runner

__all__ = ["BACKENDS", "ENGINE_SUFFIXES", "ONNX_BACKENDS", "Backend", "available"]


class Backend(NamedTuple):
    """One way to run a network.

    Attributes:
        module: Where its runner is; imported when it is first asked for.
        runner: The class, a `Runner`.
        runs: What its runner is made of: an ONNX file, an engine file, or a network in PyTorch.
        options: Those of `open_runner` that it takes.
        summary: What it is, for --help.
    """

    module: str
    runner: str
    runs: Literal["onnx", "engine", "network"]
    options: tuple[str, ...]
    summary: str

    def load(self) -> type[Runner]:
        """The class of its runner.

        Raises:
            BackendError: A package that it imports is not installed.
        """
        found: type[Runner] = load(f"{self.module}.{self.runner}")
        return found


BACKENDS: Final[Mapping[str, Backend]] = {
    "onnxruntime": Backend(
        "deploynorm.run.onnxruntime", "OnnxRuntimeRunner", "onnx", ("providers", "plugins", "threads"), "ONNX Runtime"
    ),
    "half": Backend(
        "deploynorm.run.half", "HalfRunner", "onnx", ("threads",), "every half tensor rounded, as on a GPU"
    ),
    "reference": Backend("deploynorm.run.reference", "ReferenceRunner", "onnx", (), "ONNX's own evaluator, slow"),
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
