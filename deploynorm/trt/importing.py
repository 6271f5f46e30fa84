"""TensorRT as a Python module, and hearing what it says through its one logger.

TensorRT 10 and 11 (tensorrt) and TensorRT for RTX (tensorrt_rtx) have one interface.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

from deploynorm.errors import BackendError, InputError
from deploynorm.inputs import TensorSpec
from deploynorm.trt.errors import Message

Flavour = Literal["tensorrt", "tensorrt-rtx"]

FLAVOURS: Final[dict[Flavour, tuple[str, tuple[int, ...], str]]] = {
    "tensorrt": ("tensorrt", (10, 11), "pip install tensorrt"),
    "tensorrt-rtx": ("tensorrt_rtx", (1,), "pip install tensorrt_rtx_cu13"),
}
"""The module of each, the major versions that our plugin and our code know, and how to get it."""


@dataclass(frozen=True)
class TensorRT:
    """One of the two TensorRTs, as imported."""

    module: Any  # tensorrt or tensorrt_rtx
    flavour: Flavour
    version: str

    @property
    def name(self) -> str:
        return f"{'TensorRT-RTX' if self.rtx else 'TensorRT'} {self.version}"

    @property
    def rtx(self) -> bool:
        return self.flavour == "tensorrt-rtx"


def import_tensorrt(flavour: Flavour | Literal["auto"] = "auto") -> TensorRT:
    """TensorRT, or TensorRT-RTX.

    Args:
        flavour: "auto" takes TensorRT where both are installed.

    Raises:
        InputError: An unknown flavour.
        BackendError: It is not installed, its own libraries are missing, or its version is one we do not know.
    """
    if flavour != "auto" and flavour not in FLAVOURS:
        raise InputError("tensorrt", "unknown backend", got=repr(flavour), expected=" or ".join(FLAVOURS))
    reasons = []
    for name in FLAVOURS if flavour == "auto" else (flavour,):
        module_name, majors, _ = FLAVOURS[name]
        try:
            module = importlib.import_module(module_name)
        except (ImportError, OSError) as error:
            reasons.append(f"{module_name}: {error}")
            continue
        found = TensorRT(module, name, str(module.__version__))
        if int(found.version.partition(".")[0]) not in majors:
            problem = f"{found.name} is a version that deploynorm does not know"
            expected = f"{module_name} {' or '.join(map(str, majors))}"
            raise BackendError("tensorrt", problem, expected=expected, fix=f"install that: {FLAVOURS[name][2]}")
        return found
    fix = " or, for RTX cards, ".join(FLAVOURS[name][2] for name in FLAVOURS if flavour in ("auto", name))
    raise BackendError("tensorrt", f"cannot be imported ({'; '.join(reasons)})", fix=fix)


def gpu_here() -> str | None:
    """Compute capability of the current CUDA device, such as "9.0"; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


_DTYPES: Final = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn"}


def tensor_spec(name: str, shape: Iterable[int], dtype: Any) -> TensorSpec:
    """One input or output, as TensorRT describes it: it has no names for dynamic axes, and its own for types."""
    sizes = tuple("?" if size < 0 else int(size) for size in shape)
    return TensorSpec(name, sizes, _DTYPES.get(dtype.name, dtype.name.lower()))


_LISTENERS: list[list[Message]] = []
_LOGGERS: dict[str, Any] = {}


def logger(trt: TensorRT) -> Any:
    """Our logger, one for the process: TensorRT keeps the first that it is given and ignores all others."""
    if trt.flavour not in _LOGGERS:

        class Logger(trt.module.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.module.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                for heard in _LISTENERS:
                    heard.append(Message(getattr(severity, "name", str(severity)), text))

        _LOGGERS[trt.flavour] = Logger()
    return _LOGGERS[trt.flavour]


@contextmanager
def listen() -> Iterator[list[Message]]:
    """Collects what TensorRT says through `logger` while the block lasts; otherwise it is dropped."""
    heard: list[Message] = []
    _LISTENERS.append(heard)
    try:
        yield heard
    finally:
        _LISTENERS[:] = [other for other in _LISTENERS if other is not heard]
