"""Plugins in TensorRT's registry: ours, and those of any library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from deploynorm import libraries
from deploynorm.contract import DOMAIN, OPERATORS, VERSION
from deploynorm.errors import BackendError
from deploynorm.trt.errors import words
from deploynorm.trt.importing import Flavour, TensorRT, listen, logger
from deploynorm.trt.soname import also_known_as, loaded_library


def has_plugin(trt: TensorRT) -> bool:
    """Whether our plugin is in TensorRT's registry, for each operator."""
    registry = trt.module.get_plugin_registry()
    with listen():  # it logs an error for a name that is not there
        return all(registry.get_creator(op_type, str(VERSION), DOMAIN) is not None for op_type in OPERATORS)


def load_plugin(trt: TensorRT) -> None:
    """Puts our plugin into TensorRT's registry, for the whole process. A second call does nothing.

    Raises:
        BackendError: The library is not built, or TensorRT does not take it.
    """
    _make_findable(trt)
    if has_plugin(trt):
        return
    library = libraries.library_path(libraries.TENSORRT_LIBRARY)
    load_library(trt, library)
    if not has_plugin(trt):
        problem = f"does not bring the plugins of {DOMAIN}, {' and '.join(OPERATORS)}, version {VERSION}"
        raise BackendError(str(library), problem, fix="deploynorm plugins build --cuda")


def load_stock_plugins(trt: TensorRT) -> None:
    """Puts NVIDIA's own plugins into the registry: the parser makes them of RoiAlign, ScatterElements and others.

    A second call does nothing, nor does the first with a TensorRT that has none, as the lean runtime.
    """
    initialize = getattr(trt.module, "init_libnvinfer_plugins", None)
    if initialize is not None:
        initialize(logger(trt), "")


_LOADED: dict[tuple[Flavour, Path], Any] = {}
"""The handles that TensorRT gave for libraries. A library that is loaded again is refused."""


def load_library(trt: TensorRT, library: Path) -> None:
    """Puts the plugins of any library into TensorRT's registry. A second call does nothing.

    The library exports getCreators, and does not register its plugins itself. BackendError if there is no such file, or
    TensorRT does not take it.
    """
    _make_findable(trt)
    key = (trt.flavour, library.resolve())
    if key in _LOADED:
        return
    if not library.is_file():
        problem = "no plugin library: not a regular file" if library.exists() else "no such plugin library"
        raise BackendError(str(library), problem, fix="check the path")
    logger(trt)
    with listen() as heard:
        handle = trt.module.get_plugin_registry().load_library(str(library.resolve()))
    if handle is None:
        problem = f"{trt.name} does not load this plugin library"
        expected = "a library that exports getCreators and is not loaded already"
        fix = "pass each library once, and none that registers its plugins itself"
        raise BackendError(str(library), problem, got=words(heard) or _odd(library), expected=expected, fix=fix)
    _LOADED[key] = handle


def _odd(library: Path) -> str | None:
    """What is wrong with a file that TensorRT refused without a word; None where it is a shared library."""
    from deploynorm.libraries.elf import read_needed  # doctor itself imports this module

    try:
        read_needed(library)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _make_findable(trt: TensorRT) -> None:
    """Without this TensorRT-RTX ends the process at the first plugin; see deploynorm.trt.soname."""
    if trt.rtx and sys.platform == "linux":
        stem = "libtensorrt_rtx.so"
        library = loaded_library(stem)
        if library is not None:
            also_known_as(stem, library)
