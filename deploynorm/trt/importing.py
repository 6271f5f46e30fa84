"""TensorRT as a Python module, and hearing what it says through its one logger.

TensorRT 10 and 11 (tensorrt) and TensorRT for RTX (tensorrt_rtx) have one interface, and so have, as far as it runs
engines, the two runtimes for version-compatible engines (tensorrt_lean, tensorrt_dispatch).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from deploynorm.errors import BackendError, InputError
from deploynorm.inputs import TensorSpec
from deploynorm.trt.errors import Message

Flavour = Literal["tensorrt", "tensorrt-rtx", "tensorrt-lean", "tensorrt-dispatch"]


class Package(NamedTuple):
    """How a TensorRT comes."""

    name: str  # as people call it
    modules: tuple[str, ...]  # of which the first that is there counts: the bindings also come without the other
    majors: tuple[int, ...]  # the versions that our plugin and our code know
    install: str
    use: str  # what one would choose it for
    builds: bool = True  # and does not only run engines


FLAVOURS: Final[Mapping[Flavour, Package]] = {
    "tensorrt": Package("TensorRT", ("tensorrt",), (10, 11), "pip install tensorrt", "all cards"),
    "tensorrt-rtx": Package("TensorRT-RTX", ("tensorrt_rtx",), (1,), "pip install tensorrt_rtx_cu13", "RTX cards"),
    "tensorrt-lean": Package(
        "TensorRT's lean runtime",
        ("tensorrt_lean", "tensorrt_lean_bindings"),
        (10, 11),
        "pip install tensorrt_lean",
        "version-compatible engines",
        builds=False,
    ),
    "tensorrt-dispatch": Package(
        "TensorRT's dispatch runtime",
        ("tensorrt_dispatch", "tensorrt_dispatch_bindings"),
        (10, 11),
        "pip install tensorrt_dispatch",
        "those with their runtime inside",
        builds=False,
    ),
}

BUILDERS: Final = tuple(flavour for flavour, package in FLAVOURS.items() if package.builds)
RUNTIMES: Final = tuple(flavour for flavour, package in FLAVOURS.items() if not package.builds)
"""Those that run version-compatible engines of "tensorrt", and build none."""


@dataclass(frozen=True)
class TensorRT:
    """One of `FLAVOURS`, as imported."""

    module: Any
    flavour: Flavour
    version: str

    @property
    def name(self) -> str:
        return f"{FLAVOURS[self.flavour].name} {self.version}"

    @property
    def rtx(self) -> bool:
        return self.flavour == "tensorrt-rtx"


def import_tensorrt(flavour: Flavour | Literal["auto"] = "auto", *others: Flavour) -> TensorRT:
    """The first of these that is installed.

    Args:
        flavour: "auto" takes TensorRT, else TensorRT-RTX.
        others: What will do where that is not installed.

    Raises:
        InputError: An unknown flavour.
        BackendError: None is installed, its own libraries are missing, or its version is one we do not know.
    """
    if flavour != "auto" and flavour not in FLAVOURS:
        raise InputError("tensorrt", "unknown backend", got=repr(flavour), expected=" or ".join(FLAVOURS))
    names = (*(BUILDERS if flavour == "auto" else (flavour,)), *others)
    reasons = []
    for name, package in ((name, FLAVOURS[name]) for name in names):
        module = None
        for module_name in package.modules:
            try:
                module = importlib.import_module(module_name)
                break
            except (ImportError, OSError) as error:
                reasons.append(f"{module_name}: {error}")
        if module is None:
            continue
        found = TensorRT(module, name, str(module.__version__))
        if int(found.version.partition(".")[0]) not in package.majors:
            problem = f"{found.name} is a version that deploynorm does not know"
            expected = f"{package.modules[0]} {' or '.join(map(str, package.majors))}"
            raise BackendError("tensorrt", problem, expected=expected, fix=f"install that: {package.install}")
        return found
    first, *rest = (FLAVOURS[name] for name in names)
    fix = first.install + "".join(f" or, for {package.use}, {package.install}" for package in rest)
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
