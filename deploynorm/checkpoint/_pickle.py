"""Reading files of torch.save without running code that they name."""

from __future__ import annotations

import importlib
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from deploynorm.checkpoint._limits import MOST_TENSORS, check_archive, time_limit
from deploynorm.checkpoint._plain import PLAIN
from deploynorm.checkpoint._zip import read_member
from deploynorm.errors import ModelError

TRUST = "or pass --trust-pickle if you trust whoever made the file"

_CLASS_MODULES = ("torch.nn.modules.", "timm.layers.", "timm.models.", "deploynorm.layers.", "deploynorm.models.")
_WRAPPERS = ("torch.nn.parallel.data_parallel.DataParallel", "torch.optim.swa_utils.AveragedModel")

_DATA = re.compile(
    r"torch\.\w+|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.storage\.\w+"
    r"|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout|collections\.(OrderedDict|Counter)"
    r"|_codecs\.encode|builtins\.(set|bytearray|complex)"
)
"""Globals that tensors and plain containers may need, a little too wide: torch's own list has the last word."""

_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_LEGACY_PICKLES = 5
"""The old format is as many pickles in a row: magic number, version, system, the object, storage keys."""


def unpickle(data: bytes, where: str, *, trust: bool, modules: bool = True) -> Any:
    """The object in a file of torch.save, `where`, on the CPU; ModelError if it names other code or cannot be read.

    Unless trusted, it is read with weights_only=True, and the only classes beyond torch's own list of tensors and
    plain data are the nn.Module classes of torch.nn, timm and deploynorm that the file names; with modules=False none.
    NumPy's numbers come as Python's. Trusted, it is read as any pickle is, which runs whatever code it names.
    """
    if trust:
        return _load(data, where, trust=True)
    with time_limit(len(data), where):
        return _unpickle(data, where, modules=modules)


def _unpickle(data: bytes, where: str, *, modules: bool) -> Any:
    try:
        names = named_globals(data, where)
    except ModelError:
        raise
    except Exception as error:  # pickletools raises many types on damaged pickles
        raise _damaged(where, error) from error
    classes = {name: cls for name in names if modules and (cls := _module_class(name, where)) is not None}
    foreign = [name for name in names if name not in classes and name not in PLAIN and not _DATA.fullmatch(name)]
    if foreign:
        raise _refused(where, foreign)
    called: dict[str, Callable[..., Any]] = {**classes, **PLAIN}
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(each, name) for name, each in called.items()]
    with torch.serialization.safe_globals(allowed):
        return _load(data, where, trust=False)


def named_globals(data: bytes, where: str) -> list[str]:
    """Every class and function that the pickles of a torch.save file name, without running them.

    ModelError for a pickle of more tensors than any network has.
    """
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            check_archive(archive, len(data), where)
            members = [member for member in archive.infolist() if member.filename.endswith("/data.pkl")]
            pickles = [read_member(archive, member) for member in members]
        streams = [io.BytesIO(pickle) for pickle in pickles]
    else:
        streams = [io.BytesIO(data)] * _LEGACY_PICKLES
    return list(dict.fromkeys(name for stream in streams for name in _globals_of_one(stream, where)))


def _globals_of_one(stream: io.BytesIO, where: str) -> Iterator[str]:
    strings, tensors = ["", ""], 0
    for opcode, argument, _ in pickletools.genops(stream):
        tensors += opcode.name in ("BINPERSID", "PERSID")  # each names its storage
        if tensors > MOST_TENSORS:
            fix = "write the weights of one network alone with torch.save"
            raise ModelError(where, "the file has too many tensors", expected=f"at most {MOST_TENSORS:,}", fix=fix)
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield f"{_RENAMED.get(module, module)}.{name}"
        elif opcode.name == "STACK_GLOBAL":
            # Its operands may come from the memo, and then this name is wrong; torch refuses the opcode anyway.
            yield ".".join(strings)
        elif isinstance(argument, str):
            strings = [strings[1], argument]


def _module_class(name: str, where: str) -> type[nn.Module] | None:
    """The nn.Module class of that name in torch.nn, timm or deploynorm, or None if it is none."""
    known = name.startswith(_CLASS_MODULES) or name in _WRAPPERS
    if not known or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name, re.ASCII):
        return None
    module_name, _, class_name = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # broken installations raise more than ImportError
        problem = f"its class {name} cannot be imported: {type(error).__name__}: {error}"
        fix = f"install the version of {name.partition('.')[0]} that the network was saved with"
        raise ModelError(where, problem, fix=fix) from error
    cls = getattr(module, class_name, None)
    # A module also holds what it imports, so the class must say that it comes from there.
    if isinstance(cls, type) and issubclass(cls, nn.Module) and f"{cls.__module__}.{cls.__qualname__}" == name:
        return cls
    return None


def _load(data: bytes, where: str, *, trust: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not trust)
    except Exception as error:  # damaged files make torch raise nearly anything, and a trusted one runs its own code
        unknown = re.search(r"GLOBAL (\S+) was not an allowed global|unsupported GLOBAL (\S+)", str(error))
        raise (_refused(where, [unknown[1] or unknown[2]]) if unknown else _damaged(where, error)) from error


def _refused(where: str, names: list[str]) -> ModelError:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    expected = "tensors, plain values and nn.Module classes of torch.nn, timm and deploynorm"
    fix = f"write the state_dict() alone with torch.save and pass --factory, {TRUST}"
    return ModelError(where, "loading the file would run code that it names", got=shown, expected=expected, fix=fix)


def _damaged(where: str, error: Exception) -> ModelError:
    if "Unsupported operand" in str(error):
        problem = "a form of pickle that cannot be read without running the code that it names"
        fix = f"write it again without pickle_protocol, {TRUST}"
        return ModelError(where, problem, expected="torch.save's own pickle protocol, 2", fix=fix)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch puts its advice (which is to load without a check) around the cause, and the documentation link last.
    lines = [line for line in lines if "weights_only" not in line and "Weights only" not in line] or lines
    cause = f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
    fix = "it may be damaged: write it again with torch.save"
    return ModelError(where, f"the file cannot be read: {cause}", fix=fix)
