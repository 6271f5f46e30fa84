"""How MABN counts a batch once where activation checkpointing runs its forward pass a second time.

A forward pass that may run again notes in a ring buffer what it normalised by. A forward pass inside a backward pass is
such a second run: it looks up in the ring what the first one used, and changes no statistic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deploynorm.contract import DOMAIN

_SETTLED = f"{DOMAIN}::mabn_settled"


class Used(NamedTuple):
    """What a forward pass normalises by."""

    second_moment: Tensor  # (C,), the chi^2 of Algorithm 1
    r: Tensor  # (C,), the renorm factor
    window: Tensor  # (), samples that its moving averages cover; 0 in the warm-up
    kept: Tensor  # (), bool: the batch enters the statistics

    def packed(self) -> Tensor:
        """As one tensor (2 C + 2)."""
        dtype = self.second_moment.dtype
        return torch.cat([self.second_moment, self.r, torch.stack([self.window.to(dtype), self.kept.to(dtype)])])

    @staticmethod
    def unpacked(packed: Tensor) -> Used:
        channels = (len(packed) - 2) // 2
        second_moment, r, others = torch.split(packed, [channels, channels, 2])
        return Used(second_moment, r, others[0].to(torch.int64), others[1] > 0)


def recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass; for eager code. Compiled code calls `settled`."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_run_again() -> bool:
    """Whether activation checkpointing may run this forward pass again.

    It turns gradients off in the first run, or hooks the saving of tensors.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def note(row: Tensor, used: Used, ring: Tensor, passes: Tensor, first_run: Tensor | None = None) -> None:
    """Writes a pass into the ring (K, 3 C + 3) of rows and what was used, and counts it in passes, both in place.

    The row (C + 1) of the batch is the key by which `recalled` finds the pass. first_run is (), bool; False changes
    nothing, and None is True.
    """
    place = (passes % len(ring)).reshape(1)
    entry = torch.cat([row, used.packed()])
    ring.index_copy_(0, place, entry[None] if first_run is None else torch.where(first_run, entry, ring[place]))
    passes.add_(1 if first_run is None else first_run)


def recalled(row: Tensor, ring: Tensor, passes: Tensor) -> Used:
    """What the pass with the nearest row in the ring was normalised by; of several that are as near, the newest.

    The nearest and not an equal one, because its index is found without making the host wait for the device. Rows
    that differ by rounding are as near: compiled code may sum in another order.
    """
    distance = (ring[:, : len(row)] - row).abs().sum(1).nan_to_num(torch.inf, posinf=torch.inf)
    rounding = row.sum().nan_to_num(0.0, 0.0) * torch.finfo(row.dtype).eps * 64
    age = torch.remainder(passes - 1 - torch.arange(len(ring), device=ring.device), len(ring))
    place = torch.where(distance <= distance.amin() + rounding, age, len(ring)).argmin(keepdim=True)
    # Not ring[place[0]]: an index of no dimensions is read by the host.
    return Used.unpacked(ring.index_select(0, place)[0, len(row) :])


def settled(row: Tensor, used: Used, ring: Tensor, passes: Tensor) -> tuple[Used, Tensor]:
    """For compiled code: what this pass is to normalise by, and whether it is the first run (), bool, which commits.

    It is an operator, so that this is decided when the code runs and not when it is compiled. The compiler may compute
    anything a second time in the backward pass, when the statistics have changed: of an operator it can either save the
    result or call it again. In a second run the result is what the first one used.
    """
    packed, first_run = torch.ops.deploynorm.mabn_settled.default(row, used.packed(), ring, passes)
    return Used.unpacked(packed), first_run


torch.library.define(
    _SETTLED,
    "(Tensor row, Tensor used, Tensor ring, Tensor passes) -> (Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),  # a replayed graph would repeat what was decided when it was recorded
)


def _settled(row: Tensor, used: Tensor, ring: Tensor, passes: Tensor) -> tuple[Tensor, Tensor]:
    # clone: an operator returns none of its inputs.
    packed = recalled(row, ring, passes).packed() if recomputing() else used.clone()
    return packed, torch.full((), not recomputing(), device=row.device)


torch.library.impl(_SETTLED, "default", _settled)


def _shapes(row: Tensor, used: Tensor, ring: Tensor, passes: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(used), row.new_empty((), dtype=torch.bool)


torch.library.register_fake(_SETTLED, _shapes)
