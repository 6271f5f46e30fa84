"""ONNX -> TensorRT engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from deploynorm.contract import DOMAIN, OP_TYPE
from deploynorm.errors import BackendError, InputError, ModelError, check_choice
from deploynorm.onnx_file import OnnxSource
from deploynorm.trt import BUILDERS, Flavour, TensorRT, gpu_here, import_tensorrt
from deploynorm.trt.builder import build_way, load_plugins
from deploynorm.trt.engine import Engine
from deploynorm.trt.model import TensorRTModel
from deploynorm.trt.settings import HARDWARE_COMPATIBILITY, Settings, Shapes, Way, profiles


def build(
    model: OnnxSource,
    *,
    backend: Flavour | Literal["auto"] = "auto",
    compute_capabilities: Sequence[str] = (),
    min_shapes: Shapes | None = None,
    opt_shapes: Shapes | None = None,
    max_shapes: Shapes | None = None,
    frn: Way | Literal["auto"] = "auto",
    tf32: bool = False,
    plugins: Sequence[Path] | None = None,
    embed_plugin: bool = True,
    timing_cache: bytes | str | Path | None = None,
    workspace: int | None = None,
    version_compatible: bool = False,
    hardware_compatible: str | None = None,
    optimization_level: int | None = None,
    accept_changed: bool = False,
) -> Engine:
    """Builds a TensorRT engine. Its types are those of the ONNX graph, whatever the version of TensorRT.

    Args:
        model: A file, with its external data beside it, or a model in memory; see OnnxFile.read.
        backend: "auto" takes TensorRT where both are installed.
        compute_capabilities: The GPUs that the engine is for, such as "8.9". TensorRT-RTX builds for any, without a
            GPU; TensorRT for the one of this machine only, which is the default of both.
        min_shapes, opt_shapes, max_shapes: The smallest shapes by input, those that the engine is tuned for, and the
            largest; "" for the only input. See trt.settings.ranges for what may be left out; where all three are, the
            engine is for one image of the size that the file's metadata has. Lists of these make an optimization
            profile each, of which a run takes one that holds its shapes.
        frn: "plugin" for our kernel, "native" for the operator's body as TensorRT fuses it. "auto" builds both, runs
            both on a GPU of the kind that the engine is for, and keeps the faster. Without one it keeps that with
            fewer layers that write to memory; when they are even, the native one, which needs no library.
        tf32: Whether float32 products may be rounded to 10 bits.
        plugins: Plugin libraries instead of ours.
        embed_plugin: Whether the plugin libraries that it needs go into the plan, so that it runs where they are not
            installed. Who loads such a plan runs code from it, which TensorRT requires to be permitted.
        timing_cache: What an earlier engine had as its timing_cache, or the file of it; b"", or a file that does not
            exist yet, begins one. TensorRT only.
        workspace: Bytes of scratch memory that a layer may use; TensorRT's own default is all of the GPU's.
        version_compatible: Whether later versions of TensorRT may run it. TensorRT only.
        hardware_compatible: "ampere+" or "same", the GPUs besides its own that it runs on. TensorRT only.
        optimization_level: 0 to 5: how long TensorRT searches.
        accept_changed: Build a file that is not the one that its manifest was written for; a warning says so.

    Raises:
        InputError: An input with dynamic axes has no range, the timing cache cannot be read, or an option does not fit
            the backend.
        ModelError: The model cannot be read or built; see TensorRTModel.read.
        BackendError: TensorRT, a GPU or the plugin is missing.
    """
    check_choice("build", "unknown way for FRN", frn, ("auto", *get_args(Way)))
    check_choice("build", "no backend that builds", backend, ("auto", *BUILDERS))
    trt = import_tensorrt(backend)
    read = TensorRTModel.read(model)
    read.file.begin(accept_changed=accept_changed)
    opt_shapes = opt_shapes or ({} if min_shapes or max_shapes else read.file.image_shape(batch=1))
    settings = Settings(
        profiles=profiles(read.file.inputs, minimum=min_shapes or {}, optimum=opt_shapes, maximum=max_shapes or {}),
        targets=_targets(trt, compute_capabilities),
        named_targets=bool(compute_capabilities),
        tf32=tf32,
        plugins=plugins,
        embed_plugin=embed_plugin,
        timing_cache=_read_cache(timing_cache),
        workspace=workspace,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        optimization_level=optimization_level,
    )
    _check_options(trt, settings)
    if not read.frn:
        none = f"has no node {DOMAIN}::{OP_TYPE}"
        if frn == "plugin":
            raise ModelError(read.file.where, f"{none}, so there is nothing for the plugin", fix="leave --frn out")
        return build_way(trt, read, "native", settings, f"the model {none}")
    if frn != "auto":
        return build_way(trt, read, frn, settings, "as asked for")
    try:
        load_plugins(trt, settings, "plugin")
    except BackendError as error:
        if plugins is not None:
            load_plugins(trt, settings, "native")  # of the libraries named, one that is at fault is an error
        return build_way(trt, read, "native", settings, f"the plugin is not there ({error.where}: {error.problem})")
    both: dict[Way, Engine] = {way: build_way(trt, read, way, settings, "") for way in ("plugin", "native")}
    return _choose(both)


def _read_cache(cache: bytes | str | Path | None) -> bytes | None:
    if cache is None or isinstance(cache, bytes):
        return cache
    try:
        return Path(cache).read_bytes() if Path(cache).exists() else b""
    except OSError as error:
        raise InputError(f"--timing-cache {cache}", f"cannot be read: {error.strerror}") from error


def _targets(trt: TensorRT, asked: Sequence[str]) -> tuple[str, ...]:
    here = gpu_here()
    if not trt.rtx:
        if asked and tuple(asked) != (here,):
            problem = "TensorRT builds for the GPU of this machine only"
            got, expected = ", ".join(asked), here or "a GPU"
            fix = "build on the machine that runs the engine, or for RTX cards with --backend tensorrt-rtx"
            raise InputError("--compute-capability", problem, got=got, expected=expected, fix=fix)
        return () if here is None else (here,)
    if not asked:
        if here is None:
            problem = "there is no GPU here whose kind the engine could be for"
            fix = "name it with --compute-capability: 12.0 for an RTX 50, 8.9 for an RTX 40, 8.6 for an RTX 30"
            raise BackendError("build", problem, fix=fix)
        return (here,)
    members = trt.module.ComputeCapability.__members__
    known = {f"{name[2:-1]}.{name[-1]}": name for name in members if name.startswith("SM")}
    for text in asked:
        check_choice("--compute-capability", f"{trt.name} does not build for this", text, known)
    return tuple(dict.fromkeys(asked))


def _check_options(trt: TensorRT, settings: Settings) -> None:
    for name in ("timing_cache", "version_compatible", "hardware_compatible"):
        if trt.rtx and getattr(settings, name) not in (None, False):
            option, fix = f"--{name.replace('_', '-')}", "leave it out, or use --backend tensorrt"
            raise InputError(option, f"{trt.name} does not have this", fix=fix)
    if settings.hardware_compatible is not None:
        check_choice("--hardware-compatible", "unknown", settings.hardware_compatible, HARDWARE_COMPATIBILITY)
        if not hasattr(trt.module.HardwareCompatibilityLevel, HARDWARE_COMPATIBILITY[settings.hardware_compatible]):
            option, fix = f"--hardware-compatible {settings.hardware_compatible}", "leave it out, or use TensorRT 10.9"
            raise InputError(option, f"{trt.name} does not have this", fix=f"{fix} or later")
    if settings.workspace is not None and not 0 <= settings.workspace < 2**63:
        raise InputError("--workspace", "out of range", got=f"{settings.workspace} bytes", expected="0 to 2^63 - 1")
    if settings.optimization_level is not None and not 0 <= settings.optimization_level <= 5:
        raise InputError("--optimization-level", "out of range", got=settings.optimization_level, expected="0 to 5")


def _choose(both: Mapping[Way, Engine]) -> Engine:
    """Of one model built both ways: the faster, or where nothing can be timed, the one with fewer passes."""
    passes = {way: engine.passes for way, engine in both.items()}
    times: dict[Way, float] = {}
    if gpu_here() in both["native"].compute_capabilities:
        from deploynorm.run.timing import milliseconds

        times = milliseconds(both)
        best = min(times, key=lambda way: times[way])
        measured = ", ".join(f"{way} {value:.3f} ms" for way, value in times.items())
        reason = f"the faster on this machine: {measured}"
    else:
        best = "plugin" if passes["plugin"] < passes["native"] else "native"
        counts = ", ".join(f"{way} {count}" for way, count in passes.items())
        reason = f"nothing was timed, there is no such GPU here; layers that write to memory: {counts}"
    record = replace(both[best].frn, reason=reason, passes=passes, milliseconds=times)
    return replace(both[best], frn=record)
