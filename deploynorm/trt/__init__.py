"""TensorRT: importing it, hearing what it says, and putting our plugin into it.

TensorRT 10 and 11 (module tensorrt) and TensorRT for RTX (module tensorrt_rtx) have one Python interface. For people
with their own TensorRT code:

    deploynorm.trt.load_plugin(deploynorm.trt.import_tensorrt())    # before an engine or an ONNX file is read
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from deploynorm import libraries
from deploynorm.contract import DOMAIN, OP_TYPE, VERSION
from deploynorm.errors import BackendError, InputError
from deploynorm.trt.errors import Message, words
from deploynorm.trt.soname import also_known_as, loaded_library

__all__ = [
    "FLAVOURS",
    "Flavour",
    "TensorRT",
    "dtype_name",
    "gpu_here",
    "has_plugin",
    "import_tensorrt",
    "listen",
    "load_library",
    "load_plugin",
    "logger",
]

Flavour = Literal["tensorrt", "tensorrt-rtx"]

FLAVOURS: Final[dict[Flavour, tuple[str, tuple[int, ...], str]]] = {
    "tensorrt": ("tensorrt", (10, 11), "pip install tensorrt"),
    "tensorrt-rtx": ("tensorrt_rtx", (1,), "pip install tensorrt_rtx_cu13"),
}
"""The module of each, the major versions that our plugin and our code know, and how to get it."""


@dataclass(frozen=True)
class TensorRT:
    """One of the two TensorRTs, as imported.

    Attributes:
        module: tensorrt or tensorrt_rtx.
        flavour: Which.
        version: As the module tells it.
    """

    module: Any
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
            raise BackendError(
                "tensorrt",
                f"{found.name} is a version that deploynorm does not know",
                expected=f"{module_name} {' or '.join(map(str, majors))}",
                fix=f"install that: {FLAVOURS[name][2]}",
            )
        return found
    remedies = [FLAVOURS[name][2] for name in FLAVOURS if flavour in ("auto", name)]
    raise BackendError(
        "tensorrt", f"cannot be imported ({'; '.join(reasons)})", fix=f"{' or, for RTX cards, '.join(remedies)}"
    )


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


def gpu_here() -> str | None:
    """Compute capability of the current CUDA device, such as "9.0"; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


_DTYPES: Final = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn"}


def dtype_name(dtype: Any) -> str:
    """NumPy's name of a tensorrt.DataType."""
    name = str(dtype.name)
    return _DTYPES.get(name, name.lower())


def has_plugin(trt: TensorRT) -> bool:
    """Whether our plugin is in TensorRT's registry."""
    with listen():  # it logs an error for a name that is not there
        return trt.module.get_plugin_registry().get_creator(OP_TYPE, str(VERSION), DOMAIN) is not None


def load_plugin(trt: TensorRT) -> None:
    """Puts our plugin into TensorRT's registry, for the whole process. A second call does nothing.

    Raises:
        BackendError: The library is not built, or TensorRT does not take it.
    """
    _mend(trt)
    if has_plugin(trt):
        return
    library = libraries.library_path(libraries.TENSORRT_LIBRARY)
    load_library(trt, library)
    if not has_plugin(trt):
        raise BackendError(
            str(library),
            f"does not bring the plugin {DOMAIN}::{OP_TYPE}, version {VERSION}",
            fix="deploynorm plugins build --cuda",
        )


_LOADED: dict[tuple[str, Path], Any] = {}
"""The handles that TensorRT gave for libraries. A library that is loaded again is refused."""


def load_library(trt: TensorRT, library: Path) -> None:
    """Puts the plugins of any library into TensorRT's registry. A second call does nothing.

    Args:
        trt: See import_tensorrt.
        library: It exports getCreators, and does not register its plugins itself.

    Raises:
        BackendError: There is no such file, or TensorRT does not take it.
    """
    _mend(trt)
    key = (trt.flavour, library.resolve())
    if key in _LOADED:
        return
    if not library.is_file():
        raise BackendError(str(library), "no such plugin library", fix="check the path")
    logger(trt)
    with listen() as heard:
        handle = trt.module.get_plugin_registry().load_library(str(library.resolve()))
    if handle is None:
        raise BackendError(
            str(library),
            f"{trt.name} does not load this plugin library",
            got=words(heard),
            expected="a library that exports getCreators and is not loaded already",
            fix="pass each library once, and none that registers its plugins itself",
        )
    _LOADED[key] = handle


def _mend(trt: TensorRT) -> None:
    """See deploynorm.trt.soname: TensorRT-RTX would end this process at the first plugin."""
    if trt.rtx and sys.platform == "linux":
        stem = "libtensorrt_rtx.so"
        library = loaded_library(stem)
        if library is not None:
            also_known_as(stem, library)
