"""Reading a network from a file without running code that the file names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from deploynorm.checkpoint._detect import ACCEPTED, detect
from deploynorm.checkpoint._factory import build, current_directory_on_path
from deploynorm.checkpoint._find import check_dicts, find_weights
from deploynorm.checkpoint._own import is_own_format, outline, unpacked
from deploynorm.checkpoint._state import check_finite, load_strictly
from deploynorm.checkpoint._translate import is_foreign
from deploynorm.errors import InputError, ModelError
from deploynorm.files import as_path
from deploynorm.image import ImageSpec
from deploynorm.trace import Forward, unwrapped


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network as read from a file, and what the file says about it.

    Attributes:
        model: The network, on the CPU and in evaluation mode (that of a .pt2 is in the mode it was traced in).
        kind: "deploynorm" is the format of `save`, "state_dict" weights alone, "module" a pickled network, "pt2" an
            archive of torch.export.
        path: The file.
        sha256: Hash of its bytes, in hexadecimal.
        factory: "pkg.mod:function" that made the network, if one did.
        image, labels, training: As given to `save`.
        example_inputs: The inputs that the network was traced with (.pt2), by the names of forward's arguments.
        exported: The traced program (.pt2).
        notes: What was done to the file to read it, such as a prefix that was removed from every name.
    """

    model: nn.Module
    kind: Literal["deploynorm", "state_dict", "module", "pt2"]
    path: Path
    sha256: str
    factory: str | None = None
    image: ImageSpec | None = None
    labels: tuple[str, ...] | None = None
    training: Mapping[str, Any] | None = None
    example_inputs: Mapping[str, Tensor] | None = None
    exported: ExportedProgram | None = None
    notes: tuple[str, ...] = ()


def load(
    path: Path | str,
    *,
    factory: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    key: str | None = None,
    strip_prefix: str | None = None,
    trust_pickle: bool = False,
) -> Checkpoint:
    """Reads a network from a file.

        checkpoint = deploynorm.load("model.pt")                       # written by save, or by deploynorm.models.train
        checkpoint = deploynorm.load("own.pt", factory="nets:unet")    # written by save, for a network of your own
        checkpoint = deploynorm.load("weights.pt", factory="nets:unet", kwargs={"width": 16})          # a state dict
        checkpoint.model                                               # the network, on the CPU, in evaluation mode

    It accepts: a checkpoint of `save`; a state dict, bare, under a key or in a .safetensors file, with a factory; a
    pickled network of nn.Module classes of torch.nn, timm and deploynorm; an archive of torch.export.save. Of several
    state dicts it takes an average before the raw weights, as timm does, and `notes` says which.

    Args:
        path: The file.
        factory: "pkg.mod:function", which makes the network that the weights belong to. It overrides the one that
            the file names, which must be one of deploynorm.models; this one may be any. The module is also looked for
            in the current directory.
        kwargs: Its keyword arguments; those in the file by default.
        key: Where the weights are in the file, such as "state_dict", or "ema.module" for a dict inside a dict.
        strip_prefix: What stands before the network's names in a state dict that holds more, such as "encoder."; the
            prefixes of DataParallel, AveragedModel, torch.compile and Lightning are removed without it.
        trust_pickle: Read the file as any pickle or archive is read. This runs whatever code the file names; nothing
            else does.

    Returns:
        The network and what the file says about it.

    Raises:
        ModelError: The file cannot be read, is none of these or damaged, names other code, does not fit the network, or
            holds NaN or infinity; or the factory fails.
        InputError: The file has no such key or prefix.
        BackendError: It is a .safetensors file, and the package safetensors is not installed.
    """
    path = as_path("load", path)
    texts: dict[str, object] = {"factory": factory, "key": key, "strip_prefix": strip_prefix}
    if wrong := [name for name, value in texts.items() if not (value is None or isinstance(value, str))]:
        raise InputError("load", f"{wrong[0]} is no text", got=repr(texts[wrong[0]]))
    if not (kwargs is None or isinstance(kwargs, Mapping)):
        raise InputError("load", "kwargs are no dict by names of arguments", got=repr(kwargs))
    where = str(path)
    data = read_file(path)
    found = partial(Checkpoint, path=path, sha256=hashlib.sha256(data).hexdigest())
    # A pickle that is trusted may name the user's modules, as a factory may.
    with current_directory_on_path() if trust_pickle else nullcontext():
        content: Any = detect(data, where).read(data, where, trust=trust_pickle)
        if isinstance(content, ExportedProgram):
            _refuse(where, "a torch.export archive", factory=factory, kwargs=kwargs, key=key, strip_prefix=strip_prefix)
            model = _module(content, where)
            return found(model, "pt2", example_inputs=_examples(content, model), exported=content)
    if not trust_pickle:
        check_dicts(content, where)
    if is_own_format(content):
        _refuse(where, "a deploynorm checkpoint", key=key, strip_prefix=strip_prefix)
        own = unpacked(content, where)
        name, arguments = factory or own["factory"], own["kwargs"] if kwargs is None else kwargs
        model, notes = _build(name, arguments, own["state_dict"], where, typed=factory is not None)
        about: dict[str, Any] = {key: own[key] for key in ("image", "labels", "training")}
        return found(model, "deploynorm", factory=name, notes=notes, **about)
    weights, notes = find_weights(content, where, key) or (None, ())
    if weights is None:
        raise ModelError(where, "neither a network nor a state dict", got=outline(content), expected=ACCEPTED)
    if isinstance(weights, nn.Module):
        if factory is None:
            _refuse(where, "a pickled network", kwargs=kwargs, strip_prefix=strip_prefix)
        model, more = _unpickled(weights, where, factory, kwargs or {}, strip_prefix)
        return found(model, "module", factory=factory, notes=(*notes, *more))
    if factory is None:
        problem = f"a state dict of {len(weights)} tensors does not say which network it belongs to"
        fix = "pass --factory pkg.mod:function, which makes the network, and --factory-kwargs for its arguments"
        raise ModelError(where, problem, fix=fix)
    model, more = _build(factory, kwargs or {}, weights, where, typed=True, strip_prefix=strip_prefix)
    return found(model, "state_dict", factory=factory, notes=(*notes, *more))


