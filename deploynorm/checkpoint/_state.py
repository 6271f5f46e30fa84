"""State dicts: finding one in a checkpoint, loading it strictly, and looking for NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from deploynorm.errors import ModelError

_KEYS = ("model", "state_dict", "ema")
_WRAPPERS = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}
_SHOWN = 5


def find_state_dict(content: Any) -> tuple[dict[str, Tensor], list[str]] | None:
    """The state dict that a checkpoint is or holds under "model", "state_dict" or "ema", and where it was found."""
    if _is_state_dict(content):
        return dict(content), []
    found = [key for key in _KEYS if isinstance(content, Mapping) and _is_state_dict(content.get(key))]
    if not found:
        return None
    others = "".join(f"; the one under {other!r} is not used" for other in found[1:])
    return dict(content[found[0]]), [f"the state dict is under {found[0]!r}{others}"]


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], where: str) -> list[str]:
    """Loads a state dict into a network that it fits name for name and shape for shape, else raises ModelError.

    Returns what was done to make it fit: prefixes of DataParallel and torch.compile that were removed from every name.
    """
    _check_allocated(chain(model.named_parameters(), model.named_buffers()), where, "build the network on the CPU")
    _check_allocated(state.items(), where, "write the file again from a network that has its values")
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    state, notes = _unwrapped(state, expected)
    shapes = [
        f"{name} {tuple(tensor.shape)} in the file, {tuple(expected[name])} in the network"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name]
    ]
    cause: Exception | None = None
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    try:
        # Not strict, so that the layers' own loading rules (older formats, resized buffers) decide what is wrong.
        result = model.load_state_dict(state, strict=False)
        missing, unexpected, shapes = result.missing_keys, result.unexpected_keys, []
    except Exception as error:  # a layer's loading rule is the user's code
        cause = error
    if not (cause or missing or unexpected):
        return notes
    kinds = {"missing from the file": missing, "unknown to the network": unexpected, "of another shape": shapes}
    problems = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names)
    problem = f"the state dict does not fit {type(model).__name__}"
    wanted = f"the {len(expected)} tensors of the network, strictly"
    fix = "give the factory (--factory) and its arguments that the file was trained with"
    raise ModelError(where, problem, got=problems or str(cause), expected=wanted, fix=fix) from cause


def check_finite(model: nn.Module, where: str) -> None:
    """Raises ModelError if a parameter or a running statistic holds NaN or infinity, or has no values.

    Buffers that are not saved (persistent=False) are a layer's scratch space and may hold anything.
    """
    _check_allocated(chain(model.named_parameters(), model.named_buffers()), where, "build the network on the CPU")
    broken = []
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # isfinite knows no 8-bit floats.
        bad = int((~torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float())).sum())
        if bad:
            broken.append(f"{name} ({bad} of {tensor.numel()})")
    if broken:
        problem, expected = f"NaN or infinity in {len(broken)} tensors", "finite parameters and running statistics"
        fix = "take an earlier checkpoint: the training has diverged"
        raise ModelError(where, problem, got=_some(broken), expected=expected, fix=fix)


def _check_allocated(tensors: Iterable[tuple[str, Tensor]], where: str, fix: str) -> None:
    """Raises ModelError for tensors on the meta device: copies from and to them do nothing, silently."""
    without = [name for name, tensor in tensors if tensor.is_meta]
    if without:
        raise ModelError(where, "tensors without values (on the meta device)", got=_some(without), fix=fix)


def _unwrapped(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], list[str]]:
    notes = []
    # A network may have a part of that name itself, so names that it knows keep their prefix.
    while not any(name in expected for name in state):
        prefix = next((prefix for prefix in _WRAPPERS if all(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            break
        state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
        notes.append(f"the prefix {prefix!r} of {_WRAPPERS[prefix]} was removed from every name")
    return state, notes


def _is_state_dict(content: Any) -> bool:
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else "")
