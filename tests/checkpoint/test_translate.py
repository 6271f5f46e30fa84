"""Other projects' state dicts through our layers, each against the formula that the project publishes, in NumPy."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pages import text_of
from tolerances import IMPORTED
from torch import Tensor, nn

from deploynorm.checkpoint import translate
from deploynorm.errors import InputError, ModelError
from deploynorm.layers import TLU, CenConv2d, FRN1d, FRN2d, FRN3d, MABN1d, MABN2d
from deploynorm.sources import SOURCES

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
    "deploynorm": Case(
        "deploynorm",
        {"weight": (C,), "bias": (C,), "tau": (C,)},
        lambda x, v: np.maximum(
            rms(x, 1e-6) * column(v["norm.weight"]) + column(v["norm.bias"]), column(v["norm.tau"])
        ),
        frn(),
        found=("timm", "deploynorm"),
    ),
    "deploynorm, epsilon by channel": Case(
        "deploynorm",
        {"weight": (C,), "bias": (C,), "tau": (C,), "eps": (C,)},
        lambda x, v: np.maximum(
            rms(x, column(np.abs(v["norm.eps"]))) * column(v["norm.weight"]) + column(v["norm.bias"]),
            column(v["norm.tau"]),
        ),
        frn(),
        found=("deploynorm",),
    ),
    "tensorflow-addons": Case(
        "tensorflow-addons",
        {"gamma": LAST, "beta": LAST, "learned_epsilon": (1,)},
        lambda x, v: np.maximum(
            v["norm.gamma"] * rms(x, 1e-6 + np.abs(v["norm.learned_epsilon"]), (1, 2)) + v["norm.beta"], v["act.tau"]
        ),
        lambda: {"norm": FRN2d(C, learned_eps="layer", tlu=False), "act": TLU(C)},
        {"tau": (1, 1, C)},
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
    "tensorflow-listing, epsilon fixed": Case(
        "tensorflow-listing",
        {"tau": LAST, "beta": LAST, "gamma": LAST},
        lambda x, v: np.maximum(v["norm.gamma"] * rms(x, 1e-6, (1, 2)) + v["norm.beta"], v["norm.tau"]),
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
            **dict.fromkeys(("weight", "bias", "running_var"), (C,)),
            "sta_matrix": (16, 32), "pre_x2": (16, C), "pre_gz": (16, C), "iters": (1,),
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
    norm = ours.get_submodule("norm")
    assert isinstance(norm, FRN2d) or translation.layers[0].eps == (norm.eps, norm.eps)  # which MABN does not store
    again = network(case)
    again.load_state_dict(ours.state_dict())  # as from a file of deploynorm.save
    with torch.no_grad():
        assert_close(again(torch.from_numpy(x)), want)


def test_every_source_has_a_case_and_a_row_on_the_page() -> None:
    assert {case.source for case in CASES.values()} | {"unified-normalization"} == set(SOURCES)
    rows = re.findall(r"^\| `([\w-]+)` \|", text_of("docs/import.md"), re.MULTILINE)
    assert sorted(rows) == sorted(SOURCES)


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
    named = translate(file, case.source)
    assert found.state_dict.keys() == named.state_dict.keys()
    agree = all(torch.equal(value, named.state_dict[name]) for name, value in found.state_dict.items())
    assert agree == (case is not CASES["tattaka, epsilon fixed"])  # which only its name tells from torch-uncertainty


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_frn_of_torch_uncertainty_in_every_rank(dims: int) -> None:
    draw, shape = np.random.default_rng(dims), (1, C, *(1,) * dims)
    tau, beta, gamma = (draw.normal(size=shape) for _ in range(3))
    translation = translate({"n.tau": tau, "n.beta": beta, "n.gamma": gamma}, "torch-uncertainty")
    (layer,) = translation.layers
    assert (layer.name, layer.kind, layer.channels, layer.eps) == ("n", f"FRN{dims}d", C, (1e-6, 1e-6))
    ours = nn.Sequential(OrderedDict(n=(FRN1d, FRN2d, FRN3d)[dims - 1](C))).double()
    ours.load_state_dict(translation.state_dict)
    x = draw.normal(size=(2, C, 6, 5, 4)[: 2 + dims]) * 1e-3
    want = np.maximum(gamma * rms(x, 1e-6, tuple(range(2, 2 + dims))) + beta, tau)
    assert_close(ours(torch.from_numpy(x)), want)


def test_one_dimensional_frn_of_tattaka_and_of_mx_font() -> None:
    """Over (N, C) each value is its own mean; MX-Font's always learns its epsilon."""
    draw = np.random.default_rng(0)
    gamma, beta, tau, eps = (draw.normal(size=(1, C)) for _ in range(4))
    state = translate({"gamma": gamma, "beta": beta, "tau": tau, "eps": eps}, "tattaka").state_dict
    flat = FRN1d(C, learned_eps="channel", dtype=torch.float64)
    flat.load_state_dict(state)
    x = draw.normal(size=(3, C))
    want = gamma * x / np.sqrt(x**2 + np.abs(eps) + 1e-6) + beta
    assert_close(flat(torch.from_numpy(x)), np.maximum(want, tau))

    weight, bias = (draw.normal(size=(1, C, 1)) for _ in range(2))
    state = translate({"weight": weight, "bias": bias, "eps": np.float64(-3e-5)}, "mx-font").state_dict
    layer = FRN1d(C, tlu=False, dtype=torch.float64)
    layer.load_state_dict(state)
    x = draw.normal(size=(3, C, 7)) * 1e-2
    assert_close(layer(torch.from_numpy(x)), weight * rms(x, 3e-5, (2,)) + bias)


