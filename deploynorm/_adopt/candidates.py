"""Which layers of a network may be those of another project, and how the network calls them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deploynorm._adopt.convolutions import PLAIN
from deploynorm.quiet import quiet
from deploynorm.trace import Examples, disposable_copy

_FEW = 8
"""Parameters of a normalization with its threshold: weight, bias, tau, epsilon, statistics."""
_OURS = __name__.partition(".")[0]
_LIBRARIES = ("torch", _OURS)


class Call(NamedTuple):
    """How a layer is called: with one tensor of this shape, which the result has in `keeps`, or else by a `problem`."""

    shape: tuple[int, ...]
    keeps: bool
    problem: str = ""


def is_foreign(layer: nn.Module) -> bool:
    """Whether the layer's class is neither torch's nor ours nor derived from one of ours."""
    ours = any(kind.__module__.startswith("deploynorm.layers") for kind in type(layer).__mro__)
    return type(layer).__module__.partition(".")[0] not in _LIBRARIES and not ours


def may_be_norm(layer: nn.Module) -> bool:
    """Whether all parameters of a layer of others are one number, or one for each channel."""
    if not is_foreign(layer):
        return False
    parameters = list(layer.parameters())
    counts = {x.numel() for x in parameters} - {1}
    buffers = [x for x in layer.buffers() if x.is_floating_point()]
    return bool(parameters or buffers) and len(parameters) <= _FEW and len(counts) <= 1


def may_be_computed(layer: nn.Module) -> bool:
    """Whether a convolution or linear layer computes its weight in each call."""
    if isinstance(layer, PLAIN):
        ours = not is_foreign(layer) and type(layer).__module__.partition(".")[0] == _OURS
        set_by_hook = any(map(_sets_weight, layer._forward_pre_hooks.values()))
        plain = type(layer) in PLAIN and not (parametrize.is_parametrized(layer) or set_by_hook)
        return not ours and not plain
    own = [x for x in layer._parameters.values() if x is not None]
    return is_foreign(layer) and not layer._modules and any(x.dim() > 2 for x in own)


def _sets_weight(hook: object) -> bool:
    """Whether it is the hook of torch's older weight_norm or spectral_norm."""
    return type(hook).__module__.startswith("torch.nn.utils")


def own_hooks(layer: nn.Module) -> bool:
    """Whether hooks run around its forward or backward, besides those that compute its weight."""
    before = any(not _sets_weight(hook) for hook in layer._forward_pre_hooks.values())
    return bool(before or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def wanted(model: nn.Module, of: Callable[[nn.Module], bool]) -> Iterator[str]:
    """The paths of the layers of which something holds, each before those in it; a shared one under its first."""
    return (path for path, layer in model.named_modules() if of(layer))


def calls(model: nn.Module, examples: Examples, paths: Collection[str]) -> Mapping[str, Call]:
    """How the network calls the layers of these paths, but those that it does not call.

    Raises whatever the network raises on the examples.
    """
    twin = disposable_copy(model).eval()
    found: dict[str, Call] = {}
    handles = []
    for path in paths:

        def seen(layer: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            found[path] = _merged(found.get(path), _call(args, kwargs, output))

        handles.append(twin.get_submodule(path).register_forward_hook(seen, with_kwargs=True))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        examples.replaced(x.detach().cpu().clone() for x in examples).run(twin)
    return found


def _call(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Call:
    x = args[0] if args else None
    if len(args) != 1 or kwargs or not isinstance(x, Tensor):
        return Call((), False, "it is called with other arguments than one tensor")
    return Call(tuple(x.shape), isinstance(output, Tensor) and output.shape == x.shape)


def _merged(before: Call | None, now: Call) -> Call:
    if before is None or before.problem or now.problem:
        return before if before is not None and before.problem else now
    if len(before.shape) != len(now.shape):
        return Call((), False, "it is called with tensors of several ranks")
    return before._replace(keeps=before.keeps and now.keeps)
