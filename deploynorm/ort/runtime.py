"""The package onnxruntime: importing it, its providers, and options for quiet sessions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from deploynorm.errors import BackendError, InputError

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS: Final[Mapping[str, tuple[str, dict[str, str]]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # TF32 keeps 10 bits of a float32 product: no float32 parity could be judged.
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
    "tensorrt": ("TensorrtExecutionProvider", {}),
}
"""The short names of providers, with ONNX Runtime's own names and the options they are given."""

_INSTALL_CPU = "pip install 'deploynorm[cpu]'"
_INSTALL_GPU = "pip uninstall onnxruntime, then pip install 'deploynorm[gpu]'"


def import_onnxruntime() -> Any:
    """The module onnxruntime; BackendError where it cannot be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        fix = f"{_INSTALL_CPU} (and 'numpy<2' for onnxruntime 1.18)"
        raise BackendError("onnxruntime", f"the package cannot be imported: {error}", fix=fix) from error
    return onnxruntime


def quiet_options() -> onnxruntime.SessionOptions:
    """Options of a session that logs fatal errors only: all others are raised, as errors of ours."""
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 4
    return options


def find_provider(name: str, ort: Any) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's name and options of a provider, which may be given by either name."""
    present = ort.get_available_providers()
    full, settings = PROVIDERS.get(name, (name, {}))
    if full not in present and full == name and name not in ort.get_all_providers():
        raise InputError("onnxruntime", "unknown provider", got=repr(name), expected=" or ".join(PROVIDERS))
    if full not in present:
        problem = f"onnxruntime {ort.__version__} was built without the provider {name!r}"
        got = [known for known, (full, _) in PROVIDERS.items() if full in present]
        fix = _INSTALL_CPU if name == "cpu" else _INSTALL_GPU
        raise BackendError("onnxruntime", problem, got=got, expected=name, fix=fix)
    return full, settings
