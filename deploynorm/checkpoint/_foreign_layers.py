"""One norm layer of another project, from the tensors under its name to those of ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from deploynorm.errors import ModelError
from deploynorm.layers._precision import compute_dtype
from deploynorm.sources import Source

_SHAPES = {"C": "(C,)", "1C11": "(1, C, 1, 1)", "111C": "(1, 1, 1, C)"}
_TLU = {"tau", "alpha"}
_EPS = "eps"


class TranslatedLayer(NamedTuple):
    """A norm layer that was found.

    Attributes:
        name: Its path in the network.
        kind: The class of deploynorm.layers that its tensors are for now.
        channels: C.
        tensors: Their names by ours; "" where the file has none.
        eps: Smallest and largest effective epsilon of its channels; None for a TLU.
    """

    name: str
    kind: str
    channels: int
    tensors: Mapping[str, str]
    eps: tuple[float, float] | None

    @property
    def has_tau(self) -> bool:
        return "tau" in self.tensors


class Reading(NamedTuple):
    """A layer with its tensors by our names, and the keys that were dropped."""

    layer: TranslatedLayer
    entries: Mapping[str, Tensor]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerReader:
    """Reads the layers of one source.

    Attributes:
        source: Whose layers they are.
        where: The file or function, for messages.
        named: Whether the user named the source: then less has to tell it from others, and a layer that is damaged is
            an error.
        eps: What the layers were built with, in place of what the source's are by default.
        frn_paths: Where the network is known to have FRN layers.
    """

    source: Source
    where: str
    named: bool = True
    eps: float | None = None
    frn_paths: Collection[str] = field(default=())

    def read(self, path: str, tensors: Mapping[str, Tensor]) -> Reading | None:
        """The layer that these tensors of one path are; None for no norm layer of the source.

        Raises:
            ModelError: It has their names and wrong shapes, no dense tensors, none of floats, an epsilon of 0, or a
                threshold that ours cannot have.
        """
        is_tlu = self.source.tlu and "tau" in tensors and tensors.keys() <= _TLU and tensors["tau"].dim() > 0
        if not is_tlu and not self._has_names(path, tensors):
            return None
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
                problem = f"{joined(path, name)} is no dense tensor"
                raise ModelError(self.where, problem, got=f"{tensor.layout} {tensor.dtype} {tensor.device}")
        if is_tlu:
            return self._tlu(path, tensors)
        theirs = {ours: name for ours, name in self.source.names.items() if name in tensors}
        channels = {name: self._channels(tensors[name], ours) for ours, name in theirs.items()}
        c = channels[theirs["weight"]]
        wrong = [name for name, count in channels.items() if not count or count != c]
        eps_name = self.source.eps.name
        if c and eps_name in tensors and not self._is_eps(tensors[eps_name], tensors[theirs["weight"]]):
            wrong.append(eps_name)
        if wrong or not c:
            if self.named and self._is_certain(tensors, channels):
                raise self._misshapen(path, tensors, wrong[0] if wrong else theirs["weight"], c)
            return None
        self._check_floats(path, {name: tensors[name] for name in (*theirs.values(), eps_name) if name in tensors})
        entries = {ours: tensors[name].reshape(-1) for ours, name in theirs.items()}
        dropped = tuple(name for name in tensors if name in self.source.training)
        if self.source.is_mabn:
            return self._mabn(path, c, theirs, entries, dropped)
        eps = self._effective_eps(path, tensors, c, entries["weight"].dtype)
        names = {**theirs, _EPS: eps_name if eps_name in tensors else ""}
        rank = tensors[theirs["weight"]].dim() if self.source.shape == "1C11" else self.source.rank
        kind = f"FRN{max(rank, 3) - 2}d"
        layer = TranslatedLayer(path, kind, c, names, (float(eps.min()), float(eps.max())))
        return Reading(layer, {**entries, _EPS: eps}, dropped)

    def _check_floats(self, path: str, parameters: Mapping[str, Tensor]) -> None:
        for name, tensor in parameters.items():
            if not tensor.is_floating_point():
                problem = f"{joined(path, name)} is no tensor of floats"
                raise ModelError(self.where, problem, got=tensor.dtype, expected="float64, float32 or half precision")

    def _has_names(self, path: str, tensors: Mapping[str, Tensor]) -> bool:
        source, found = self.source, tensors.keys()
        needed = {name for ours, name in source.names.items() if ours not in source.optional}
        if source.eps.name and source.eps.absent is None:
            needed.add(source.eps.name)
        known = {*source.names.values(), source.eps.name, *source.training}
        if not needed <= found <= known:
            return False
        if found.isdisjoint(source.telling) and source.telling:
            # A weight and a bias of (C,) are a group normalization's too.
            bare = source.shape == "C" and not source.is_mabn
            return path in self.frn_paths if bare else self.named
        return True

    def _channels(self, tensor: Tensor, ours: str) -> int | None:
        """C, of a tensor of the source's shape; None for another."""
        shape = tuple(tensor.shape)
        if ours == "running_var" and len(shape) == 4 and shape[0] == shape[2] == shape[3] == 1:
            return shape[1]
        if self.source.shape == "C":
            return shape[0] if len(shape) == 1 else None
        if self.source.shape == "111C":
            return shape[3] if len(shape) == 4 and shape[:3] == (1, 1, 1) else None
        return shape[1] if 2 <= len(shape) <= 5 and shape == (1, shape[1], *(1,) * (len(shape) - 2)) else None

    def _is_eps(self, eps: Tensor, weight: Tensor) -> bool:
        if self.source.eps.per_channel:
            return eps.shape == weight.shape
        return eps.numel() == 1 and eps.dim() <= 1

    def _is_certain(self, tensors: Mapping[str, Tensor], channels: Mapping[str, int | None]) -> bool:
        """Whether names and shapes are so much those of the source that it is its layer, if damaged."""
        beyond = tensors.keys() - {self.source.names["weight"], self.source.names["bias"]}
        return bool(beyond) or all(count is not None for count in channels.values())

    def _misshapen(self, path: str, tensors: Mapping[str, Tensor], name: str, channels: int | None) -> ModelError:
        if name != self.source.eps.name:
            expected = _SHAPES[self.source.shape].replace("C", str(channels) if channels else "C")
        else:
            expected = "the shape of the others" if self.source.eps.per_channel else "one number"
        problem = f"{joined(path, name)} has not the shape that it has in {self.source.project}"
        fix = "the file is damaged, or of another source: try --from auto"
        return ModelError(self.where, problem, got=tuple(tensors[name].shape), expected=expected, fix=fix)

    def _effective_eps(self, path: str, tensors: Mapping[str, Tensor], c: int, dtype: torch.dtype) -> Tensor:
        """(C,): floor + |what the file stores|."""
        rule = self.source.eps
        if rule.name in tensors:
            stored = tensors[rule.name].double().abs().reshape(-1)
        else:
            stored = torch.full((1,), self._built_with(rule.absent or 0.0), dtype=torch.float64)
        eps = (stored + self._built_with(rule.floor)).to(compute_dtype(dtype)).expand(c).clone()
        if not bool((torch.isfinite(eps) & (eps > 0)).all()):
            problem = f"the epsilon of {path or 'the layer'} is not positive: a channel of zeros would become NaN"
            fix = "set it in the file to what the training began with, such as 1e-6"
            raise ModelError(self.where, problem, got=f"{float(eps.min()):g}", expected="a number above 0", fix=fix)
        return eps

    def _built_with(self, default: float) -> float:
        return self.eps if default and self.eps is not None else default

    def _mabn(
        self, path: str, c: int, theirs: dict[str, str], entries: dict[str, Tensor], dropped: tuple[str, ...]
    ) -> Reading:
        eps = self._built_with(self.source.eps.absent or 0.0)
        layer = TranslatedLayer(path, f"MABN{self.source.rank - 2}d", c, theirs, (eps, eps))
        R = entries["running_var"]
        # Histories start empty, as where a checkpoint has none, and of any window.
        empty = {name: R.new_zeros(1, c + 1) for name in ("recent_x2", "recent_gz")}
        count = torch.ones((), dtype=torch.int64)
        return Reading(layer, {**entries, "num_batches_tracked": count, **empty}, dropped)

    def _tlu(self, path: str, tensors: Mapping[str, Tensor]) -> Reading:
        tau, alpha = tensors["tau"], tensors.get("alpha")
        name = joined(path, "tau")
        self._check_floats(path, {"tau": tau})
        if alpha is not None and bool(alpha.any()):
            problem = f"{joined(path, 'alpha')} makes the threshold max(x, alpha * x + tau), which ours is not"
            raise ModelError(self.where, problem, fix="train it again with affine=False")
        if self.source.shape == "111C" and tau.dim() == 3 and tau.numel():
            if not bool((tau == tau[:1, :1]).all()):
                problem = (
                    f"{name} has a threshold for each position (H, W, C) of one input size; FRN's is for each channel"
                )
                fix = "train it again with a tau of shape (1, 1, C)"
                raise ModelError(self.where, problem, got=tuple(tau.shape), expected="thresholds (C,)", fix=fix)
            tau = tau[0, 0]
        c = self._channels(tau, "tau") or (len(tau) if tau.dim() == 1 else None)
        if not c or (self.source.shape == "1C11" and tau.dim() == 1 and c == 1):
            fix = "repeat a single number for each channel: tau.expand(1, C, 1, 1)"
            raise ModelError(self.where, f"{name} is not one threshold for each channel", got=tuple(tau.shape), fix=fix)
        layer = TranslatedLayer(path, "TLU", c, {"tau": "tau"}, None)
        return Reading(layer, {"tau": tau.reshape(-1)}, ("alpha",) if alpha is not None else ())


def joined(path: str, name: str) -> str:
    """The key of a tensor of the layer at a path, which is "" for the network itself."""
    return f"{path}.{name}" if path else name
