"""FRN + TLU in training on a GPU: the forward and the backward pass of one layer. A section of gpu.py.

ours                             deploynorm's FRN2d on its kernels, in eager PyTorch
composition                      the formula in plain torch and autograd
composition, compiled            the same through torch.compile
batch_norm, relu                 nn.BatchNorm2d in training and nn.ReLU(inplace=True)
batch_norm, relu, compiled       the same through torch.compile
relu                             nn.ReLU alone, which moves what FRN has to: one read and one write forward, two
                                 reads and one write backward

And, in rows of their own:

mabn, mabn, compiled             MABN2d behind its warm-up
batch_norm, and compiled         nn.BatchNorm2d in training
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_timing import host_microseconds, measure, sets_past_the_cache, timed
from torch import Tensor, nn

from deploynorm.layers import FRN2d, MABN2d
from deploynorm.layers._composed import composed

__all__ = [
    "BATCHES",
    "DTYPES",
    "SHAPES",
    "Step",
    "check_steps",
    "host_times",
    "make_mabn_steps",
    "make_steps",
    "mabn_row",
    "row",
    "saved_bytes",
    "show",
]

SHAPES = ((64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
BATCHES = (2, 32)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
OTHERS = ("batch_norm, relu", "batch_norm, relu, compiled", "relu")
"""What computes something else, and is not to be compared in numbers."""


@dataclass(frozen=True)
class Step:
    """Forward and backward pass of one layer.

    Attributes:
        layer: x -> y.
        parameters: Whose gradients are wanted beside that of x.
    """

    layer: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]

    def __call__(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """y, and the gradients of x and the parameters, from x and the gradient of y."""
        x, dy = given
        y = self.layer(x)
        return y, *torch.autograd.grad(y, (x, *self.parameters), dy)


def make_steps(x: Tensor, compiled: bool) -> dict[str, Step]:
    """All ways for tensors like x."""
    channels = x.shape[1]
    frn = FRN2d(channels).to(x.device)
    generator = torch.Generator(x.device).manual_seed(0)
    with torch.no_grad():
        for parameter, low in ((frn.weight, 0.5), (frn.bias, -0.5), (frn.tau, -1.0)):
            assert parameter is not None
            parameter.uniform_(low, low + 1, generator=generator)

    def formula(x: Tensor) -> Tensor:
        return composed(x, frn.weight, frn.bias, frn.tau, frn.effective_eps())

    batch_norm = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)).to(x.device).train()
    of_frn, of_batch_norm = tuple(frn.parameters()), tuple(batch_norm.parameters())
    steps = {
        "ours": Step(frn, of_frn),
        "composition": Step(formula, of_frn),
        "batch_norm, relu": Step(batch_norm, of_batch_norm),
        "relu": Step(nn.ReLU(), ()),
    }
    if compiled:
        _compile(steps, ("composition", "batch_norm, relu"), x)
    return steps


def make_mabn_steps(x: Tensor, compiled: bool) -> dict[str, Step]:
    """MABN behind its warm-up, and batch normalization."""
    layers = {"mabn": MABN2d(x.shape[1], warmup=0, renorm_start=0), "batch_norm": nn.BatchNorm2d(x.shape[1])}
    steps = {name: Step(layer.to(x.device).train(), tuple(layer.parameters())) for name, layer in layers.items()}
    if compiled:
        _compile(steps, tuple(layers), x)
    return steps


def _compile(steps: dict[str, Step], names: Sequence[str], x: Tensor) -> None:
    """Adds steps of compiled layers."""
    for name in names:
        fused: Callable[[Tensor], Tensor] = torch.compile(steps[name].layer, fullgraph=True, dynamic=False)
        step = Step(fused, steps[name].parameters)
        try:
            step((x, torch.ones_like(x)))
        except RuntimeError as error:  # inductor has shapes that it cannot compile (torch 2.11)
            reason = str(error).strip().partition("\n")[0]
            print(f"{name} cannot be compiled for {tuple(x.shape)} {x.dtype}: {reason}")
            continue
        steps[f"{name}, compiled"] = step


def check_steps(steps: Mapping[str, Step], given: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The largest error of each way against float64, of any of its results relative to the largest value of it.

    Raises:
        SystemExit: One is off by more than its type explains.
    """
    x, dy = given
    frn = steps["ours"].layer
    assert isinstance(frn, FRN2d)
    assert frn.tau is not None
    given64 = [each.detach().double().requires_grad_() for each in (x, frn.weight, frn.bias, frn.tau)]
    x64, gamma, beta, tau = given64
    y = composed(x64, gamma, beta, tau, frn.effective_eps())
    # Where y is near to tau, rounding decides which of the two has the gradient.
    distance = (y - tau.view(1, -1, 1, 1)).detach().abs()
    dy = dy.masked_fill((distance > 0) & (distance < 1e-4), 0)
    want = [y.detach(), *torch.autograd.grad(y, given64, dy.double())]
    errors = {}
    for name, step in steps.items():
        if name in OTHERS:
            continue
        pairs = zip(step((x, dy)), want, strict=True)
        errors[name] = max(
            float((got.detach().double() - right).abs().max() / right.abs().max()) for got, right in pairs
        )
        if not errors[name] <= TOLERANCES[x.dtype]:
            raise SystemExit(f"{name} is wrong for {tuple(x.shape)} {x.dtype} in training: {errors[name]:.3g}")
    return errors


