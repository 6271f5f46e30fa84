"""Each operator that a .pt2 may call, with wild sizes and indices, in a child process: it may raise, and not crash."""

from __future__ import annotations

import random
from collections.abc import Iterator
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from children import tried
from torch import fx, nn

import deploynorm.layers.functional  # noqa: F401  registers our operator
from deploynorm.checkpoint import load
from deploynorm.checkpoint._kernels import guard_kernels
from deploynorm.checkpoint._operators import _NAMES, ADMITTED, PRIMS, find_operator

TENSORS = {
    "usual": lambda: torch.randn(2, 3, 4, 4),
    "vector": lambda: torch.randn(3),
    "matrix": lambda: torch.randn(3, 3),
    "scalar": lambda: torch.tensor(2.0),
    "empty": lambda: torch.zeros(0, 3, 4, 4),
    "no channels": lambda: torch.zeros(2, 0, 4),
    "many channels": lambda: torch.zeros(1, 2**22),
    "many samples": lambda: torch.zeros(2**21, 1, 1, 1),
    "indices": lambda: torch.tensor([0, 1, 2]),
    "far indices": lambda: torch.tensor([0, 2**40, -(2**40)]),
    "many far indices": lambda: torch.full((2, 3, 4, 4), 2**40),
    "negative indices": lambda: torch.full((3, 3), -5),
    "least integer": lambda: torch.tensor([-(2**63), -1]),
    "minus one": lambda: torch.tensor([-1]),
    "zero": lambda: torch.tensor([0]),
    "small integers": lambda: torch.tensor([300, -300], dtype=torch.int32),
    "bytes": lambda: torch.tensor([255, 0, 1], dtype=torch.uint8),
    "truth": lambda: torch.tensor([True, False, True]),
    "double": lambda: torch.randn(2, 3, dtype=torch.float64),
    "half": lambda: torch.randn(2, 3, 4, 4).half(),
    "complex": lambda: torch.randn(3, 3, dtype=torch.complex64),
    "expanded": lambda: torch.randn(1).expand(3, 3),
    "not finite": lambda: torch.tensor([float("inf"), float("nan"), -float("inf")]),
}
INTEGERS = (0, 1, 2, 3, -1, -2, 7, 100, 2**31, -(2**31), 2**40, -(2**40), 2**62, -(2**63), 2**63 - 1)
SMALL = (0, 1, 2, 3, -1)
DTYPES = (torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.bfloat16)

MANY = ("unbind", "split", "chunk", "tensor_split")
"""These make as many tensors as there are rows, which takes long and is no fault."""

GUARDED = ("_native_batch_norm_legit_no_training", "div", "divide")
"""Not safe in torch itself, so that an archive's calls of them are changed."""

CASES = [
    (namespace, name + suffix, overload)
    for namespace, names in _NAMES.items()
    for name in sorted(names)
    for suffix in ("", "_")
    for overload in getattr(getattr(getattr(torch.ops, namespace), name + suffix, None), "overloads", list)()
    if find_operator(namespace, name + suffix, overload)
    if not name.startswith(MANY)
]
"""Each admitted operator in each of its forms."""


def value(kind: str, rng: random.Random) -> Any:
    """A value for an argument of that type in a schema."""
    if kind.startswith("Optional["):
        return None if rng.random() < 0.4 else value(kind[9:-1], rng)
    if kind.startswith("List["):
        return [value(kind[5:-1], rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 6)))]
    if kind == "Tensor":
        return TENSORS[rng.choice(list(TENSORS) if rng.random() < 0.6 else list(TENSORS)[:3])]()
    if kind in ("int", "SymInt"):
        return rng.choice(SMALL if rng.random() < 0.6 else INTEGERS)
    if kind in ("float", "number", "Scalar"):
        return rng.choice((0.0, 1.0, -1.5, 1e300, float("inf"), float("nan"), 2, 0, -1, 2**62, -(2**63)))
    return {"bool": rng.random() < 0.5, "str": rng.choice(("", "none", "mean", "sum", "floor", "trunc", "ij"))}.get(
        kind
    )


