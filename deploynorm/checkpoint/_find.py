"""Finding the weights in what a file holds: a network or a state dict, bare or under a key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from deploynorm.errors import InputError, ModelError

_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "ema")
"""Where weights are, in the order in which timm takes them: an average before the weights that it is of."""

_DEPTH = 3


def check_dicts(content: Any, where: str) -> None:
    """Raises ModelError for an OrderedDict that a pickle gave attributes, which hide its methods: "items": 3."""
    todo, seen = [content], set[int]()
    while todo:
        value = todo.pop()
        if not isinstance(value, dict | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        attributes = getattr(value, "__dict__", {})
        if set(attributes) - {"_metadata"}:
            got = ", ".join(set(attributes) - {"_metadata"})
            raise ModelError(where, "a dict of the file has attributes that no dict has", got=got)
        todo += [*attributes.values(), *(value.values() if isinstance(value, dict) else value)]


def find_weights(content: Any, where: str, key: str | None = None) -> tuple[Any, tuple[str, ...]] | None:
    """The network or state dict that a file's content is or holds under a key, and where it was found.

    Args:
        content: What the file holds.
        where: The file, for messages.
        key: The key to look under, "ema.module" for one inside another; by default the first known one.

    Returns:
        None where there is none.

    Raises:
        InputError: There is none under `key`.
        ModelError: There are several, all under keys that are not known.
    """
    if key is None and _are_weights(content):
        return content, ()
    found = dict(_inside(content))
    known = [name for name in _KEYS if name in found] or list(found)
    chosen = known[0] if key is None and known else key
    if key is not None and key not in found:
        expected = ", ".join(found) or "no --key, for the file has no such parts"
        raise InputError("--key", f"{where} has no network and no state dict there", got=key, expected=expected)
    if chosen is None:
        return None
    if key is None and chosen not in _KEYS and len(found) > 1:
        problem = "several state dicts, and none is under a known key"
        raise ModelError(where, problem, got=", ".join(found), expected=", ".join(_KEYS), fix="choose one with --key")
    kind = "network" if isinstance(found[chosen], nn.Module) else "state dict"
    others = [f"the one under {name!r} is not used" for name in found if name != chosen]
    choice = ["--key chooses"] if others else []
    return found[chosen], ("; ".join([f"the {kind} is under {chosen!r}", *others, *choice]),)


def is_state_dict(content: Any) -> bool:
    """Whether something is tensors by their names; a layer's extra state, under its own name, may be anything."""
    if not isinstance(content, Mapping):
        return False
    return any(isinstance(value, Tensor) for value in content.values()) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or is_extra_state(name)) for name, value in content.items()
    )


def is_extra_state(name: object) -> bool:
    """Whether a name of a state dict is that of what a layer's get_extra_state returned."""
    return isinstance(name, str) and name.rpartition(".")[2] == "_extra_state"


def _are_weights(content: Any) -> bool:
    return isinstance(content, nn.Module) or is_state_dict(content)


def _inside(content: Any, depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """All that are weights in a dict, or in a dict inside it, by key."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(key, str) and _are_weights(value):
            yield key, value
        elif isinstance(key, str) and depth > 1:
            yield from ((f"{key}.{name}", inner) for name, inner in _inside(value, depth - 1))