def read_file(path: Path) -> bytes:
    """The bytes of a file; ModelError for none."""
    try:
        return path.read_bytes()
    except OSError as error:
        known = {FileNotFoundError: "no such file", IsADirectoryError: "a folder, not a file"}
        problem = known.get(type(error), f"the file cannot be read: {error.strerror or error}")
        raise ModelError(str(path), problem, expected=ACCEPTED) from error


def _module(program: ExportedProgram, where: str) -> nn.Module:
    try:
        model = program.module()
    except Exception as error:  # torch compiles the graph here
        problem = f"torch cannot run the program: {type(error).__name__}: {error}"
        raise ModelError(where, problem, fix="export the network again") from error
    check_finite(model, where)
    return model


def _examples(program: ExportedProgram, model: nn.Module) -> dict[str, Tensor] | None:
    """The inputs that a program was traced with, where these are tensors, by the names of forward's arguments."""
    positional, named = program.example_inputs or ((), {})
    examples = dict(zip(Forward(model).first(len(positional)).names, positional, strict=True)) | named
    return examples if examples and all(isinstance(example, Tensor) for example in examples.values()) else None


def _unpickled(
    module: nn.Module, where: str, factory: str | None, kwargs: Mapping[str, Any], strip_prefix: str | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """A pickled network, or that of a factory with its weights; and what was done."""
    try:
        module, notes = _bare(module)
        state = module.state_dict()
        if factory is None:
            return _ready(module, where), notes
    except ModelError:
        raise
    except Exception as error:  # a network of another version of its package lacks parts; a damaged one lacks any
        cause = f"{type(error).__name__}: {error}"
        problem = f"the pickled network is damaged, or of another version of its package: {cause}"
        fix = "write its state_dict() with torch.save where it was made, and pass --factory"
        raise ModelError(where, problem, fix=fix) from error
    model, more = _build(factory, kwargs, state, where, typed=True, strip_prefix=strip_prefix)
    return model, (*notes, "its weights were loaded into the network of the factory", *more)


def _build(
    factory: str,
    kwargs: Mapping[str, Any],
    state: Mapping[str, Any],
    where: str,
    *,
    typed: bool,
    strip_prefix: str | None = None,
) -> tuple[nn.Module, tuple[str, ...]]:
    model, notes = _bare(build(factory, kwargs, where, typed=typed))
    try:
        loaded = load_strictly(model, state, where, strip_prefix)
    except ModelError as error:
        if not is_foreign(state):
            raise
        fix = "its FRN or MABN layers are another project's: deploynorm import makes it one for ours"
        raise ModelError(where, error.problem, got=error.got, expected=error.expected, fix=fix) from error
    return _ready(model, where), (*notes, *loaded)


def _bare(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    inner = unwrapped(module)
    return inner, () if inner is module else (f"{type(module).__name__} was removed from the network",)


def _ready(model: nn.Module, where: str) -> nn.Module:
    check_finite(model, where)
    return model.cpu().eval()


_OPTIONS = {
    "factory": "--factory",
    "kwargs": "--factory-kwargs",
    "key": "--key",
    "strip_prefix": "--strip-prefix",
}


def _refuse(where: str, what: str, **given: object) -> None:
    """Raises ModelError for options that such a file does not take."""
    named = [_OPTIONS[name] for name, value in given.items() if value is not None]
    if named:
        raise ModelError(where, f"{what} is whole, and takes no {' and no '.join(named)}", fix="leave it out")
