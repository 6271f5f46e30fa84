"""ONNX -> TensorRT engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from deploynorm.contract import DOMAIN, OP_TYPE
from deploynorm.errors import BackendError, InputError, ModelError
from deploynorm.inputs import Shape
from deploynorm.onnx_file import OnnxFile, OnnxSource
from deploynorm.trt import Flavour, TensorRT, gpu_here, import_tensorrt
from deploynorm.trt.builder import build_way, load_plugins
from deploynorm.trt.engine import Engine
from deploynorm.trt.model import TensorRTModel
from deploynorm.trt.settings import HARDWARE_COMPATIBILITY, Settings, Way, ranges

__all__ = ["build"]


def build(
    model: OnnxSource,
    *,
    backend: Flavour | Literal["auto"] = "auto",
    compute_capabilities: Sequence[str] = (),
    min_shapes: Mapping[str, Shape] | None = None,
    opt_shapes: Mapping[str, Shape] | None = None,
    max_shapes: Mapping[str, Shape] | None = None,
    frn: Way | Literal["auto"] = "auto",
    tf32: bool = False,
    plugins: Sequence[Path] | None = None,
    embed_plugin: bool = True,
    timing_cache: bytes | str | Path | None = None,
    workspace: int | None = None,
    version_compatible: bool = False,
    hardware_compatible: str | None = None,
    optimization_level: int | None = None,
) -> Engine:
    """Builds a TensorRT engine. Its types are those of the ONNX graph, whatever the version of TensorRT.

    "auto" builds FRN both ways. Where this machine has a GPU of the kind that the engine is for, it runs both and
    keeps the faster. Elsewhere nothing can be timed, and it keeps the one with fewer layers that write to memory; when
    they are even, the native one, which needs no library where it runs.

    Args:
        model: A file, with its external data beside it, or a model in memory; see OnnxFile.read.
        backend: "auto" takes TensorRT where both are installed.
        compute_capabilities: The GPUs that the engine is for, such as "8.9". TensorRT-RTX builds for any, without a
            GPU; TensorRT for the one of this machine only, which is the default of both.
        min_shapes: Smallest shapes by input; "" for the only input. See trt.settings.ranges for what may be left out;
            where all three are, the engine is for one image of the size that the file's metadata has.
        opt_shapes: The shapes that the engine is tuned for.
        max_shapes: Largest shapes.
        frn: "plugin" for our kernel, "native" for the operator's body as TensorRT fuses it.
        tf32: Whether float32 products may be rounded to 10 bits.
        plugins: Plugin libraries instead of ours.
        embed_plugin: Whether the plugin libraries that it needs go into the plan, so that it runs where they are not
            installed.
            Who loads such a plan runs code from it, which TensorRT requires to be permitted.
        timing_cache: What an earlier engine had as its timing_cache, or the file of it; b"", or a file that does not
            exist yet, begins one. TensorRT only.
        workspace: Bytes of scratch memory that a layer may use; TensorRT's own default is all of the GPU's.
        version_compatible: Whether later versions of TensorRT may run it. TensorRT only.
        hardware_compatible: "ampere+" or "same", the GPUs besides its own that it runs on. TensorRT only.
        optimization_level: 0 to 5: how long TensorRT searches.

    Raises:
        InputError: An input with dynamic axes has no range, the timing cache cannot be read, or an option does not fit
            the backend.
        ModelError: The model cannot be read or built; see TensorRTModel.read.
        BackendError: TensorRT, a GPU or the plugin is missing.
    """
    if frn not in ("auto", "plugin", "native"):
        raise InputError("build", "unknown way for FRN", got=repr(frn), expected="auto, plugin or native")
    trt = import_tensorrt(backend)
    read = TensorRTModel.read(model)
    opt_shapes = opt_shapes or ({} if min_shapes or max_shapes else _image_shape(read.file))
    settings = Settings(
        ranges=ranges(read.file.inputs, minimum=min_shapes or {}, optimum=opt_shapes, maximum=max_shapes or {}),
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
        if frn == "plugin":
            raise ModelError(
                read.file.where,
                f"has no node {DOMAIN}::{OP_TYPE}, so there is nothing for the plugin",
                fix="leave --frn out",
            )
        return build_way(trt, read, "native", settings, f"the model has no node {DOMAIN}::{OP_TYPE}")
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


def _image_shape(file: OnnxFile) -> dict[str, Shape]:
    """One image of the size that the metadata has, for a model with one input."""
    image, _ = file.image_and_labels
    if image is None or len(file.inputs) != 1:
        return {}
    batch = file.inputs[0].shape[0]
    return {"": (batch if isinstance(batch, int) else 1, *image.shape)}


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
            raise InputError(
                "--compute-capability",
                "TensorRT builds for the GPU of this machine only",
                got=", ".join(asked),
                expected=here or "a GPU",
                fix="build on the machine that runs the engine, or for RTX cards with --backend tensorrt-rtx",
            )
        return () if here is None else (here,)
    if not asked:
        if here is None:
            raise BackendError(
                "build",
                "there is no GPU here whose kind the engine could be for",
                fix="name it: --compute-capability 8.9 (RTX 40), 12.0 (RTX 50), 8.6 (RTX 30), 7.5 (RTX 20)",
            )
        return (here,)
    members = trt.module.ComputeCapability.__members__
    known = {f"{name[2:-1]}.{name[-1]}": name for name in members if name.startswith("SM")}
    unknown = [text for text in asked if text not in known]
    if unknown:
        raise InputError(
            "--compute-capability", f"{trt.name} does not build for this", got=unknown[0], expected=", ".join(known)
        )
    return tuple(dict.fromkeys(asked))


def _check_options(trt: TensorRT, settings: Settings) -> None:
    for option, value in (
        ("--timing-cache", settings.timing_cache),
        ("--version-compatible", settings.version_compatible or None),
        ("--hardware-compatible", settings.hardware_compatible),
    ):
        if trt.rtx and value is not None:
            raise InputError(option, f"{trt.name} does not have this", fix="leave it out, or use --backend tensorrt")
    if settings.hardware_compatible not in (None, *HARDWARE_COMPATIBILITY):
        raise InputError(
            "--hardware-compatible",
            "unknown",
            got=repr(settings.hardware_compatible),
            expected=" or ".join(HARDWARE_COMPATIBILITY),
        )
    if settings.workspace is not None and settings.workspace < 0:
        raise InputError("--workspace", "must not be negative", got=settings.workspace)
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
