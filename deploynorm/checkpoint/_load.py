"""Reading a network from a file without running code that the file names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from deploynorm.checkpoint._detect import ACCEPTED, detect
from deploynorm.checkpoint._factory import build, current_directory_on_path
from deploynorm.checkpoint._format import Content, is_own_format, outline
from deploynorm.checkpoint._pickle import unpickle
from deploynorm.checkpoint._pt2 import load_program
from deploynorm.checkpoint._state import check_finite, find_state_dict, load_strictly
from deploynorm.errors import ModelError
from deploynorm.image import ImageSpec

__all__ = ["Checkpoint", "load"]


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
        image: How an image becomes its input.
        labels: Name of each class.
        training: What the training wrote about itself: plain data.
        example_inputs: The inputs, by position, that the network was traced with (.pt2).
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
    example_inputs: tuple[Tensor, ...] | None = None
    exported: ExportedProgram | None = None
    notes: tuple[str, ...] = ()


def load(
    path: Path | str, *, factory: str | None = None, kwargs: Mapping[str, Any] | None = None, trust_pickle: bool = False
) -> Checkpoint:
    """Reads a network from a file.

        checkpoint = deploynorm.load("model.pt")                       # written by save, or by deploynorm.models.train
        checkpoint = deploynorm.load("own.pt", factory="nets:unet")    # written by save, for a network of your own
        checkpoint = deploynorm.load("weights.pt", factory="nets:unet", kwargs={"width": 16})          # a state dict
        checkpoint.model                                               # the network, on the CPU, in evaluation mode

    It accepts: a checkpoint of `save`; a state dict, bare or under "model", "state_dict" or "ema", with a factory; a
    pickled network of nn.Module classes of torch.nn, timm and deploynorm; an archive of torch.export.save.

    Args:
        path: The file.
        factory: "pkg.mod:function", which makes the network that the weights belong to. It overrides the one that
            the file names, which must be one of deploynorm.models; this one may be any. The module is also looked for
            in the current directory.
        kwargs: Its keyword arguments; those in the file by default.
        trust_pickle: Read the file as any pickle or archive is read. This runs whatever code the file names; nothing
            else does.

    Returns:
        The network and what the file says about it.

    Raises:
        ModelError: The file cannot be read, is none of these, names other code, does not fit the network, or holds
            NaN or infinity; or the factory fails.
    """
    path = Path(path)
    where = str(path)
    data = _read(path)
    sha256 = hashlib.sha256(data).hexdigest()
    container = detect(data, where)
    # A pickle that is trusted may name the user's modules, as a factory may.
    with current_directory_on_path() if trust_pickle else nullcontext():
        if container == "pt2":
            return _load_pt2(load_program(data, where, trust=trust_pickle), path, sha256, factory, kwargs)
        content = unpickle(data, where, trust=trust_pickle)
    if isinstance(content, nn.Module):
        return _load_module(content, path, sha256, factory, kwargs)
    if is_own_format(content):
        return _load_own(Content.unpack(content, where), path, sha256, factory, kwargs)
    found = find_state_dict(content)
    if found is None:
        raise ModelError(where, "neither a network nor a state dict", got=outline(content), expected=ACCEPTED)
    if factory is None:
        raise ModelError(
            where,
            f"a state dict of {len(found[0])} tensors does not say which network it belongs to",
            fix="pass --factory pkg.mod:function, which makes the network, and --factory-kwargs for its arguments",
        )
    model, notes = _build(factory, kwargs or {}, found[0], where, typed=True)
    return Checkpoint(model, "state_dict", path, sha256, factory, notes=(*found[1], *notes))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(str(path), "no such file", expected=ACCEPTED) from error
    except IsADirectoryError as error:
        raise ModelError(str(path), "a folder, not a file", expected=ACCEPTED) from error
    except OSError as error:
        raise ModelError(str(path), f"the file cannot be read: {error.strerror or error}") from error


def _load_own(
    content: Content, path: Path, sha256: str, factory: str | None, kwargs: Mapping[str, Any] | None
) -> Checkpoint:
    name = factory or content.factory
    arguments = content.kwargs if kwargs is None else kwargs
    model, notes = _build(name, arguments, content.state_dict, str(path), typed=factory is not None)
    return Checkpoint(
        model, "deploynorm", path, sha256, name, content.image, content.labels, content.training, notes=tuple(notes)
    )


def _load_module(
    module: nn.Module, path: Path, sha256: str, factory: str | None, kwargs: Mapping[str, Any] | None
) -> Checkpoint:
    where = str(path)
    if kwargs is not None and factory is None:
        raise _superfluous(where, "a pickled network", "no arguments")
    notes = []
    try:
        if isinstance(module, nn.DataParallel):
            module = module.module
            notes.append("DataParallel was removed from the network")
        state = module.state_dict()
        if factory is None:
            model = _ready(module, where)
    except ModelError:
        raise
    except Exception as error:  # a network of another version of its package lacks parts; a damaged one lacks any
        raise ModelError(
            where,
            f"the pickled network is damaged, or of another version of its package: {type(error).__name__}: {error}",
            fix="write its state_dict() with torch.save where it was made, and pass --factory",
        ) from error
    if factory is not None:
        model, more = _build(factory, kwargs or {}, state, where, typed=True)
        notes += ["its weights were loaded into the network of the factory", *more]
    return Checkpoint(model, "module", path, sha256, factory, notes=tuple(notes))


def _load_pt2(
    program: ExportedProgram, path: Path, sha256: str, factory: str | None, kwargs: Mapping[str, Any] | None
) -> Checkpoint:
    where = str(path)
    if factory is not None or kwargs is not None:
        raise _superfluous(where, "a torch.export archive", "no factory and no arguments")
    try:
        model = program.module()
    except Exception as error:  # torch compiles the graph here
        raise ModelError(
            where, f"torch cannot run the program: {type(error).__name__}: {error}", fix="export the network again"
        ) from error
    check_finite(model, where)
    examples, named = program.example_inputs or ((), {})
    plain = examples and not named and all(isinstance(example, Tensor) for example in examples)
    return Checkpoint(model, "pt2", path, sha256, example_inputs=tuple(examples) if plain else None, exported=program)


def _build(
    factory: str, kwargs: Mapping[str, Any], state: Mapping[str, Tensor], where: str, *, typed: bool
) -> tuple[nn.Module, list[str]]:
    model = build(factory, kwargs, where, typed=typed)
    notes = load_strictly(model, state, where)
    return _ready(model, where), notes


def _ready(model: nn.Module, where: str) -> nn.Module:
    check_finite(model, where)
    return model.cpu().eval()


def _superfluous(where: str, what: str, given: str) -> ModelError:
    return ModelError(
        where, f"{what} is a whole network and takes {given}", fix="leave --factory and --factory-kwargs out"
    )
