"""Sessions of ONNX Runtime with our operator library in them."""

from __future__ import annotations

import contextlib
import io
import mmap
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploynorm.contract import METADATA_CPU, OP_TYPE
from deploynorm.errors import BackendError, ModelError
from deploynorm.files import scratch_folder
from deploynorm.libraries import cuda_variants, find_library, library_path
from deploynorm.ort.errors import explain, plain
from deploynorm.ort.machine import check_this_machine
from deploynorm.ort.runtime import PROVIDERS, find_provider, import_onnxruntime, quiet_options

if TYPE_CHECKING:
    import onnxruntime

_REGISTERED: weakref.WeakSet[Any] = weakref.WeakSet()
"""Session options that have our library: ONNX Runtime refuses a second registration, and cannot be asked."""


def register(options: onnxruntime.SessionOptions) -> None:
    """Makes our fused operator known to the sessions that are made with these options. A second call does nothing.

    Raises:
        BackendError: The library is not built, or this onnxruntime is too old for it or cannot load it.
    """
    if options in _REGISTERED:
        return
    _register_library(options, library_path())
    _REGISTERED.add(options)


def _register_library(options: onnxruntime.SessionOptions, library: Path) -> None:
    """Registers a library of custom operators; BackendError where it is none, or refuses this onnxruntime."""
    if not library.is_file():  # a fifo would be waited for
        problem = "no plugin library: not a regular file" if library.exists() else "no such plugin library"
        raise BackendError(str(library), problem, fix="check the path")
    try:
        # Absolute, since for a bare name the loader looks in its own folders.
        options.register_custom_ops_library(str(library.absolute()))
    except Exception as error:
        problem = f"ONNX Runtime cannot load this plugin library: {plain(error)}"
        fix = "pass each library once, built for this machine and this onnxruntime"
        raise BackendError(str(library), problem, fix=fix) from error


