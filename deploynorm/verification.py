"""Whether a folded network still computes what it did: what no rule foresees shows here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from deploynorm.quiet import first_line, quiet
from deploynorm.trace import Examples, alike, copied, inference_copy, tensors_of

_RTOL = 1e-4
"""Of the largest value of an output. In float64 a right fold is within 1e-10; float32 somewhere inside costs 1e-6."""


@dataclass(frozen=True)
class Step:
    """One change of a network: how it is undone and done again, and how it is reported when it has to stay undone."""

    undo: Callable[[], None]
    redo: Callable[[], None]
    refuse: Callable[[str], None]


class Verifier:
    """Compares a network with what it computed on the examples before it was changed, in float64 where it runs so."""

    def __init__(self, model: nn.Module, examples: Examples) -> None:
        self._model = model
        self._examples = examples
        self._dtype: torch.dtype | None = torch.float64

    @cached_property
    def _truth(self) -> list[Any] | None:
        """Of the network as it was given; it is not run where nothing was changed."""
        for self._dtype in (torch.float64, None):
            with suppress(Exception):  # the trace, or a later stage, says what is wrong
                return self._outputs(inference_copy(self._model), {})
        return None

    def fault(self, model: nn.Module, exact: Mapping[nn.Module, tuple[Tensor, Tensor | None]]) -> str:
        """What is wrong with the changed network; empty where nothing is, or where that cannot be known.

        Args:
            model: The network.
            exact: Weights and biases of its layers before they were rounded to its type.
        """
        if self._truth is None:
            return ""
        try:
            outputs = self._outputs(model, exact)
        except Exception as error:
            return f"the network fails without it ({type(error).__name__}: {first_line(error)})"
        if alike(outputs, self._truth, _RTOL):
            return ""
        return "the network computes something else without it: it is used in a way that no trace shows"

    def settle(self, steps: Sequence[Step], model: Callable[[], nn.Module], exact: Mapping[nn.Module, Any]) -> None:
        """Undoes those of the steps, all of which are done, without which the network computes what it did.

        The first that does harm is found by halving, and stays undone; then the others are looked at again.
        """
        left, done = list(steps), len(steps)
        if not left:
            return

        def faulty(count: int) -> str:
            nonlocal done
            while done > count:
                done -= 1
                left[done].undo()
            while done < count:
                left[done].redo()
                done += 1
            return self.fault(model(), exact)

        while (reason := faulty(len(left))) and not faulty(0):
            good, bad = 0, len(left)
            while bad - good > 1:
                middle = (good + bad) // 2
                if found := faulty(middle):
                    bad, reason = middle, found
                else:
                    good = middle
            faulty(good)
            left.pop(good).refuse(reason)
        faulty(len(left))

    def _outputs(self, model: nn.Module, exact: Mapping[nn.Module, tuple[Tensor, Tensor | None]]) -> list[Any]:
        paths = {module: path for path, module in model.named_modules()}
        twin = copied(model).cpu().to(self._dtype).eval()
        for layer, (weight, bias) in exact.items():
            if layer in paths and self._dtype is not None:
                inside: Any = twin.get_submodule(paths[layer])
                inside.weight = nn.Parameter(weight.to(self._dtype), requires_grad=False)
                inside.bias = None if bias is None else nn.Parameter(bias.to(self._dtype), requires_grad=False)
        examples = self._examples.replaced(
            x.detach().cpu().clone().to(self._dtype if x.is_floating_point() else None) for x in self._examples
        )
        with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            return [x.clone() if isinstance(x, Tensor) else x for x in tensors_of(examples.run(twin))]
