"""State dicts of other projects' FRN and MABN networks, as state dicts of our layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from deploynorm.arrays import to_tensor
from deploynorm.checkpoint._channels_last import channels_first, plain_name
from deploynorm.checkpoint._find import is_extra_state
from deploynorm.checkpoint._foreign_layers import LayerReader, joined
from deploynorm.checkpoint._state import check_allocated, some
from deploynorm.checkpoint._translation import Translation
from deploynorm.errors import InputError, ModelError, check_choice
from deploynorm.layers._checks import check_positive
from deploynorm.layers.frn import _FRN
from deploynorm.sources import OURS, SOURCES
from deploynorm.trace import check_network

_OURS: Final = {"eps_l", "recent_x2", "recent_gz"}
"""Keys that only our own layers have."""

_Group = dict[str, tuple[str, Tensor]]


def translate(
    state_dict: Mapping[str, Tensor | npt.NDArray[Any]],
    source: str = "auto",
    *,
    eps: float | None = None,
    network: nn.Module | None = None,
    where: str = "translate",
) -> Translation:
    """Turns the state dict of another project's FRN or MABN network into one for the same network with our layers.

        translation = translate(torch.load("theirs.pt"), "gupta-abhay")
        print(translation)                                   # each layer, and what became of its tensors
        network.load_state_dict(translation.state_dict)      # with FRN2d where theirs had its FRN

    Parameters of norm layers take our names and the shape (C,). An FRN's epsilon comes as what is added to the mean
    square in the end, `eps` (C,), which FRN2d takes from a state dict in whichever form it has its own. What only
    training needs is dropped. Every other tensor passes through; of TensorFlow's, in the layout of PyTorch. A threshold
    that is a layer of its own stays one, our TLU under its name, unless the network shows that it belongs into the FRN
    before it.

    Args:
        state_dict: Tensors or arrays by name.
        source: Whose layers they are, a name of `deploynorm.sources.SOURCES`; "auto" finds out by names and shapes.
        eps: The number that their layers were built with, for a source whose checkpoints do not store it.
        network: The network with our layers that it is for. It tells FRN from other norms where names do not, and
            which thresholds belong to an FRN.
        where: The file, for messages.

    Returns:
        The state dict and what was done.

    Raises:
        InputError: No such source; eps given where every epsilon is stored.
        ModelError: It is nobody's, or could be of several who compute different numbers; a layer is damaged, or does
            what ours cannot: a threshold for each position, an epsilon of 0.

    Source: the projects that deploynorm/sources.py names.
    """
    check_choice(where, "no such source", source, ["auto", *SOURCES])
    if eps is not None:
        check_positive(where, "eps", eps)
    if network is not None:
        check_network(network, where)
    state = _as_tensors(state_dict, where)
    if ours := [name for name in state if name.rpartition(".")[2] in _OURS]:
        problem, fix = "it has layers of deploynorm already", "give it to deploynorm export, with --factory"
        raise ModelError(where, problem, got=some(ours), fix=fix)
    frn_paths = [] if network is None else [path for path, m in network.named_modules() if isinstance(m, _FRN)]
    if source == "auto":
        translation = _detected(state, where, eps, frn_paths)
    else:
        _check_eps(source, eps, where)
        translation = _translated(state, source, where, eps, frn_paths)
        if not translation.layers:
            raise _not_found(state, source, where)
    translation = translation if network is None else translation.with_thresholds_of(network)
    vars(translation.state_dict)["_metadata"] = getattr(state_dict, "_metadata", OrderedDict())
    return translation


def _as_tensors(state_dict: Any, where: str) -> dict[str, Any]:
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise InputError(where, "no state dict", got=type(state_dict).__name__, expected="tensors by their names")
    state = {name: _as_tensor(name, value, where) for name, value in state_dict.items()}
    odd = [name for name, value in state.items() if not isinstance(value, Tensor) and not is_extra_state(name)]
    if odd:
        got = f"{odd[0]!r}, {type(state[odd[0]]).__name__}"
        raise InputError(where, "a state dict with what is no tensor", got=got, expected="tensors by their names")
    check_allocated(state, where)
    return state


def _as_tensor(name: str, value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, np.ndarray | np.generic):
        return value
    try:
        return to_tensor(np.asarray(value))
    except TypeError as error:
        raise InputError(where, f"{name!r} is no array of numbers", got=value.dtype) from error


def _check_eps(source: str, eps: float | None, where: str) -> None:
    rule = SOURCES[source].eps
    if eps is not None and not (rule.absent or rule.floor):
        problem = f"checkpoints of {SOURCES[source].project} store every epsilon"
        raise InputError(where, problem, got=f"eps={eps}", fix="leave eps out")


def _groups(state: Mapping[str, Any], source: str, where: str) -> dict[str, _Group]:
    """The tensors of each path, by their last name: their key, and they."""
    groups: dict[str, _Group] = {}
    for key, tensor in state.items():
        name = plain_name(key) if SOURCES[source].channels_last else key
        path, _, last = name.rpartition(".")
        if not isinstance(tensor, Tensor):
            continue
        group = groups.setdefault(path, {})
        if last in group:
            got = f"{group[last][0]} and {key}"
            raise ModelError(where, f"two tensors of the file are {name}", got=got, fix="leave one of them out")
        group[last] = key, tensor
    return groups


def _translated(
    state: Mapping[str, Any],
    source: str,
    where: str,
    eps: float | None,
    frn_paths: Collection[str],
    *,
    named: bool = True,
) -> Translation:
    """A state dict by the rules of one source; one without layers where it has none of them."""
    row = SOURCES[source]
    reader = LayerReader(row, where, named, eps, frn_paths)
    result: OrderedDict[str, Any] = OrderedDict((name, value) for name, value in state.items() if is_extra_state(name))
    layers, dropped, bare = [], [], []
    turned = 0
    for path, group in _groups(state, source, where).items():
        reading = reader.read(path, {last: tensor for last, (_, tensor) in group.items()})
        if reading is not None:
            layers.append(reading.layer)
            dropped += [group[last][0] for last in reading.dropped]
            entries = dict(reading.entries)
        elif row.channels_last:
            if row.eps.name in group:
                key, fix = group[row.eps.name][0], "put the layer's name before it, as docs/import.md does"
                raise ModelError(where, f"the epsilon {key} is under the name of no layer", fix=fix)
            passed = channels_first({last: tensor for last, (_, tensor) in group.items()})
            turned += sum(new is not group[last][1] for last, (_, new) in passed.items())
            entries = dict(passed.values())
        else:
            entries = {last: tensor for last, (_, tensor) in group.items()}
            if "tau" in row.optional and _is_bare(entries):
                bare.append(path)
        for last, tensor in entries.items():
            name = joined(path, last)
            if name in result:
                raise ModelError(where, f"two tensors of the file are {name}", fix="name the source with --from")
            result[name] = tensor
    notes = [row.note] if row.note else []
    assumed = {layer.eps[0] for layer in layers if layer.eps is not None and not layer.tensors.get("eps")}
    if assumed and eps is None:
        default = f"{assumed.pop():.3g} is what layers of {row.project} have by default"
        notes.append(f"the file stores no epsilon: {default}, and --eps takes another")
    if bare:
        notes.append(f"an FRN without a threshold and a GroupNorm have the same names: {some(bare)} stay as they are")
    if turned:
        notes.append(f"{turned} kernels have the layout of PyTorch now, (out, in, H, W)")
    return Translation(source, result, tuple(layers), tuple(dropped), tuple(notes))


def _is_bare(tensors: Mapping[str, Tensor]) -> bool:
    return tensors.keys() == {"weight", "bias"} and all(tensor.dim() == 1 for tensor in tensors.values())


def is_foreign(state: Mapping[str, Any]) -> bool:
    """Whether there are FRN or MABN layers in a state dict that another project stores so, and we do not."""
    if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in state.values()):
        return False
    best, refused = _candidates(state, "", None, ())
    return bool(refused or best) and OURS not in best


def _candidates(
    state: Mapping[str, Any], where: str, eps: float | None, frn_paths: Collection[str]
) -> tuple[dict[str, Translation], list[ModelError]]:
    """What the sources that know most layers of a state dict make of it, and why others refused it."""
    slashes = any("/" in name for name in state)
    found: dict[str, Translation] = {}
    refused: list[ModelError] = []
    for name, row in SOURCES.items():
        if row.channels_last == slashes:
            given = eps if row.eps.absent or row.eps.floor else None
            try:
                found[name] = _translated(state, name, where, given, frn_paths, named=False)
            except ModelError as error:
                refused.append(error)
    most = max((each.norms for each in found.values()), default=0)
    return {name: each for name, each in found.items() if each.norms == most and most}, refused


def _detected(state: Mapping[str, Any], where: str, eps: float | None, frn_paths: Collection[str]) -> Translation:
    """By the rules of the source that knows most of its layers; of several that agree about every number, the first."""
    best, refused = _candidates(state, where, eps, frn_paths)
    if not best:
        raise refused[0] if refused else _not_found(state, "auto", where)
    first, *others = best
    if different := [name for name in others if not _agree(best[first], best[name])]:
        names = [first, *different]
        problem = "the state dict could be of several projects, whose layers compute different numbers"
        got = "; ".join(f"{name}: {SOURCES[name].project}, epsilon {best[name].epsilons}" for name in names)
        fix = f"name yours: {' or '.join(f'--from {name}' for name in names)}"
        raise ModelError(where, problem, got=got, fix=fix)
    _check_eps(first, eps, where)
    translation = _translated(state, first, where, eps, frn_paths)
    alike = f"; those of {', '.join(others)} are alike" if others else ""
    return translation.noting(f"found to be layers of {SOURCES[first].project}{alike}")


def _agree(one: Translation, other: Translation) -> bool:
    a, b = one.state_dict, other.state_dict
    return a.keys() == b.keys() and all(a[name] is b[name] or _equal(a[name], b[name]) for name in a)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether both hold the same values, NaN among them."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _not_found(state: Mapping[str, Any], source: str, where: str) -> ModelError:
    of = "a project that we know" if source == "auto" else SOURCES[source].project
    fix = f"name the source, one of {', '.join(SOURCES)}" if source == "auto" else "pass --from auto, which finds out"
    got = f"{len(state)} tensors: {some(list(state))}"
    return ModelError(where, f"no FRN and no MABN layer of {of} is in it", got=got, fix=fix)
