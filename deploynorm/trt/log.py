"""What TensorRT says: its one logger, and listening to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deploynorm.trt.errors import Message
from deploynorm.trt.importing import TensorRT

__all__ = ["listen", "logger"]

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
