"""Reading a .safetensors file, which holds a state dict and nothing else."""

from __future__ import annotations

from torch import Tensor

from deploynorm.errors import BackendError, ModelError


def is_safetensors(data: bytes) -> bool:
    """Whether the bytes begin with the length of a JSON header, and with such a header."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def load_tensors(data: bytes, where: str, *, trust: bool) -> dict[str, Tensor]:
    """The tensors by name; the reader of `_detect.FORMATS`. No such file holds code, so `trust` changes nothing."""
    try:
        from safetensors.torch import load
    except ImportError as error:
        problem = "a safetensors file, and the package that reads it is not installed"
        raise BackendError(where, problem, fix="pip install 'deploynorm[safetensors]'") from error
    try:
        return load(data)
    except Exception as error:  # its own error, and KeyError for a type that this torch lacks
        problem = f"the safetensors file cannot be read: {type(error).__name__}: {error}"
        raise ModelError(where, problem, fix="copy, download or write the file again") from error