def test_unified_normalization() -> None:
    draw = np.random.default_rng(0)
    weight, bias, moment = draw.normal(size=C), draw.normal(size=C), draw.uniform(0.5, 2, C)
    buffers = {"iters": np.int64([9000]), "skip_counter": np.int64([3]), "ema_gz": np.zeros(C)}
    buffers |= {"buffer_x2": np.ones((4, C)), "buffer_gz": np.zeros((4, C))}
    state = {"weight": weight, "bias": bias, "running_var": moment, **buffers}
    translation = translate(state)
    assert translation.source == "unified-normalization"
    assert set(translation.dropped) == set(buffers)
    ours = MABN1d(C, dtype=torch.float64).eval()
    ours.load_state_dict(translation.state_dict)
    x = draw.normal(size=(2, 7, C))  # (N, L, C), as theirs takes it
    got = ours(torch.from_numpy(x).mT).mT
    assert_close(got, weight * x / np.sqrt(moment + 1e-5) + bias)
    assert translation.layers[0].eps == (1e-5, 1e-5)


def test_training_goes_on_from_an_imported_second_moment() -> None:
    ours = network(CASES["mabn, det"])
    ours.load_state_dict(translate(theirs(CASES["mabn, det"])).state_dict)
    norm = ours.train().get_submodule("norm")
    assert isinstance(norm, MABN2d)
    before = norm.running_var.clone()
    x = torch.randn(2, C, 4, 4, dtype=torch.float64)
    norm(x)
    torch.testing.assert_close(norm.running_var, before.lerp(x.square().mean((0, 2, 3)), 0.02))
    assert not norm.recent_x2[1:].any()


def test_eps_takes_the_place_of_what_no_file_stores() -> None:
    for source, want in (("timm", 1e-3), ("tattaka", 2e-3)):
        case = CASES["timm, Tlu2d" if source == "timm" else "tattaka, epsilon fixed"]
        translation = translate(theirs(case), source, eps=1e-3)
        torch.testing.assert_close(translation.state_dict["norm.eps"], torch.full((C,), want))
    assert translate(theirs(CASES["timm, Tlu2d"]), eps=1e-5).source == "timm", "with it, both candidates agree"
    with pytest.raises(InputError, match=r"checkpoints of gupta-abhay/pytorch-frn store every epsilon. Got eps=0\.1"):
        translate(theirs(CASES["gupta-abhay"]), "gupta-abhay", eps=0.1)


def test_what_is_no_norm_layer_passes_through() -> None:
    others: dict[str, Any] = {**nn.BatchNorm2d(2).state_dict(), **nn.Conv2d(1, C, 1).state_dict(prefix="a.")}
    others |= {**nn.GroupNorm(1, C).state_dict(prefix="b."), "c.gamma": torch.ones(C), "d.tau": torch.tensor(0.1)}
    others |= {"e.weight": torch.ones(1, C, 1, 1), "e.bias": torch.ones(1), "f._extra_state": {"seen": 3}}
    for source, layers in (("knjcode", ["norm"]), ("kornia", ["norm", "act"])):
        translation = translate({**theirs(CASES[source]), **others}, source)
        assert translation.state_dict["f._extra_state"] == {"seen": 3}
        assert all(torch.equal(translation.state_dict[n], t) for n, t in others.items() if isinstance(t, Tensor))
        assert [layer.name for layer in translation.layers] == layers


