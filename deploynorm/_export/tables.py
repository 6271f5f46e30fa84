"""The tables of operators that torch builds anew in each export, built once in a process."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

_REGISTRATION = "torch.onnx._internal.exporter._registration"
_COMPOSITE = "torch._export.utils"


@contextmanager
def tables_once() -> Iterator[None]:
    """Takes torch's tables from an earlier export, which saves a second of each: adopting layers is an export too.

    Where a version of torch has no such functions, it builds its tables as ever.
    """
    with ExitStack() as stack:
        for name, replacement in _replacements().items():
            stack.enter_context(patch(name, replacement))
        yield


@cache
def _replacements() -> dict[str, Any]:
    """What stands in for functions of torch, by their names."""
    found: dict[str, Any] = {}
    try:
        build = importlib.import_module(_REGISTRATION).ONNXRegistry.from_torchlib
        found[f"{_REGISTRATION}.ONNXRegistry.from_torchlib"] = staticmethod(_copies_of(cache(build)))
        composite = importlib.import_module(_COMPOSITE)
        found[f"{_COMPOSITE}._materialize_cpp_cia_ops"] = cache(composite._materialize_cpp_cia_ops)
    except (ImportError, AttributeError):
        pass
    return found


def _copies_of(build: Callable[..., Any]) -> Callable[..., Any]:
    """`build`, of whose result each caller gets a copy to add its own translations to."""

    def from_torchlib(*given: Any, **named: Any) -> Any:
        registry = copy.copy(build(*given, **named))
        registry.functions = {target: list(entries) for target, entries in registry.functions.items()}
        return registry

    return from_torchlib