def session(
    model: str | Path | bytes,
    options: onnxruntime.SessionOptions | None = None,
    *,
    providers: Sequence[str] = ("cpu",),
    plugins: Sequence[Path] | None = None,
    optimize: bool = True,
) -> onnxruntime.InferenceSession:
    """An onnxruntime.InferenceSession of the model, on CPU and CUDA with our fused operator where its library is there.

    Without the library, and on other providers, a model runs through the function bodies that `export` writes into
    it: equal numbers, slower. On the CPU alone, with the library, the model is opened twice: as ONNX Runtime optimizes
    it, and as `deploynorm.rewrite.cpu.optimize_for_cpu` rewrites that for this processor. This takes some tenths of a
    second, the packages onnx and onnx-ir, and for the time of opening the model's size in the system's temporary
    folder. Where a package is missing, or the processor has no blocked layout, the model runs as it is.

    Args:
        model: A file, with its external data beside it, or the bytes of a model.
        options: Options of the session; ours are registered on them. Where they replace values of the file
            (`add_initializer`), pass optimize=False: the rewritten graph may hold what it computed from these.
        providers: Short names (cpu, cuda, tensorrt) or ONNX Runtime's own, the preferred first. ONNX Runtime itself
            puts nodes that none of them takes on the CPU. It has no switch for TF32 under TensorRT: set
            NVIDIA_TF32_OVERRIDE=0 in the environment.
        plugins: Libraries of custom operators instead of ours; empty for the stock runtime.
        optimize: False leaves the graph to ONNX Runtime alone, as do options with a lower level of optimization, or
            with `optimized_model_filepath`.

    Raises:
        InputError: An unknown provider.
        BackendError: onnxruntime, a provider or a library is missing, cannot be loaded or is too old; or the file was
            rewritten for another machine.
        ModelError: The model cannot be read or run.
    """
    ort = import_onnxruntime()
    where = "model (bytes)" if isinstance(model, bytes) else str(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelError(where, "no such file", fix="check the path")
    asked = [find_provider(name, ort) for name in providers]
    options = options or quiet_options()
    missing: str | None = None
    if plugins is not None:
        for library in plugins:
            _register_library(options, Path(library))
    elif (missing := _missing_kernels({name for name, _ in asked})) is None:
        register(options)
    if any(name != PROVIDERS["cpu"][0] for name, _ in asked) and hasattr(ort, "preload_dlls"):
        # Opens the CUDA and cuDNN that pip has put where the system does not look; it would print what is missing.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    open_here = partial(_open, where=where, options=options, providers=asked)
    ours_on_the_cpu = plugins is None and missing is None and {name for name, _ in asked} == {PROVIDERS["cpu"][0]}
    opened = None
    if optimize and ours_on_the_cpu and _asks_for_all(options, ort) and _mentions_operator(model):
        opened = _open_rewritten(model, open_here)
    opened = opened or open_here(model)
    lost = [name for name, (full, _) in zip(providers, asked, strict=True) if full not in opened.get_providers()]
    if lost:
        problem = f"the provider {lost[0]!r} failed to start, and ONNX Runtime would have used another"
        expected = [name for name, _ in asked]
        fix = "deploynorm doctor lists what is missing of driver, CUDA, cuDNN and TensorRT"
        raise BackendError(where, problem, got=opened.get_providers(), expected=expected, fix=fix)
    if missing and _mentions_operator(model):
        text = f"deploynorm: FRN layers run as several operators each, which is slower: {missing}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    rewritten_for = opened.get_modelmeta().custom_metadata_map.get(METADATA_CPU)
    if rewritten_for is not None:
        check_this_machine(where, rewritten_for, ort)
    return opened


def _open(
    model: str | Path | bytes, where: str, options: onnxruntime.SessionOptions, providers: Sequence[Any]
) -> onnxruntime.InferenceSession:
    """A session, or its error as one of ours."""
    source = model if isinstance(model, bytes) else str(model)
    try:
        # The fallback would run another provider than the one asked for, and say so on stdout only.
        return import_onnxruntime().InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise explain(where, error) from error


def _asks_for_all(options: onnxruntime.SessionOptions, ort: Any) -> bool:
    """Whether the graph may be optimized as far as possible, and nobody asks for the one that ONNX Runtime makes."""
    all_of_it = options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    return all_of_it and not options.optimized_model_filepath


def _open_rewritten(
    model: str | Path | bytes, open_here: Callable[[Path], onnxruntime.InferenceSession]
) -> onnxruntime.InferenceSession | None:
    """A session of the model as rewritten for this processor; None where that is not possible, or changes nothing."""
    try:
        from deploynorm.rewrite.cpu import optimize_file

        with scratch_folder() as folder:
            rewritten = optimize_file(model, folder)
            if rewritten is None:
                return None
            opened: Any = open_here(rewritten)
    except Exception:
        return None  # a fault of the model itself is met again as it is opened; any other must not keep it from that
    # Its method set_providers opens the model again, when the folder is gone.
    opened._model_path, opened._model_bytes = (None, model) if isinstance(model, bytes) else (str(model), None)
    return opened


def _missing_kernels(providers: set[str]) -> str | None:
    """Why our library is not for a session on these providers, None if it is; empty where it could not help.

    Where a device lacks our kernel the function body stays there, which is better than copies to the CPU and back.
    """
    cpu, cuda = PROVIDERS["cpu"][0], PROVIDERS["cuda"][0]
    if not providers <= {cpu, cuda}:
        return ""  # TensorRT takes whole graphs of standard operators, and fuses the body by itself
    library = find_library()
    if library is None:
        flag = " --cuda" if cuda in providers else ""
        return f"the operator library is not built on this machine. Fix: deploynorm plugins build{flag}"
    if cuda in providers and not cuda_variants(library):
        return "the operator library has no CUDA kernels. Fix: deploynorm plugins build --cuda"
    return None


def _mentions_operator(model: str | Path | bytes) -> bool:
    """Whether the model may hold one of our operators, whose names all begin alike, without parsing gigabytes of it."""
    if isinstance(model, bytes):
        return OP_TYPE.encode() in model
    if Path(model).stat().st_size == 0:  # which cannot be mapped
        return False
    with Path(model).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(OP_TYPE.encode()) >= 0