def test_kernels_and_norms_of_tensorflow_take_the_layout_of_pytorch() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, 6, 5, 4))
    layers = {
        "deep": (nn.Conv2d(4, 8, 3, groups=4, bias=False), "depthwise_kernel", (3, 3, 4, 2)),
        "up": (nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False), "kernel", (2, 2, 3, 4)),
        "dense": (nn.Linear(4, 3, bias=False), "kernel", (4, 3)),
        "one": (nn.Conv1d(4, 3, 2, bias=False), "kernel", (2, 4, 3)),
    }
    kernels = {name: draw.normal(size=shape) for name, (_, _, shape) in layers.items()}
    batch_norm = {key: draw.uniform(0.5, 2, 4) for key in ("gamma", "beta", "moving_mean", "moving_variance")}
    state = {f"{name}/{key}:0": kernels[name] for name, (_, key, _) in layers.items()}
    state |= {f"bn/{key}:0": value for key, value in batch_norm.items()}
    translation = translate({**state, **theirs(CASES["tensorflow-addons"])}, "tensorflow-addons")
    ours = nn.ModuleDict({**{name: layer for name, (layer, _, _) in layers.items()}, "bn": nn.BatchNorm2d(4)})
    missing, _ = ours.double().eval().load_state_dict(translation.state_dict, strict=False)
    assert not missing
    first = torch.from_numpy(x).permute(0, 3, 1, 2)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    want = np.einsum("nhwiab,abim->nimhw", windows, kernels["deep"]).reshape(2, 8, 4, 3)
    assert_close(ours["deep"](first), want)
    # Each input pixel puts a block, kernel @ x, where the stride leads it.
    want = np.einsum("nhwi,aboi->nohawb", x, kernels["up"]).reshape(2, 3, 12, 10)
    assert_close(ours["up"](first), want)
    assert_close(ours["dense"](torch.from_numpy(x)), x @ kernels["dense"])
    line = np.lib.stride_tricks.sliding_window_view(x[:, 0], 2, 1)
    assert_close(ours["one"](first[:, :, 0]), np.einsum("nlia,aio->nol", line, kernels["one"]))
    gamma, beta, mean, variance = batch_norm.values()
    assert_close(ours["bn"](first).permute(0, 2, 3, 1), gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta)


def kornia(**changed: Array) -> dict[str, Array]:
    return {**theirs(CASES["kornia"]), **changed}


def addons(tau: Array, alpha: Array | None = None) -> dict[str, Array]:
    alphas = {} if alpha is None else {"act/alpha:0": alpha}
    return {**theirs(CASES["tensorflow-addons, epsilon fixed"]), "act/tau:0": tau, **alphas}


POSITIONS = np.random.default_rng(0).normal(size=(4, 4, C))

REFUSED: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "unknown source": (kornia(), "torchvision", r"no such source. Got 'torchvision'; expected auto, mabn"),
    "no norm layer": (nn.Conv2d(1, 1, 1).state_dict(), "auto", "no FRN and no MABN layer of a project that we know"),
    "of another source": (kornia(), "mabn", r"no FRN and no MABN layer of megvii-model/MABN.* Fix: pass --from auto"),
    "ours": (FRN2d(C, learned_eps="layer").state_dict(), "auto", "it has layers of deploynorm already. Got eps_l"),
    "timm's or ours": (FRN2d(C).state_dict(), "auto", "timm, epsilon 1e-05; deploynorm: deploynorm itself, eps"),
    "wrong channels": (
        kornia(**{"norm.bias": np.ones((1, 3, 1, 1))}),
        "kornia",
        r"norm.bias has not the shape that it has in kornia, HyNet. Got \(1, 3, 1, 1\); expected \(1, 5, 1, 1\)",
    ),
    "wrong rank": (
        {"n.gamma": np.ones(C), "n.beta": np.ones(C), "n.tau": np.ones(C), "n.eps": np.ones(1)},
        "knjcode",
        r"n.gamma has not the shape .* Got \(5,\); expected \(1, C, 1, 1\)",
    ),
    "epsilon of another shape": (
        {**theirs(CASES["gupta-abhay"]), "norm.eps": np.ones(1)}, "gupta-abhay", "norm.eps has not .* of the others",
    ),
    "epsilon of 0": (kornia(**{"norm.eps": np.zeros(1)}), "kornia", "the epsilon of norm is not positive"),
    "epsilon that is NaN": (kornia(**{"norm.eps": np.full(1, np.nan)}), "kornia", "the epsilon of norm is not pos"),
    "one layer of two is damaged": (
        {**theirs(CASES["knjcode"]), **{f"b.{key}": np.ones((1, 3 + (key == "tau"), 1, 1)) for key in GREEK}}
        | {"b.eps": np.ones(1)},
        "auto",
        r"b\.\w+ has not the shape that it has in knjcode",
    ),
    "a single threshold": (
        kornia(**{"act.tau": np.zeros(1)}), "kornia", r"act.tau is not one threshold for each channel. Got \(1,\)",
    ),
    "thresholds by position": (
        addons(POSITIONS),
        "auto",
        r"act.tau has a threshold for each position \(H, W, C\) of one input size; FRN's is for each channel",
    ),
    "affine thresholds": (addons(np.zeros((4, 4, C)), POSITIONS), "auto", r"max\(x, alpha \* x \+ tau\)"),
    "an epsilon of no layer": (
        {**addons(np.zeros(C)), "learned_epsilon:0": np.ones(1)}, "auto", "learned_epsilon:0 is under the name of no",
    ),
    "a sparse tensor": (
        {**theirs(CASES["knjcode"]), "norm.tau": torch.zeros(ROW).to_sparse()}, "knjcode", "norm.tau is no dense",
    ),
    "without values": (FRN2d(C, device="meta").state_dict(), "timm", "tensors without values .on the meta device"),
    "no channels": (
        {f"n.{key}": np.ones((1, 0, 1, 1)) for key in GREEK} | {"n.eps": np.ones(1)},
        "knjcode",
        r"n.gamma has not the shape .* Got \(1, 0, 1, 1\); expected \(1, C, 1, 1\)",
    ),
    "no thresholds": (addons(np.zeros((0, 0, C))), "auto", r"act.tau is not one threshold for each channel"),
    "a complex weight": (
        {**theirs(CASES["knjcode"]), "norm.gamma": np.ones(ROW, np.complex64)}, "auto", "norm.gamma is no tensor of fl",
    ),
    "an integer epsilon": (kornia(**{"norm.eps": np.ones(1, int)}), "auto", "norm.eps is no .* Got torch.int64; exp"),
    "a threshold of truth values": (kornia(**{"act.tau": np.ones(ROW, bool)}), "kornia", "act.tau is no tensor of flo"),
    "names that become one": (
        {**addons(np.zeros(C)), "norm/gamma": np.zeros(LAST)},
        "auto",
        "two tensors of the file are norm.gamma. Got norm/gamma:0 and norm/gamma",
    ),
    "no state dict": ([1], "kornia", "no state dict. Got list"),
    "an array of text": ({"a": np.array(["b"])}, "kornia", "'a' is no array of numbers. Got <U1"),
    "what is no tensor": ({"a": 1}, "kornia", "a state dict with what is no tensor. Got 'a', int"),
}  # type: ignore[dict-item]  # fmt: skip