def saved_bytes(step: Step, x: Tensor) -> int:
    """What the forward pass keeps for the backward pass, x and the output included where they are kept."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> None:  # kept here, an output would keep its graph alive, and that the output
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda _: None):
        step.layer(x)
    parameters = {each.untyped_storage().data_ptr() for each in step.parameters}
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def _set(shape: tuple[int, ...], layout: str, dtype: str) -> tuple[Tensor, Tensor]:
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x, dy = (torch.randn(shape, device="cuda").to(DTYPES[dtype]).contiguous(memory_format=form) for _ in range(2))
    return x.requires_grad_(), dy


def _sets(shape: tuple[int, ...], layout: str, dtype: str) -> list[tuple[Tensor, Tensor]]:
    """So many that a call finds its input in memory."""
    first = _set(shape, layout, dtype)
    return [first, *(_set(shape, layout, dtype) for _ in range(sets_past_the_cache(2 * first[0].nbytes) - 1))]


def row(shape: tuple[int, ...], layout: str, dtype: str, *, rounds: int, compiled: bool) -> dict[str, Any]:
    """All figures of one shape."""
    sets = _sets(shape, layout, dtype)
    first, size = sets[0], sets[0][0].nbytes
    steps = make_steps(first[0], compiled)
    errors = check_steps(steps, first)
    saved = {name: saved_bytes(step, first[0]) for name, step in steps.items()}
    times = measure(steps, sets, 5 * size, rounds)
    return {
        **timed(shape, layout, dtype, times),
        "of_batch_norm": round(times["ours"] / times["batch_norm, relu"], 3),
        "of_relu": round(times["relu"] / times["ours"], 3),
        "saved_bytes": saved,
        "bytes_of_x": size,
        "errors": {name: float(f"{value:.3g}") for name, value in errors.items()},
    }


def mabn_row(shape: tuple[int, ...], layout: str, dtype: str, *, rounds: int, compiled: bool) -> dict[str, Any]:
    """The figures of MABN; its numbers are tested in tests/gpu/test_mabn.py."""
    sets = _sets(shape, layout, dtype)
    steps = make_mabn_steps(sets[0][0], compiled)
    saved = {name: saved_bytes(step, sets[0][0]) for name, step in steps.items()}
    times = measure(steps, sets, 5 * sets[0][0].nbytes, rounds)
    return {
        **timed(shape, layout, dtype, times),
        "of_batch_norm": round(times["mabn"] / times["batch_norm"], 3),
        "saved_bytes": saved,
    }


def host_times(rounds: int, compiled: bool) -> dict[str, float]:
    """What the host needs for a step of a small layer, in microseconds."""
    given = _set((2, 64, 7, 7), "nchw", "float32")
    steps = make_steps(given[0], compiled)
    for step in steps.values():
        step(given)
    return {name: round(value, 2) for name, value in host_microseconds(steps, given, rounds).items()}


def show(result: Mapping[str, Any]) -> str:
    times = result["microseconds"]
    ours, *others = times
    ratios = "  ".join(f"{name} {times[name] / times[ours]:.2f}" for name in others)
    size = "x".join(map(str, result["shape"]))
    head = f"{size:>16} {result['layout']} {result['dtype']:>8}  training, {ours} {times[ours]:8.2f} us"
    return f"{head} = 1: {ratios}"