def call(case: tuple[str, str, str, int]) -> None:
    """The operator once with values that the number chooses."""
    namespace, name, overload, seed = case
    operator = find_operator(namespace, name, overload)
    assert operator is not None
    rng = random.Random(f"{namespace}.{name}.{overload} {seed}")
    positional, named = [], {}
    for argument in operator._schema.arguments:
        kind = str(argument.type)
        if kind in ("Optional[Device]", "Device"):
            given: Any = None if kind.startswith("Opt") else torch.device("cpu")
        elif argument.name in ("dtype", "out_dtype", "output_dtype") and rng.random() < 0.5:
            given = rng.choice(DTYPES)
        elif argument.has_default_value() and rng.random() < 0.5:
            given = argument.default_value
        elif argument.name in ("layout", "memory_format", "pin_memory", "generator", "dtype"):
            given = argument.default_value if argument.has_default_value() else None
        else:
            given = value(kind, rng)
        if argument.kwarg_only:
            named[argument.name] = given
        else:
            positional.append(given)
    in_archive = name.rstrip("_") in GUARDED
    results = guarded(operator, positional, named) if in_archive else operator(*positional, **named)
    for result in results if isinstance(results, list | tuple) else [results]:
        if isinstance(result, torch.Tensor) and 0 < result.numel() < 10**6:
            result.clone()  # reads all of it


def guarded(operator: Any, positional: list[Any], named: dict[str, Any]) -> Any:
    """What an archive computes that calls the operator."""
    graph, feeds = fx.Graph(), list[torch.Tensor]()

    def put(given: Any) -> Any:
        if not isinstance(given, torch.Tensor):
            return given
        feeds.append(given)
        node = graph.placeholder(f"x{len(feeds)}")
        node.meta["val"] = given
        return node

    node = graph.call_function(operator, tuple(map(put, positional)), {name: put(each) for name, each in named.items()})
    several = len(operator._schema.returns) > 1
    graph.output(graph.call_function(getitem, (node, 0)) if several else node)
    module = fx.GraphModule(nn.Module(), graph)
    guard_kernels(module, "archive")
    return module.forward(*feeds)


def calls(each: int) -> Iterator[tuple[str, str, str, int]]:
    return ((*case, seed) for case in CASES for seed in range(each))


def test_no_operator_is_admitted_that_trusts_its_arguments() -> None:
    names = f"{' '.join(ADMITTED.values())} {PRIMS}".split()
    assert len(set(ADMITTED)) > 10
    for name in names:
        assert not any(word in name for word in ("backward", "unsafe", "resize", "set_", "sparse", "quant"))
    for name in ("max_pool2d_with_indices_backward", "segment_reduce", "set_", "resize_", "from_file"):
        for overload in getattr(torch.ops.aten, name).overloads():
            assert find_operator("aten", name, overload) is None


@pytest.mark.parametrize("each", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_no_admitted_operator_crashes(each: int) -> None:
    figures, faults = tried(list(calls(each)), call, may_raise=True, seconds=30)
    print(f"operators: {figures}")
    figures.assert_harmless(each * 800, faults)


def loaded(network: nn.Module, *inputs: torch.Tensor, path: Path) -> nn.Module:
    program = torch.export.export(network.eval(), inputs).run_decompositions()
    torch.export.save(program, path)
    return load(path).model


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, as it decomposes
def test_a_batch_normalization_of_an_archive_is_the_same_and_compares_its_parameters(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    network[1].running_mean.fill_(0.5)
    x = torch.randn(2, 3, 5, 5)
    module = loaded(network, x, path=tmp_path / "model.pt2")
    torch.testing.assert_close(module(x), network(x))
    module.get_submodule("1").running_var = torch.ones(2)
    with pytest.raises(RuntimeError, match="should contain 4 elements not 2"):
        module(x)


class Divided(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [torch.div(x, each, rounding_mode="trunc") for each in (y, -1, 2)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_division_of_an_archive_is_the_same_and_wraps(dtype: torch.dtype, tmp_path: Path) -> None:
    x, y = (torch.arange(-10, 10).reshape(4, 5) * 7 / 3).to(dtype), torch.tensor([-1, 2, -3, 4, -1]).to(dtype)
    module = loaded(Divided(), x, y, path=tmp_path / "model.pt2")
    assert all(map(torch.equal, module(x, y), Divided()(x, y)))
    if dtype == torch.int64:
        least = torch.full((4, 5), -(2**63))
        assert module(least, y)[0][0, 0] == module(least, y)[1][0, 0] == -(2**63)