@pytest.mark.parametrize(("state", "source", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(state: Mapping[str, Any], source: str, message: str) -> None:
    with pytest.raises((InputError, ModelError), match=message):
        translate(state, source)


def test_thresholds_that_are_equal_at_every_position_are_those_of_the_channels() -> None:
    tau = np.broadcast_to(np.arange(C, dtype=np.float32), (4, 4, C))
    translation = translate(addons(tau, np.zeros((4, 4, C))))
    torch.testing.assert_close(translation.state_dict["act.tau"], torch.arange(C, dtype=torch.float32))
    assert translation.dropped == ("act/alpha:0",)


def test_a_network_takes_thresholds_into_its_frn_and_tells_frn_from_a_group_norm() -> None:
    file = kornia()
    ours = nn.Sequential(OrderedDict(conv=nn.Conv2d(IN, C, 3, bias=False), norm=FRN2d(C), act=nn.Identity())).double()
    translation = translate(file, network=ours)
    ours.load_state_dict(translation.state_dict)
    x = np.random.default_rng(1).normal(size=(2, IN, 9, 8))
    assert_close(ours(torch.from_numpy(x)), expected(CASES["kornia"], file, x))
    assert [layer.kind for layer in translation.layers] == ["FRN2d"]
    assert "1 thresholds went into the FRN" in str(translation)

    affine = {"weight": torch.rand(C), "bias": torch.rand(C)}
    state = {f"{name}.{key}": value for name in ("frn", "group") for key, value in affine.items()}
    state["other.tau"] = torch.zeros(C)
    state |= {f"other.{key}": value for key, value in affine.items()}
    blind = translate(state, "timm")
    assert [layer.name for layer in blind.layers] == ["other"]
    assert "frn, group stay as they are" in str(blind)
    both = nn.ModuleDict({"frn": FRN2d(C, tlu=False), "group": nn.GroupNorm(1, C), "other": FRN2d(C)})
    seeing = translate(state, "timm", network=both)
    both.load_state_dict(seeing.state_dict)
    torch.testing.assert_close(both["frn"].eps, torch.full((C,), 1e-5))


def test_the_result_prints_what_was_done() -> None:
    printed = str(translate(theirs(CASES["gupta-abhay"]), "gupta-abhay"))
    assert "Layers of gupta-abhay/pytorch-frn" in printed
    assert "gamma -> weight, beta -> bias, tau, eps" in printed
    printed = str(translate(theirs(CASES["mabn, cls"])))
    assert "found to be layers of megvii-model/MABN" in printed
    assert "dropped: sta_matrix, pre_x2, pre_gz, iters of 1 layers, which only training needs" in printed
    assert "the file stores no epsilon: 1e-05 is what layers of timm have" in str(
        translate(theirs(CASES["timm, Tlu2d"]), "timm")
    )
