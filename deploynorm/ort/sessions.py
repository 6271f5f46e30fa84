"""Sessions of ONNX Runtime with our operator library in them, and its errors in our words.

For people with their own ONNX Runtime code:

    options = onnxruntime.SessionOptions()
    deploynorm.ort.register(options)                    # or, all in one:
    session = deploynorm.ort.session("model.onnx", providers=["cpu"])
"""

from __future__ import annotations

import contextlib
import io
import mmap
import re
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from deploynorm.contract import DOMAIN, METADATA_CPU, OP_TYPE
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError
from deploynorm.libraries import cuda_variants, find_library, library_path
from deploynorm.ort.machine import check_this_machine

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["PROVIDERS", "explain", "import_onnxruntime", "library_path", "quiet_options", "register", "session"]

PROVIDERS: Final[Mapping[str, tuple[str, dict[str, str]]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # TF32 keeps 10 bits of a float32 product: no float32 parity could be judged.
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
    "tensorrt": ("TensorrtExecutionProvider", {}),
}
"""The short names of providers, with ONNX Runtime's own names and the options they are given."""

_INSTALL_CPU = "pip install 'deploynorm[cpu]'"
_INSTALL_GPU = "pip uninstall onnxruntime, then pip install 'deploynorm[gpu]'"

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
    """Registers a library of custom operators.

    Raises:
        BackendError: It is missing, not a library, or refuses this onnxruntime.
    """
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise BackendError(
            str(library),
            f"ONNX Runtime cannot load this plugin library: {_plain(error)}",
            fix="pass each library once, built for this machine and this onnxruntime",
        ) from error


def session(
    model: str | Path | bytes,
    *,
    providers: Sequence[str] = ("cpu",),
    plugins: Sequence[Path] | None = None,
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """An onnxruntime.InferenceSession of the model, on CPU and CUDA with our fused operator where its library is there.

    Without the library, and on other providers, a model runs through the function bodies that `export` writes into
    it: the same numbers, slower.

    Args:
        model: A file, with its external data beside it, or the bytes of a model.
        providers: Short names (cpu, cuda, tensorrt) or ONNX Runtime's own, the preferred first. ONNX Runtime itself
            puts nodes that none of them takes on the CPU. It has no switch for TF32 under TensorRT: set
            NVIDIA_TF32_OVERRIDE=0 in the environment.
        plugins: Libraries of custom operators instead of ours; empty for the stock runtime.
        options: Options of the session; ours are registered on them.

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
    wanted = [_provider(name, ort) for name in providers]
    if options is None:
        options = quiet_options()
    missing: str | None = None
    if plugins is not None:
        for library in plugins:
            _register_library(options, Path(library))
    elif (missing := _missing_kernels({name for name, _ in wanted})) is None:
        register(options)
    if any(name != PROVIDERS["cpu"][0] for name, _ in wanted):
        _open_cuda(ort)
    source = model if isinstance(model, bytes) else str(model)
    try:
        # Its fallback would run another provider than the one asked for, and tell that on stdout alone.
        opened = ort.InferenceSession(source, options, providers=wanted, enable_fallback=0)
    except Exception as error:
        raise explain(where, error) from error
    lost = [name for name, (full, _) in zip(providers, wanted, strict=True) if full not in opened.get_providers()]
    if lost:
        raise BackendError(
            where,
            f"the provider {lost[0]!r} failed to start, and ONNX Runtime would have used another",
            got=opened.get_providers(),
            expected=[name for name, _ in wanted],
            fix="run deploynorm doctor: it tells what of driver, CUDA, cuDNN and TensorRT this onnxruntime misses",
        )
    if missing and _mentions_operator(model):
        warnings.warn(
            f"deploynorm: FRN layers run as several operators each, which is slower: {missing}",
            RuntimeWarning,
            stacklevel=2,
        )
    rewritten_for = opened.get_modelmeta().custom_metadata_map.get(METADATA_CPU)
    if rewritten_for is not None:
        check_this_machine(where, rewritten_for, ort)
    return opened


def _missing_kernels(providers: set[str]) -> str | None:
    """Why our library is not for a session on these providers, None if it is; empty where it could not help.

    Where a device lacks our kernel the function body stays there, which is better than copies to the CPU and back.
    """
    cpu, cuda = PROVIDERS["cpu"][0], PROVIDERS["cuda"][0]
    if not providers <= {cpu, cuda}:
        return ""  # TensorRT takes whole graphs of standard operators, and fuses the body by itself
    library, flag = find_library(), " --cuda" if cuda in providers else ""
    if library is None:
        return f"the operator library is not built on this machine. Fix: deploynorm plugins build{flag}"
    if cuda in providers and not cuda_variants(library):
        return f"the operator library has no CUDA kernels. Fix: deploynorm plugins build{flag}"
    return None


def _open_cuda(ort: Any) -> None:
    """Opens the CUDA and cuDNN that pip has put where the system does not look; ONNX Runtime 1.21 and later can.

    What it misses it would print; a provider that does not start then is told by `session`.
    """
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def quiet_options() -> onnxruntime.SessionOptions:
    """Options of a session that logs fatal errors alone: everything else reaches the user once, in our words.

    Raises:
        BackendError: onnxruntime is missing.
    """
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 4
    return options


def import_onnxruntime() -> Any:
    """The module onnxruntime.

    Raises:
        BackendError: It is not installed, or its own libraries are missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "onnxruntime",
            f"the package cannot be imported: {error}",
            fix=f"{_INSTALL_CPU} (and 'numpy<2' for onnxruntime 1.18)",
        ) from error
    return onnxruntime


def _provider(name: str, ort: Any) -> tuple[str, dict[str, str]]:
    present = ort.get_available_providers()
    full, settings = PROVIDERS.get(name, (name, {}))
    if full not in present and full == name and name not in ort.get_all_providers():
        raise InputError("onnxruntime", "unknown provider", got=repr(name), expected=" or ".join(PROVIDERS))
    if full not in present:
        raise BackendError(
            "onnxruntime",
            f"onnxruntime {ort.__version__} was built without the provider {name!r}",
            got=[known for known, (full, _) in PROVIDERS.items() if full in present],
            expected=name,
            fix=_INSTALL_CPU if name == "cpu" else _INSTALL_GPU,
        )
    return full, settings


def _mentions_operator(model: str | Path | bytes) -> bool:
    """Whether the model may hold our operator, without parsing gigabytes of it."""
    if isinstance(model, bytes):
        return OP_TYPE.encode() in model
    if Path(model).stat().st_size == 0:  # which cannot be mapped
        return False
    with Path(model).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(OP_TYPE.encode()) >= 0


class _Known(NamedTuple):
    """An error of ONNX Runtime that we foresee, known by its text; `{version}` is filled in."""

    text: str
    kind: type[DeployNormError]
    problem: str
    fix: str


_KNOWN: Final = (
    _Known(
        rf"{DOMAIN}:\w*{OP_TYPE}\S* is not a registered function/op",
        ModelError,
        f"holds {DOMAIN}::{OP_TYPE} without its function body, and the operator library was not registered",
        "run `deploynorm plugins build` and use deploynorm.ort.session or deploynorm.ort.register(options), or export "
        "again without --no-function",
    ),
    _Known(
        "is not a registered function/op|No Op registered for",
        ModelError,
        "holds an operator that onnxruntime {version} does not know",
        "pass the library that brings it with --plugins, or a newer onnxruntime",
    ),
    _Known(
        "Domain already set in registry",
        InputError,
        "was opened with session options that have our operator library twice",
        "register it with deploynorm.ort.register(options) alone, which knows what it has registered",
    ),
    _Known(
        "Unsupported model IR version|is under development and support for this is limited|unknown model IR version",
        BackendError,
        "is newer than onnxruntime {version} reads",
        "upgrade onnxruntime, or export with a lower --opset",
    ),
    _Known(
        "INVALID_PROTOBUF|No graph was found in the protobuf",
        ModelError,
        "not an ONNX file, or cut short",
        "export it again",
    ),
    _Known(
        "[Ee]xternal data",
        ModelError,
        "its external data cannot be read",
        "keep the data file beside the model, and pass the model as a path",
    ),
    _Known(
        "Could not find an implementation for",
        BackendError,
        "holds an operator that onnxruntime {version} lacks for this type and provider",
        "run it on another provider, or export it in float32",
    ),
    _Known(
        r"Type 'tensor\(\w+\)' of input parameter .* is invalid",
        ModelError,
        "holds an operator of a type that onnxruntime {version} or the plugin library does not take",
        "export it in float32, or build the plugin library for that type",
    ),
)


def explain(where: str, error: Exception) -> DeployNormError:
    """The error of ONNX Runtime as one of ours."""
    version, text = import_onnxruntime().__version__, _plain(error)
    for known in _KNOWN:
        if re.search(known.text, str(error)):
            return known.kind(where, known.problem.format(version=version), got=text, fix=known.fix)
    return ModelError(where, f"onnxruntime {version} cannot run the model", got=text)


def _plain(error: Exception) -> str:
    """ONNX Runtime's text without its codes, the path, its source lines and its line breaks."""
    text = re.sub(
        r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:)?", "", " ".join(str(error).split())
    )
    return re.sub(r"/onnxruntime_src/.*?\) (?=[A-Z])", "", text).rstrip(". ")
