"""State dicts: loading one strictly, and looking for NaN and infinity."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deploynorm.checkpoint._wrappers import prefix_that_fits, without_prefix, without_wrappers
from deploynorm.errors import DeployNormError, ModelError

_SHOWN = 5
_COMPARED = 500
"""Names of the file that are compared with one that is missing: each takes some 50 us."""


def load_strictly(model: nn.Module, state: Mapping[str, Any], where: str, strip_prefix: str | None = None) -> list[str]:
    """Loads a state dict into a network that it fits name for name and shape for shape, else raises ModelError.

    The versions of the layers that it was written from (its _metadata) go with it: layers change older entries by them.

    Args:
        model: The network.
        state: The state dict, with the extra state of layers that have one.
        where: The file, for messages.
        strip_prefix: Of the part to load, where it holds more than this network.

    Returns:
        What was done to make it fit.
    """
    _check_allocated(chain(model.named_parameters(), model.named_buffers()), where, "build the network on the CPU")
    check_allocated(state, where)
    _check_versions(state, where)
    expected = model.state_dict()
    notes: list[str] = []
    if strip_prefix is not None:
        state, notes = without_prefix(state, strip_prefix, where)
    known = {*expected, *(f"{path}." for path, _ in model.named_modules())}
    state, removed = without_wrappers(state, known)
    notes += removed
    own = dict(_tensors(expected))
    shapes = [
        f"{name} {tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the network"
        for name, tensor in _tensors(state)
        if name in own and tensor.shape != own[name].shape
    ]
    cause: Exception | None = None
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    try:
        if len(state) > 10 * (len(expected) + 1000):
            raise KeyError(f"{len(unexpected)} names too many")  # torch takes minutes to say so
        # Not strict, so that the layers' own loading rules (older formats, resized buffers) decide what is wrong.
        result = model.load_state_dict(state, strict=False)
        missing, unexpected, shapes = result.missing_keys, result.unexpected_keys, []
    except Exception as error:  # a layer's loading rule is the user's code
        cause = error
    if not (cause or missing or unexpected):
        return notes
    if isinstance(cause, DeployNormError):  # of a layer of ours
        raise ModelError(
            where, f"{cause.where}: {cause.problem}", got=cause.got, expected=cause.expected, fix=cause.fix
        ) from cause
    kinds = {"missing from the file": missing, "unknown to the network": unexpected, "of another shape": shapes}
    problems = "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names)
    if alike := _alike(missing, unexpected):
        problems += f"; alike: {', '.join(alike)}"
    problem = f"the state dict does not fit {type(model).__name__}"
    wanted = f"the {len(expected)} tensors of the network, strictly"
    fix = "give the factory (--factory) and its arguments that the file was trained with"
    if (prefix := prefix_that_fits(state, expected)) is not None:
        fix = f"pass --strip-prefix {prefix} if the network is that part of the file"
    raise ModelError(where, problem, got=problems or str(cause), expected=wanted, fix=fix) from cause


def _alike(missing: list[str], unexpected: list[str]) -> list[str]:
    """For some names of the network that the file lacks, the closest of the file that the network lacks."""
    pairs = ((name, difflib.get_close_matches(name, unexpected[:_COMPARED], 1)) for name in missing[:_SHOWN])
    return [f"{close[0]} in the file and {name} in the network" for name, close in pairs if close]


def check_finite(model: nn.Module, where: str) -> None:
    """Raises ModelError if a parameter or a running statistic holds NaN or infinity, or has no values.

    Buffers that are not saved (persistent=False) are a layer's scratch space and may hold anything.
    """
    _check_allocated(chain(model.named_parameters(), model.named_buffers()), where, "build the network on the CPU")
    check_finite_tensors(model.state_dict(), where)


def check_finite_tensors(state: Mapping[str, Any], where: str) -> None:
    """Raises ModelError if a tensor of a state dict holds NaN or infinity."""
    broken = []
    for name, tensor in _tensors(state):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # isfinite knows no 8-bit floats.
        bad = int((~torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float())).sum())
        if bad:
            broken.append(f"{name} ({bad} of {tensor.numel()})")
    if broken:
        problem, expected = f"NaN or infinity in {len(broken)} tensors", "finite parameters and running statistics"
        fix = "take an earlier checkpoint: the training has diverged"
        raise ModelError(where, problem, got=some(broken), expected=expected, fix=fix)


def check_allocated(state: Mapping[str, Any], where: str) -> None:
    """Raises ModelError for tensors of a state dict that have no values."""
    _check_allocated(_tensors(state), where, "write the file again from a network that has its values")


def _check_allocated(tensors: Iterable[tuple[str, Tensor]], where: str, fix: str) -> None:
    """Raises ModelError for tensors without values: of Lazy layers that have not run, which know no shape yet, and on
    the meta device, where copies from and to them do nothing, silently."""
    lazy, without = [], []
    for name, tensor in tensors:
        if is_lazy(tensor):
            lazy.append(name)
        elif tensor.is_meta:
            without.append(name)
    if lazy:
        lazy_fix = "run it once where it is made: network(torch.zeros(1, 3, 224, 224)) with your sizes"
        raise ModelError(where, "the network has Lazy layers that have not run", got=some(lazy), fix=lazy_fix)
    if without:
        raise ModelError(where, "tensors without values (on the meta device)", got=some(without), fix=fix)


def _check_versions(state: Mapping[str, Any], where: str) -> None:
    versions = getattr(state, "_metadata", {})
    plain = isinstance(versions, Mapping) and all(
        isinstance(path, str) and isinstance(of_layer, Mapping) for path, of_layer in versions.items()
    )
    if not plain:
        problem = "the versions of its layers (_metadata) are damaged"
        raise ModelError(where, problem, fix="write the state_dict() again with torch.save")


def _tensors(state: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    return ((name, value) for name, value in state.items() if isinstance(value, Tensor))


def some(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else "")
