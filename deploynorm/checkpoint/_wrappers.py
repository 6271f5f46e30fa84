"""What wraps a network in training, and leaves its name in the names of the parameters."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from deploynorm.errors import InputError

PREFIXES = {"module.": "DataParallel", "_orig_mod.": "torch.compile", "model.": "Lightning"}
"""What stands before every name of the network inside, and what put it there."""

_COUNTER = "n_averaged"
"""The one buffer of AveragedModel itself."""

_INNER = re.compile(r"(?<![^.])(_orig_mod|module)\.")
_DEPTH = 5  # wrappers around wrappers


def without_prefix(state: Mapping[str, Any], prefix: str, where: str) -> tuple[Mapping[str, Any], list[str]]:
    """The part of a state dict whose names begin with a prefix, without it, and what was left out.

    Raises:
        InputError: No name begins so.
    """
    prefix = prefix.rstrip(".") + "."
    left = [name for name in state if not name.startswith(prefix)]
    if len(left) == len(state):
        expected = ", ".join(list(dict.fromkeys(name.partition(".")[0] + "." for name in state if "." in name))[:8])
        raise InputError("--strip-prefix", f"no name in {where} begins so", got=prefix, expected=expected or None)
    notes = [f"the prefix {prefix!r} was removed"]
    if left:
        notes.append(f"{len(left)} names without it were left out: {', '.join(left[:5])}{', ...' * (len(left) > 5)}")
    return _renamed(state, _removing(prefix)), notes


def without_wrappers(state: Mapping[str, Any], known: Collection[str]) -> tuple[Mapping[str, Any], list[str]]:
    """A state dict without what wrappers put into its names, and what was removed.

    Args:
        state: The state dict.
        known: The network's names, and its modules' with a dot behind; a name that it knows stays as it is, for a
            network may have a part of a wrapper's name itself.
    """
    notes = []
    for _ in range(_DEPTH):
        names = [name for name in state if name != _COUNTER]
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names)), None)
        if prefix is None or not names or any(name in known for name in state):
            break
        wrapper = PREFIXES[prefix] if len(names) == len(state) else "AveragedModel"
        state = _renamed(state, _removing(prefix))
        notes.append(f"the prefix {prefix!r} of {wrapper} was removed from every name")
    taken = set(state)

    def bare(name: str) -> str:
        short = name if name in known else _INNER.sub("", name)
        return short if short in known and short not in taken else name

    if any(bare(name) != name for name in taken):
        state = _renamed(state, bare)
        notes.append("names of compiled or parallel parts were shortened: '_orig_mod.' or 'module.' inside them")
    return state, notes


def prefix_that_fits(state: Mapping[str, Any], wanted: Collection[str]) -> str | None:
    """The prefix before each of the network's names in a state dict that holds more, where there is one."""
    first = next(iter(wanted), "")
    prefixes = (name[: -len(first)] for name in state if first and name.endswith(f".{first}"))
    return next((prefix for prefix in prefixes if all(prefix + name in state for name in wanted)), None)


def _removing(prefix: str) -> Callable[[str], str | None]:
    return lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None


def _renamed(state: Mapping[str, Any], new: Callable[[str], str | None]) -> OrderedDict[str, Any]:
    """A state dict under other names, of which None leaves one out; its layers keep the versions in its _metadata."""
    renamed = ((new(name), value) for name, value in state.items())
    result = OrderedDict((name, value) for name, value in renamed if name is not None)
    # Of a wrapper and the network inside that takes its place, the inner one comes last.
    paths = ((new(f"{path}."), of_layer) for path, of_layer in getattr(state, "_metadata", {}).items())
    versions = OrderedDict((path[:-1], of_layer) for path, of_layer in paths if path is not None)
    vars(result)["_metadata"] = versions
    return result
