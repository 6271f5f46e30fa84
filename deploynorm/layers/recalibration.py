"""The exact second moment of what enters each MABN, in place of the moving average that training leaves."""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deploynorm.errors import InputError, ModelError
from deploynorm.layers import _statistics as statistics
from deploynorm.layers._precision import compute_dtype
from deploynorm.layers.mabn import _MABN

WHERE = "recalibrate"


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    device: torch.device | str | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, float]:
    """Sets running_var of every MABN to the second moment of its input over a whole loader, in evaluation mode.

    Training leaves an exponential average over the last 1/momentum steps: noisy where batches are small, and behind
    the weights where these still move. Recalibrate once the weights stand, before an export, or for data that differ
    from the training data.

    What enters a layer depends on how the layers before it are normalised. So the layers are done one by one, in the
    order in which the network runs them, each with those before it in their final state, and the result is exact:
    evaluated on the same samples, each layer's input has the second moment that its running_var says. Measured all at
    once, every layer of a deep network would correct for all the others, and together they overshoot. The price is, for
    L layers, one pass over the loader and another L through half the network on average; some hundreds of samples will
    do, see `batches`. A layer that is used twice in a chain, and so takes part in its own input, is measured as it
    stood before.

    Every sample has one weight, as in training. Parameters, modes and all else stay as they were, and so does
    running_var if anything goes wrong, Ctrl-C included. Frozen layers are left alone. A layer that was never trained
    counts as having seen a batch, so that training goes on from here. Under torch.distributed each process runs its own
    loader, and the result is that of all together. Compiled modules run as they were before torch.compile. A progress
    bar is shown on stderr where that is a terminal.

    Args:
        model: Changed in place. One wrapped in DistributedDataParallel may be given as it is.
        loader: A DataLoader, list or whatever can be iterated several times. It should give one set of samples every
            time, prepared as for evaluation. Its batch size does not matter.
        batches: Use only so many, the first ones (in each process).
        device: Where the tensors of a batch are moved; by default to the device of the first MABN.
        forward: Runs the model on one batch: forward(model, batch). By default model(batch) for a tensor,
            model(batch[0]) for a tuple or list such as (images, labels), model(**batch) for a dict. A network of
            several inputs requires one: lambda model, batch: model(*batch).

    Returns for each layer's name how far running_var has moved: the largest |new / old - 1| of its channels.

    Raises:
        InputError: There is no MABN that is not frozen; the loader is empty, or can be iterated only once; the model
            cannot be called with a batch in the ways above.
        ModelError: A second moment is not finite; no MABN was reached; another process failed.

    Source: The purpose is that of PreciseBN: Wu & Johnson, arXiv:2105.07576, section 3. There the mean of batch
        statistics is taken in one pass, which suits layers that train normalised by them.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(model, nn.Module) or not isinstance(loader, Iterable):
        got = f"{type(model).__name__} and {type(loader).__name__}"
        raise InputError(WHERE, "no network, or no batches to iterate over", got=got)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _MABN) and not layer.frozen}
    if not layers:
        raise InputError(WHERE, "the model has no MABN that is not frozen", got=type(model).__name__)
    if batches is not None and batches < 1:
        raise InputError(WHERE, "batches must be positive", got=batches)
    if iter(loader) is loader:
        problem = "the loader can be iterated only once"
        raise InputError(WHERE, problem, got=type(loader).__name__, fix="give a DataLoader, or list(loader)")
    target = torch.device(device) if device is not None else next(iter(layers.values())).running_var.device

    def run(batch: object) -> None:
        (forward or _forward)(model, _to(batch, target))

    before = {name: (layer.running_var.clone(), layer.num_batches_tracked.clone()) for name, layer in layers.items()}
    try:
        with _evaluation(model), _progress() as progress:
            progress.add_task("recalibrate", total=None)
            passes = _Passes(layers, loader, batches, run, progress)
            order = passes.discover()
            for name in order:
                passes.set(name)
    except BaseException:
        for name, (second_moment, count) in before.items():
            layers[name].running_var.copy_(second_moment)
            layers[name].num_batches_tracked.copy_(count)
        raise
    if len(order) < len(layers):
        left = ", ".join(name for name in layers if name not in order)
        warnings.warn(f"{WHERE}: never reached in evaluation, and unchanged: {left}", stacklevel=2)
    return {name: float((layers[name].running_var / before[name][0] - 1).abs().max()) for name in order}


class _Reached(BaseException):
    """The rest of the network need not run. Not an Exception, so that an `except Exception` in a model lets it by."""


@dataclass
class _Passes:
    """Passes over the loader: one that finds the order of the layers, and one for each layer to set."""

    layers: Mapping[str, _MABN]
    loader: Iterable[Any]
    batches: int | None
    run: Callable[[object], None]
    progress: Progress
    uses: dict[str, set[int]] = field(default_factory=dict)
    """For each layer that forward passes use: how many times one pass did, each number that was seen."""

    def discover(self) -> list[str]:
        """The names of the layers that are reached, in the order in which the network runs them."""
        order: list[str] = []

        def note(name: str, _: Tensor, times: int) -> None:
            if name not in order:
                order.append(name)

        seen = self._pass(list(self.layers), note)
        if self._reduced([seen], "sum") == [0]:
            raise InputError(WHERE, "the loader is empty", got=type(self.loader).__name__)
        places = [order.index(name) if name in order else len(self.layers) for name in self.layers]
        reached = zip(self._reduced(places, "min"), self.layers, strict=True)
        ordered = [name for place, name in sorted(reached, key=lambda pair: pair[0]) if place < len(self.layers)]
        if not ordered:
            raise ModelError(WHERE, "no MABN was reached", fix="give a `forward` that runs the network")
        self.progress.update(self.progress.task_ids[0], total=seen * (1 + len(ordered)))
        return ordered

    def set(self, name: str) -> None:
        """Measures what enters one layer, those before it being in their final state, and sets its running_var."""
        layer = self.layers[name]
        precise = torch.float32 if layer.running_var.device.type == "mps" else torch.float64  # which mps lacks
        total = layer.running_var.new_zeros(layer.num_features + 1, dtype=precise)
        uses = self.uses.get(name, set())
        last_use = min(uses) if len(uses) == 1 else None

        def add(_: str, x: Tensor, times: int) -> None:
            total.add_(statistics.row(statistics.second_moment_sum(x, compute_dtype(x.dtype)), x))
            if times == last_use:
                raise _Reached

        self._pass([name], add)
        total = statistics.over_all_ranks(total, layer.process_group)
        if total[-1] == 0:
            return
        second_moment = total[:-1] / total[-1]
        if not second_moment.isfinite().all():
            fix = "look for values that are not finite in the loader, or in the layers before"
            raise ModelError(WHERE, f"what enters {name} is not finite", fix=fix)
        layer.running_var.copy_(second_moment)
        layer.num_batches_tracked.clamp_(min=1)

    def _pass(self, names: Sequence[str], note: Callable[[str, Tensor, int], None]) -> int:
        """Runs all batches and returns their number; note(name, x, times) is called at the times-th use of a layer."""
        used: Counter[str] = Counter()

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                used[name] += 1
                note(name, args[0] if args else kwargs["x"], used[name])

            return count

        seen, error = 0, None
        with contextlib.ExitStack() as hooks:
            for name in names:
                layer = self.layers[name]
                hooks.callback(layer.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
            try:
                for batch in itertools.islice(self.loader, self.batches):
                    used.clear()
                    with contextlib.suppress(_Reached):
                        self.run(batch)
                    for name, times in used.items():
                        self.uses.setdefault(name, set()).add(times)
                    seen += 1
                    self.progress.advance(self.progress.task_ids[0])
            except BaseException as caught:
                error = caught
        # The other processes would wait for this one for ever.
        failed = self._reduced([error is not None], "max") != [0]
        if error is not None:
            raise error
        if failed:
            raise ModelError(WHERE, "another process failed", fix="see its message")
        return seen

    def _reduced(self, values: Sequence[float], how: Literal["sum", "min", "max"]) -> list[float]:
        """Each value over all processes."""
        if statistics.processes(None) == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float32, device=next(iter(self.layers.values())).running_var.device)
        dist.all_reduce(tensor, getattr(dist.ReduceOp, how.upper()))
        return [float(value) for value in tensor]


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or compiled code; afterwards each module's mode is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        # Not model.eval(): a module may do more there than to change its mode, as MABN does.
        for module, _ in modes:
            module.training = False
        # Compiled code does not call the hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _progress() -> Progress:
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    return Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        console=Console(stderr=True),
        disable=not first or not sys.stderr.isatty(),
        redirect_stdout=sys.stdout.isatty(),
    )


def _forward(model: nn.Module, batch: Any) -> object:
    cause: Exception | None = None
    try:
        if isinstance(batch, Tensor):
            return model(batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, tuple | list) and batch:
            return model(batch[0])
    except (TypeError, AttributeError) as error:  # how Python and torch refuse missing inputs, and lists as tensors
        cause = error
    except InputError as error:  # how our layers refuse lists; what they say of a tensor is the user's to read
        if isinstance(batch, Tensor | Mapping) or isinstance(batch[0], Tensor):
            raise
        cause = error
    reason = f": {type(cause).__name__}: {str(cause).partition(chr(10))[0]}" if cause else ""
    problem = f"the model cannot be called with a batch of the loader{reason}"
    expected = "a tensor, a tuple or list with the only input first, or a dict of arguments"
    fix = "pass forward=, for example forward=lambda model, batch: model(*batch)"
    raise InputError(WHERE, problem, got=_outline(batch), expected=expected, fix=fix) from cause


def _outline(batch: Any) -> str:
    """Types and shapes in a batch, for a message."""
    if isinstance(batch, Tensor):
        return f"Tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} of {', '.join(f'{key}: {_outline(value)}' for key, value in batch.items())}"
    if isinstance(batch, tuple | list):
        return f"{type(batch).__name__} of {', '.join(map(_outline, batch)) or 'nothing'}"
    return type(batch).__name__


def _to(value: Any, device: torch.device) -> Any:
    """A value whose tensors, inside tuples, lists and dicts too, are moved to the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        moved = [_to(entry, device) for entry in value]
        return tuple(moved) if isinstance(value, tuple) else moved
    return value
