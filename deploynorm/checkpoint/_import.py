"""Checkpoints of other projects, as our own or as state dicts of our layers."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from deploynorm.checkpoint._detect import ACCEPTED, detect
from deploynorm.checkpoint._factory import build, current_directory_on_path
from deploynorm.checkpoint._find import check_dicts, find_weights
from deploynorm.checkpoint._foreign_layers import TranslatedLayer, joined
from deploynorm.checkpoint._load import read_file
from deploynorm.checkpoint._own import is_own_format, outline, save
from deploynorm.checkpoint._state import check_finite, check_finite_tensors, load_strictly
from deploynorm.checkpoint._translate import translate
from deploynorm.checkpoint._translation import Translation
from deploynorm.checkpoint._wrappers import without_prefix, without_wrappers
from deploynorm.errors import InputError, ModelError
from deploynorm.files import as_path, staging
from deploynorm.layers.cenconv import _CenConv
from deploynorm.layers.frn import _FRN, TLU
from deploynorm.layers.mabn import _MABN
from deploynorm.trace import unwrapped


@dataclass(frozen=True, eq=False)
class Import:
    """A checkpoint of another project for our layers; `print` shows what was done.

    Attributes:
        translation: The state dict, and what became of each layer.
        network: The factory's network with these weights, on the CPU and in evaluation mode; None without a factory.
        factory, kwargs: That made it.
        notes: What was done to the file besides.
    """

    translation: Translation
    network: nn.Module | None = None
    factory: str | None = None
    kwargs: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def save(self, path: Path | str) -> None:
        """Writes a checkpoint as `deploynorm.save` does, or without a factory the state dict alone."""
        if self.network is not None and self.factory is not None:
            save(path, factory=self.factory, kwargs=self.kwargs, model=self.network)
            return
        path = as_path("save", path)
        archive = io.BytesIO()
        torch.save(self.translation.state_dict, archive)
        with staging(path) as folder:
            (folder / path.name).write_bytes(archive.getbuffer())

    def __str__(self) -> str:
        return "\n".join([str(self.translation), *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """What was done, for JSON."""
        about = self.translation.to_dict()
        return {**about, "factory": self.factory, "notes": [*about["notes"], *self.notes]}


def import_checkpoint(
    path: Path | str,
    source: str = "auto",
    *,
    factory: str | None = None,
    factory_kwargs: Mapping[str, Any] | None = None,
    key: str | None = None,
    strip_prefix: str | None = None,
    eps: float | None = None,
    trust_pickle: bool = False,
) -> Import:
    """Reads a checkpoint of another project's FRN or MABN network for our layers; see `translate`.

        # nets.py has def hynet() -> nn.Module, with our layers
        imported = import_checkpoint("theirs.pth", "kornia", factory="nets:hynet")
        print(imported)
        imported.save("model.pt")                          # deploynorm export model.pt --factory nets:hynet

    Args:
        path: A file that `deploynorm.load` reads a state dict from, an .npz or a pickled dict of arrays among them.
        source: Whose layers they are; "auto" finds out.
        factory: "pkg.mod:function", which makes the network with our layers. Its state dict must fit name for name.
        factory_kwargs: Its keyword arguments.
        key, strip_prefix, trust_pickle: As of `deploynorm.load`.
        eps: The number that their layers were built with, for a source whose checkpoints do not store it.

    Raises:
        ModelError: The file cannot be read, is our own, or is nobody's or several projects'; the network has other
            layers than the file, or another epsilon, or does not fit; or the factory fails.
        InputError: No such source, key or prefix; eps where every epsilon is stored.
    """
    path = as_path("import", path)
    where = str(path)
    state, notes = _read(path, key, trust_pickle)
    if factory is None:
        if factory_kwargs is not None:
            raise InputError(where, "arguments of a factory, and no factory", fix="pass --factory pkg.mod:function")
        if strip_prefix is not None:
            state, more = without_prefix(state, strip_prefix, where)
            notes = (*notes, *more)
        translation = translate(state, source, eps=eps, where=where)
        names = [joined(layer.name, ours) for layer in translation.layers for ours in layer.tensors]
        check_finite_tensors({name: translation.state_dict[name] for name in names}, where)
        return Import(translation, notes=notes)
    network = unwrapped(build(factory, factory_kwargs or {}, where, typed=True))
    known = {*network.state_dict(), *(f"{name}." for name, _ in network.named_modules())}
    state, more = (state, []) if strip_prefix is None else without_prefix(state, strip_prefix, where)
    state, removed = without_wrappers(state, known)
    translation = translate(state, source, eps=eps, network=network, where=where)
    for layer in translation.layers:
        _check_fits(layer, network, where)
    loaded = load_strictly(network, translation.state_dict, where)
    check_finite(network, where)
    notes = (*notes, *more, *removed, *loaded)
    if _has(network, _MABN) and not _has(network, _CenConv):
        notes = (*notes, "the network has no CenConv2d: with plain convolutions it computes something else than theirs")
    return Import(translation, network.cpu().eval(), factory, factory_kwargs, notes)


def _has(network: nn.Module, kind: type) -> bool:
    return any(isinstance(module, kind) for module in network.modules())


def _read(path: Path, key: str | None, trust_pickle: bool) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The state dict in a file, and where in it that was."""
    where, data = str(path), read_file(path)
    with current_directory_on_path() if trust_pickle else nullcontext():
        content: Any = detect(data, where).read(data, where, trust=trust_pickle)
    if isinstance(content, ExportedProgram) or is_own_format(content):
        kind = "a torch.export archive" if isinstance(content, ExportedProgram) else "a deploynorm checkpoint"
        raise ModelError(where, f"{kind}: nothing to import", fix="give it to deploynorm export")
    if not trust_pickle:
        check_dicts(content, where)
    weights, notes = find_weights(content, where, key) or (None, ())
    if weights is None:
        raise ModelError(where, "neither a network nor a state dict", got=outline(content), expected=ACCEPTED)
    return weights.state_dict() if isinstance(weights, nn.Module) else weights, notes


def _check_fits(layer: TranslatedLayer, network: nn.Module, where: str) -> None:
    """Raises ModelError where the network has another layer under the name of this one; none at all is said later."""
    try:
        module = network.get_submodule(layer.name)
    except AttributeError:
        return
    kind = _FRN if layer.kind.startswith("FRN") else _MABN if layer.kind.startswith("MABN") else TLU
    found, built, fix = f"{type(module).__module__}.{type(module).__qualname__}", "", None
    if not isinstance(module, kind):
        fix = "build the network with our layers in place of theirs"
    elif isinstance(module, _FRN) and (module.tau is not None) != layer.has_tau:
        found = f"{layer.kind} with {'no' if layer.has_tau else 'a'} threshold"
        built = "" if layer.has_tau else ", tlu=False"
        fix = "build it so; a threshold that is a layer of its own is a deploynorm.layers.TLU"
    elif isinstance(module, _MABN) and layer.eps and not math.isclose(module.eps, layer.eps[0], rel_tol=1e-6):
        found, built, fix = f"{layer.kind} with eps={module.eps:g}", f", eps={layer.eps[0]:g}", "build it so"
    if fix is not None:
        problem = f"{layer.name or 'the network'} is another layer in the network of the factory"
        expected = f"deploynorm.layers.{layer.kind}({layer.channels}{built})"
        raise ModelError(where, problem, got=found, expected=expected, fix=fix)
