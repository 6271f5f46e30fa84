"""Other projects' state dicts through our layers, each against the formula that the project publishes, in NumPy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tolerances import EXACT, IMPORTED
from torch import Tensor, nn

from deploynorm.checkpoint import translate
from deploynorm.errors import InputError, ModelError
from deploynorm.layers import TLU, CenConv2d, FRN1d, FRN2d, FRN3d, MABN1d, MABN2d
from deploynorm.sources import OF_THE_AUTHORS, SOURCES

Array = npt.NDArray[Any]
Values = Mapping[str, Array]
C, IN = 5, 3


def conv(x: Array, kernel: Array) -> Array:
    """x (N, in, H, W), kernel (out, in, h, w), no padding."""
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (2, 3))
    return np.einsum("nihwab,oiab->nohw", windows, kernel)


def conv_last(x: Array, kernel: Array) -> Array:
    """x (N, H, W, in), kernel (h, w, in, out), as TensorFlow has both."""
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (1, 2))
    return np.einsum("nhwiab,abio->nhwo", windows, kernel)


def rms(x: Array, eps: Array | float, axes: tuple[int, ...] = (2, 3)) -> Array:
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + eps)


def column(values: Array) -> Array:
    return values.reshape(1, -1, 1, 1)


class Case(NamedTuple):
    """One layer of a project behind a convolution.

    Attributes:
        source: The name of the project.
        norm: Shapes of the tensors under "norm"; "eps" anywhere in a name makes them small.
        formula: What the project computes: of the convolution's output and its own tensors, named "norm.gamma".
        ours: Our layers.
        tlu: Shapes of the tensors under "act".
        found: What --from auto finds; several are an ambiguity.
    """

    source: str
    norm: Mapping[str, tuple[int, ...]]
    formula: Callable[[Array, Values], Array]
    ours: Callable[[], Mapping[str, nn.Module]]
    tlu: Mapping[str, tuple[int, ...]] = {}
    found: tuple[str, ...] = ()


def frn(**settings: Any) -> Callable[[], Mapping[str, nn.Module]]:
    return lambda: {"norm": FRN2d(C, **settings)}


def frn_and_tlu() -> Mapping[str, nn.Module]:
    return {"norm": FRN2d(C, tlu=False), "act": TLU(C)}


def greek(x: Array, v: Values, eps: Array | float) -> Array:
    return np.maximum(v["norm.gamma"] * rms(x, eps) + v["norm.beta"], v["norm.tau"])


def plain(x: Array, v: Values, eps: Array | float) -> Array:
    return np.maximum(v["norm.weight"] * rms(x, eps) + v["norm.bias"], v["act.tau"])


ROW, LAST = (1, C, 1, 1), (1, 1, 1, C)
GREEK = {"tau": ROW, "beta": ROW, "gamma": ROW}
PLAIN = {"weight": ROW, "bias": ROW}
TAU = {"tau": ROW}

CASES = {
    "gupta-abhay": Case(
        "gupta-abhay",
        {"eps": ROW, **GREEK},
        lambda x, v: greek(x, v, np.abs(v["norm.eps"])),
        frn(),
        found=("gupta-abhay", "tattaka"),
    ),
    "tattaka": Case(
        "tattaka",
        {"eps": ROW, **GREEK},
        lambda x, v: greek(x, v, np.abs(v["norm.eps"]) + 1e-6),
        frn(learned_eps="channel"),
        found=("gupta-abhay", "tattaka"),
    ),
    "tattaka, not activated": Case(
        "tattaka",
        {"eps": ROW, "beta": ROW, "gamma": ROW},
        lambda x, v: v["norm.gamma"] * rms(x, np.abs(v["norm.eps"]) + 1e-6) + v["norm.beta"],
        frn(tlu=False),
        found=("tattaka",),
    ),
    "tattaka, epsilon fixed": Case(
        "tattaka", GREEK, lambda x, v: greek(x, v, 1e-6 + 1e-6), frn(), found=("torch-uncertainty",)
    ),
    "knjcode": Case(
        "knjcode", {"eps": (1,), **GREEK}, lambda x, v: greek(x, v, np.abs(v["norm.eps"])), frn(), found=("knjcode",)
    ),
    "mindspore, method 2": Case(
        "mindspore",
        {"eps": (1,), **GREEK},
        lambda x, v: (
            np.maximum(v["norm.gamma"] * rms(x, np.abs(v["norm.eps"])) + v["norm.beta"] - v["norm.tau"], 0)
            + v["norm.tau"]
        ),
        frn(),
        found=("knjcode",),
    ),
    "torch-uncertainty": Case(
        "torch-uncertainty", GREEK, lambda x, v: greek(x, v, 1e-6), frn(), found=("torch-uncertainty",)
    ),
    "yukkyo": Case("yukkyo", PLAIN, lambda x, v: plain(x, v, 1e-6), frn_and_tlu, TAU, found=("yukkyo",)),
    "yukkyo, learned": Case(
        "yukkyo",
        {**PLAIN, "eps": (1,)},
        lambda x, v: plain(x, v, np.abs(v["norm.eps"])),
        frn_and_tlu,
        TAU,
        found=("yukkyo",),
    ),
    "kornia": Case(
        "kornia",
        {**PLAIN, "eps": (1,)},
        lambda x, v: plain(x, v, np.abs(v["norm.eps"])),
        frn_and_tlu,
        TAU,
        found=("yukkyo",),
    ),
    "mx-font": Case(
        "mx-font", {**PLAIN, "eps": ()}, lambda x, v: plain(x, v, np.abs(v["norm.eps"])), frn_and_tlu, TAU, ("yukkyo",)
    ),
    "fast-reid": Case(
        "fast-reid",
        {"weight": (C,), "bias": (C,), "eps": (1,)},
        lambda x, v: np.maximum(
            column(v["norm.weight"]) * rms(x, np.abs(v["norm.eps"])) + column(v["norm.bias"]), column(v["act.tau"])
        ),
        frn_and_tlu,
        {"tau": (C,)},
        found=("fast-reid",),
    ),
    "timm, Tlu2d": Case(
        "timm",
        {"weight": (C,), "bias": (C,), "tau": (C,)},
        lambda x, v: np.maximum(
            rms(x, 1e-5) * column(v["norm.weight"]) + column(v["norm.bias"]), column(v["norm.tau"])
        ),
        frn(),
        found=("timm", "deploynorm"),
    ),
    "tensorflow-addons": Case(
        "tensorflow-addons",
        {"gamma": LAST, "beta": LAST, "learned_epsilon": (1,)},
        lambda x, v: np.maximum(
            v["norm.gamma"] * rms(x, 1e-6 + np.abs(v["norm.learned_epsilon"]), (1, 2)) + v["norm.beta"], v["act.tau"]
        ),
        lambda: {"norm": FRN2d(C, learned_eps="layer", tlu=False), "act": TLU(C)},
        {"tau": (1, 1, C), "alpha": (0,)},
        found=("tensorflow-addons",),
    ),
    "tensorflow-addons, epsilon fixed": Case(
        "tensorflow-addons",
        {"gamma": LAST, "beta": LAST},
        lambda x, v: v["norm.gamma"] * rms(x, 1e-6, (1, 2)) + v["norm.beta"],
        frn(tlu=False),
        found=("tensorflow-addons",),
    ),
    "tensorflow-listing": Case(
        "tensorflow-listing",
        {"tau": LAST, "beta": LAST, "gamma": LAST, "eps": ()},
        lambda x, v: np.maximum(
            v["norm.gamma"] * rms(x, np.abs(v["norm.eps"]), (1, 2)) + v["norm.beta"], v["norm.tau"]
        ),
        frn(),
        found=("tensorflow-listing",),
    ),
    "deepfacelab": Case(
        "deepfacelab",
        {"weight": (C,), "bias": (C,), "eps": (1,)},
        lambda x, v: np.maximum(
            rms(x, np.abs(v["norm.eps"]), (1, 2)) * v["norm.weight"] + v["norm.bias"], v["act.tau"]
        ),
        frn_and_tlu,
        {"tau": (C,)},
        found=("deepfacelab",),
    ),
    "mabn, det": Case(
        "mabn",
        {
            "weight": (C,), "bias": (C,), "running_var": ROW, "iters": (1,), "buffer_x2": (16, C), "buffer_gz": (16, C),
        },
        lambda x, v: (
            column(v["norm.weight"]) * (x / np.sqrt(v["norm.running_var"] + 1e-5)) + column(v["norm.bias"])
        ),
        lambda: {"norm": MABN2d(C)},
        found=("mabn",),
    ),
    "mabn, cls": Case(
        "mabn",
        {
            **{name: (C,) for name in ("weight", "bias", "running_var")},
            **{"sta_matrix": (16, 32), "pre_x2": (16, C), "pre_gz": (16, C), "iters": (1,)},
        },
        lambda x, v: (
            column(v["norm.weight"]) * (x / np.sqrt(column(v["norm.running_var"]) + 1e-5)) + column(v["norm.bias"])
        ),
        lambda: {"norm": MABN2d(C, moving_batch_size=8)},
        found=("mabn",),
    ),
}  # fmt: skip


def theirs(case: Case, seed: int = 0) -> dict[str, Array]:
    """A file of the project: small activations, so that an epsilon matters, and epsilons of both signs."""
    draw = np.random.default_rng(seed)
    last = SOURCES[case.source].channels_last
    kernel = draw.normal(size=(3, 3, IN, C) if last else (C, IN, 3, 3)) * 1e-3
    values = {f"conv.{'weight' if case.source == 'deepfacelab' or not last else 'kernel'}": kernel}
    for path, shapes in (("norm", case.norm), ("act", case.tlu)):
        for name, shape in shapes.items():
            drawn = draw.normal(size=shape)
            values[f"{path}.{name}"] = drawn * 1e-5 if "eps" in name else drawn**2 if "var" in name else drawn
    rounded = {name: np.asarray(value, np.float32) for name, value in values.items()}
    return {name.replace(".", "/") + ":0": value for name, value in rounded.items()} if last else rounded


def network(case: Case) -> nn.Module:
    convolution = CenConv2d if SOURCES[case.source].is_mabn else nn.Conv2d
    return nn.Sequential(OrderedDict(conv=convolution(IN, C, 3, bias=False), **case.ours())).double().eval()


def expected(case: Case, file: Values, x: Array) -> Array:
    values = {name.removesuffix(":0").replace("/", "."): value.astype(np.float64) for name, value in file.items()}
    kernel = values[next(name for name in values if name.startswith("conv"))]
    if SOURCES[case.source].channels_last:
        return case.formula(conv_last(x.transpose(0, 2, 3, 1), kernel), values).transpose(0, 3, 1, 2)
    if SOURCES[case.source].is_mabn:
        kernel = kernel - kernel.mean((1, 2, 3), keepdims=True)
    return case.formula(conv(x, kernel), values)


def assert_close(got: Tensor, want: Array) -> None:
    error = float(np.abs(got.detach().numpy() - want).max() / np.abs(want).max())
    assert error <= IMPORTED.rtol, error


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_our_layers_compute_the_formula_of_the_project(case: Case) -> None:
    file = theirs(case)
    translation = translate(file, case.source)
    ours = network(case)
    ours.load_state_dict(translation.state_dict)
    x = np.random.default_rng(1).normal(size=(2, IN, 9, 8))
    want = expected(case, file, x)
    with torch.no_grad():
        assert_close(ours(torch.from_numpy(x)), want)
    again = network(case)
    again.load_state_dict(ours.state_dict())  # as from a file of deploynorm.save
    with torch.no_grad():
        assert_close(again(torch.from_numpy(x)), want)


def test_every_source_has_a_case() -> None:
    assert {case.source for case in CASES.values()} | {"unified-normalization", "deploynorm"} == set(SOURCES)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_auto_finds_the_project_or_lists_those_that_differ(case: Case) -> None:
    file = theirs(case)
    if len(case.found) > 1:
        options = " or ".join(f"--from {name}" for name in case.found)
        with pytest.raises(ModelError, match=f"could be of several projects.* Fix: name yours: {options}"):
            translate(file)
        return
    found = translate(file)
    assert found.source == case.found[0]
    if case.found[0] == case.source or "epsilon fixed" not in str(case):
        named = translate(file, case.source)
        if case.source != "tattaka" or case.found == ("tattaka",):
            assert found.state_dict.keys() == named.state_dict.keys()
            for name, value in found.state_dict.items():
                torch.testing.assert_close(value, named.state_dict[name], **EXACT.kwargs())
