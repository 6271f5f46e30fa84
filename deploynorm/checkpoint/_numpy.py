"""Reading arrays by their names: an .npz or .npy of NumPy, or a bare pickle of a dict of arrays, as leras writes."""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from deploynorm.arrays import to_tensor
from deploynorm.checkpoint._limits import time_limit
from deploynorm.checkpoint._plain import PLAIN, NumberType
from deploynorm.errors import ModelError

_MAGIC = b"\x93NUMPY"
_FIX = "write its arrays again with numpy.savez(path, **arrays)"
_MOST_AXES = 32


def is_npz(data: bytes) -> bool:
    """Whether it is a zip archive of arrays and nothing else; its members were checked."""
    if data[:4] != b"PK\x03\x04":
        return False
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def is_npy(data: bytes) -> bool:
    return data.startswith(_MAGIC)


def is_pickle(data: bytes) -> bool:
    """Whether it begins as a pickle of protocol 2 or later does."""
    return data[:1] == b"\x80"


def read_npz(data: bytes, where: str, *, trust: bool) -> dict[str, Tensor]:
    """The arrays by name, as tensors; the reader of `_detect.FORMATS`. Only if trusted, objects may be among them."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=trust) as archive:
            names = Counter(archive.files)
            arrays = {name: archive[name] for name in names}
    except Exception as error:  # a damaged header is evaluated, and raises nearly anything
        raise _damaged(where, error) from error
    if twice := [name for name, count in names.items() if count > 1]:
        raise ModelError(where, "arrays of one name", got=", ".join(twice[:3]), fix=_FIX)
    return _tensors(arrays, where, "a NumPy .npz")


def read_npy(data: bytes, where: str, *, trust: bool) -> dict[str, Tensor]:
    """The arrays of a dict that numpy.save wrote, which pickles it; see `read_pickle`."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
    except Exception as error:
        raise _damaged(where, error) from error
    if not dtype.hasobject or shape != ():
        problem = "one NumPy array without a name, and no state dict"
        raise ModelError(where, problem, got=f"{dtype} {shape}", expected="arrays by their names", fix=_FIX)
    content = _unpickled(stream.read(), where, trust=trust)
    inner = content.item() if isinstance(content, np.ndarray) and content.shape == () else content
    return _tensors(inner, where, "a NumPy .npy")


def read_pickle(data: bytes, where: str, *, trust: bool) -> dict[str, Tensor]:
    """The arrays of a pickled dict. Unless trusted, nothing that it names is called but the makers of arrays."""
    return _tensors(_unpickled(data, where, trust=trust), where, "a pickle that torch.save did not write")


def _tensors(content: object, where: str, kind: str) -> dict[str, Tensor]:
    items: Mapping[object, object] = content if isinstance(content, Mapping) else {}
    arrays = {k: value for k, value in items.items() if isinstance(k, str) and isinstance(value, np.ndarray)}
    if not arrays or len(arrays) < len(items):
        got = f"a dict of {len(content)}" if isinstance(content, Mapping) else type(content).__name__
        problem = f"{kind}, and what is in it is no dict of arrays"
        fix = "load it where it was made and write it with torch.save(model.state_dict(), path)"
        raise ModelError(where, problem, got=got, expected="arrays by their names", fix=fix)
    tensors = {}
    for name, array in arrays.items():
        try:
            tensors[name] = to_tensor(array.astype(array.dtype.newbyteorder("=")))
        except (TypeError, ValueError) as error:
            raise ModelError(where, f"{name!r} is no array of numbers", got=array.dtype, fix=_FIX) from error
    return tensors


def _unpickled(data: bytes, where: str, *, trust: bool) -> Any:
    try:
        if trust:
            return pickle.loads(data)
        with time_limit(len(data), where):
            return _values(_Unpickler(io.BytesIO(data)).load())
    except _NamedError as error:
        expected, fix = "NumPy arrays by their names", f"{_FIX}, or pass --trust-pickle if you trust whoever made it"
        problem = "loading the file would run code that it names"
        raise ModelError(where, problem, got=error, expected=expected, fix=fix) from error
    except ModelError:
        raise
    except Exception as error:  # pickle raises nearly anything on damaged files
        raise _damaged(where, error) from error


def _values(content: Any) -> Any:
    if isinstance(content, _Array):
        return _values(content.value.item()) if content.value.dtype.hasobject else content.value
    return {name: _values(value) for name, value in content.items()} if isinstance(content, dict) else content


def _damaged(where: str, error: Exception) -> ModelError:
    problem = f"the file cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ModelError(where, problem.rstrip(": "), fix=f"it may be damaged: {_FIX}")


class _NamedError(Exception):
    """What a pickle names that is not called."""


class _Unpickler(pickle._Unpickler):  # that in C makes a list as long as the largest number that a file puts there
    def find_class(self, module: str, name: str) -> Any:
        called = _CALLED.get(f"{module}.{name}")
        if called is None:
            raise _NamedError(f"{module}.{name}")
        # One for each, for a pickle can set the attributes of what it names.
        return lambda *arguments: called(*arguments)

    def persistent_load(self, pid: Any) -> Any:
        raise _NamedError("a persistent id")


class _Array:
    """Takes the place of numpy.ndarray until its values come."""

    value: npt.NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        if isinstance(content, list) and kind.code == "O8" and shape == ():
            self.value = np.empty((), object)
            self.value[()] = content[0]
        else:
            self.value = _array(content, kind, shape, "F" if fortran else "C")


def _array(content: Any, kind: NumberType, shape: Any, order: str) -> npt.NDArray[Any]:
    sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not re.fullmatch(r"[<>=|][biuf][1248]", f"{kind.order}{kind.code}") or not sizes or len(shape) > _MOST_AXES:
        raise ValueError(f"{kind.order}{kind.code} {shape} is no array of numbers")
    values = np.frombuffer(content, np.dtype(f"{kind.order}{kind.code}"))
    if values.size != math.prod(shape):
        raise ValueError(f"{values.size} values for the shape {shape}")
    return values.reshape(shape, order="F" if order == "F" else "C")


def _bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes as {encoding}")
    return text.encode("latin1")


_CALLED: Mapping[str, Callable[..., Any]] = {
    **{name: called for name, called in PLAIN.items() if name.startswith("numpy")},
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: _Array() for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")},
    "_codecs.encode": _bytes,
    "__builtin__.bytes": lambda: b"",
    "collections.OrderedDict": OrderedDict,
}
"""What a pickle of arrays may name, and what is called in its place."""
