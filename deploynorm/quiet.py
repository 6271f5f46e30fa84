"""What torch and onnx_ir say on their own is kept from users; of their errors the first line is passed on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keeps warnings and logs of torch, and of further loggers, from the user: what matters is raised."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch", *names))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "The tensor attribute")  # that forward sets, on a copy that is thrown away
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop, to stand inside another message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
