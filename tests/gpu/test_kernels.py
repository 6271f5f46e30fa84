"""The CUDA kernels of both passes, on the emulation and on a GPU where there is one: right numbers, and nothing else
touched, in every type, layout and variant."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cases import ADD_CASES, CASES, NormCase, make_inputs
from cuda_kernels import (
    BACKWARD_LAYOUTS,
    CHANNELS,
    INVALID_VALUE,
    LAYOUTS,
    SPATIAL,
    VARIANTS,
    CudaKernel,
    Layout,
    check,
    check_backward,
    check_one_rounding,
    check_ties,
    sized,
    variants_to_check,
)
from frn_gradient import gradients
from references import backward_inputs, inputs_of
from tolerances import FLOAT64

from deploynorm.contract import DTYPES
from deploynorm.libraries.kernels import Backward, Forward

CHECK: dict[str, Callable[..., int]] = {"forward": check, "backward": check_backward}
LAYOUTS_OF: dict[str, tuple[Layout, ...]] = {"forward": LAYOUTS, "backward": BACKWARD_LAYOUTS}

both_passes = pytest.mark.parametrize(
    ("which", "layout"), [(which, layout) for which, layouts in LAYOUTS_OF.items() for layout in layouts]
)


def test_variants_are_those_that_are_tested(kernel: CudaKernel) -> None:
    assert kernel.variants == list(VARIANTS)


@both_passes
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case.name == "big_plane" else []) for case in CASES],
    ids=str,
)
def test_numbers(case: NormCase, which: str, layout: Layout, kernel: CudaKernel) -> None:
    CHECK[which](kernel, case, variants_to_check(kernel, case), layout=layout)
    assert CHECK[which](kernel, case, layout=layout, in_place=True) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ADD_CASES, ids=str)
def test_numbers_with_a_residual(case: NormCase, layout: Layout, kernel: CudaKernel) -> None:
    assert check(kernel, case, (None, *VARIANTS), layout=layout)
    assert check(kernel, case, layout=layout, in_place=True, workspace=False) == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_scratch_memory_and_without_rstd(case: NormCase, kernel: CudaKernel) -> None:
    for layout in LAYOUTS:
        assert check(kernel, case, layout=layout, statistics=False, workspace=False) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_y_is_rounded_once_behind_its_scale(dtype: str, kernel: CudaKernel) -> None:
    for layout, variant in product(LAYOUTS, VARIANTS):
        taken = check_one_rounding(kernel, dtype, layout=layout, variant=variant)
        assert taken or variant in ("runs", "clusters", "split")  # none of them takes planes of all sizes


@both_passes
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_every_turn(dtype: str, which: str, layout: Layout, kernel: CudaKernel) -> None:
    sizes = [(2, 3, spatial) for spatial in SPATIAL] + [(1, channels, 5) for channels in CHANNELS]
    taken = dict.fromkeys(VARIANTS, 0)
    for size, variant in product(sizes, VARIANTS):
        taken[variant] += CHECK[which](kernel, sized(dtype, *size), [variant], layout=layout)
    # Runs, clusters and split may refuse many of these, two passes none; the backward pass holds strips in whole packs.
    assert taken["two_passes"] == len(sizes)
    assert taken["registers"] >= (3 if (which, layout) == ("backward", "nhwc") else len(CHANNELS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_around_every_turn_with_a_residual(dtype: str, layout: Layout, kernel: CudaKernel) -> None:
    sizes = [(2, 3, spatial) for spatial in SPATIAL] + [(1, channels, 5) for channels in CHANNELS]
    for size in sizes:
        assert check(kernel, sized(dtype, *size, residual=True), (None, *VARIANTS), layout=layout) >= 2
    for shifts in ((1, 1), (0, 1), (1, 0), (5, 2)):
        assert check(kernel, sized(dtype, 2, 8, 49, residual=True), (None, *VARIANTS), layout=layout, shifts=shifts)


@pytest.mark.parametrize("which", CHECK)
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_of_as_many_planes_as_a_warp_takes(dtype: str, which: str, kernel: CudaKernel) -> None:
    """And of fewer at the end of the tensor, whose elements are no whole vectors."""
    for spatial in (1, 3, 4, 7, 16, 25, 49):
        assert CHECK[which](kernel, sized(dtype, 9, 57, spatial), ["runs"]) == 1


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clusters_of_every_size(dtype: str, size: int, emulated: CudaKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each tile, and one for all of them; with rows in some of its blocks alone, too."""
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", str(size))
    for grid, *sizes in ((10**6, 1, 40, 5), (size, 2, 8, 5), (size, 2, 24, 301)):
        monkeypatch.setenv("EMULATED_MAX_GRID", str(grid))
        for layout, residual in product(LAYOUTS_OF["forward"][1:], (False, True)):
            case = sized(dtype, *sizes, residual=residual)
            assert check(emulated, case, ["clusters"], layout=layout) == 1
        assert check_backward(emulated, sized(dtype, *sizes), ["clusters"], layout="nhwc") == 1


@pytest.mark.parametrize("which", CHECK)
@pytest.mark.parametrize(
    ("name", "value"),
    [("CLUSTER", "0"), ("CLUSTER", "4"), ("PTX", "80"), ("SHARED", "30000")],
    ids=["a device without them", "no room for eight blocks", "code for earlier devices", "little shared memory"],
)
def test_where_clusters_cannot_run_another_variant_does(
    name: str, value: str, which: str, emulated: CudaKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", "10")
    case = NormCase("strips", (1, 16, 5000))
    assert CHECK[which](emulated, case, ["clusters"], layout="nhwc") == 1
    monkeypatch.setenv(f"EMULATED_{name}", value)
    assert CHECK[which](emulated, case, ["clusters", None], layout="nhwc") == 1


@pytest.mark.parametrize("samples", [3, 4, 5, 127, 129, None], ids=["3", "4", "5", "127", "129", "many"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_over_the_samples(dtype: str, samples: int | None, kernel: CudaKernel) -> None:
    samples = samples or (700 if kernel.device == "cpu" else 5000)
    for channels in (1, 8, 17):
        assert check_backward(kernel, sized(dtype, samples, channels, 2)) == 1


SHIFTS = [("forward", shifts) for shifts in ((1, 1), (3, 3), (0, 1), (1, 0), (5, 2))]
SHIFTS += [("backward", shifts) for shifts in ((1, 1, 1), (3, 3, 3), (1, 0, 0), (0, 1, 0), (0, 0, 1), (5, 2, 1))]


@pytest.mark.parametrize(("which", "shifts"), SHIFTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_begin_off_16_bytes(dtype: str, which: str, shifts: tuple[int, ...], kernel: CudaKernel) -> None:
    """A view into a larger tensor does. The emulation stops at an access that is not aligned, as a GPU does."""
    for layout, spatial in product(LAYOUTS_OF[which], (1, 5, 49, 1025)):
        case = sized(dtype, 2, 8, spatial)
        assert CHECK[which](kernel, case, (None, *VARIANTS), layout=layout, shifts=shifts)


@pytest.mark.parametrize("layout", BACKWARD_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_its_threshold_an_element_is_where_the_forward_pass_had_it(
    dtype: str, layout: Layout, kernel: CudaKernel
) -> None:
    check_ties(kernel, dtype, (None, *VARIANTS), layout=layout)


@pytest.mark.parametrize("grid", ["1", "3"])
@both_passes
def test_more_tiles_than_a_grid_may_have_blocks(
    which: str, layout: Layout, grid: str, emulated: CudaKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMULATED_MAX_GRID", grid)
    for spatial in (4, 300):
        assert CHECK[which](emulated, sized("float16", 4, 24, spatial), VARIANTS, layout=layout)


def result(kernel: CudaKernel, which: str, case: NormCase, layout: Layout, variant: str | None = None) -> bytes | None:
    """All bits that a pass gives; None where the variant does not take these sizes."""
    how: dict[str, Any] = {"layout": layout, "variant": variant}
    if which == "forward":
        y = kernel(*inputs_of(case).values(), **how)
        return None if y is None else y.tobytes()
    got = kernel.backward(*backward_inputs(case), **how)
    return None if got is None else b"".join(each.tobytes() for each in got)


# What runs on a device of 10 multiprocessors.
ALIKE: dict[str, tuple[tuple[int, ...], Layout, str]] = {
    "5x5": ((8, 64, 25), "nchw", "runs"),
    "7x7": ((8, 64, 49), "nchw", "runs"),
    "1x1, either layout": ((64, 48, 1), "nhwc", "runs"),
    "14x14": ((2, 64, 196), "nchw", "runs"),
    "56x56": ((1, 16, 3136), "nchw", "registers"),
    "112x112, few": ((1, 3, 12544), "nchw", "registers"),
    "7x7 channels last": ((3, 128, 49), "nhwc", "registers"),
    "28x28 channels last": ((1, 80, 784), "nhwc", "registers"),
    "few that no block holds": ((1, 3, 33000), "nchw", "split"),
    "56x56 channels last": ((1, 16, 3136), "nhwc", "clusters"),
    "112x112 channels last": ((1, 16, 12544), "nhwc", "clusters"),
    "112x112 channels last, few": ((1, 8, 12544), "nhwc", "split"),
}
CHOICES: dict[str, tuple[str, tuple[int, ...], Layout, str]] = {
    **{f"{which}, {name}": (which, *choice) for which in CHECK for name, choice in ALIKE.items()},
    "forward, a plane that no block holds": ("forward", (1, 10, 33000), "nchw", "two_passes"),
    "backward, a plane that no block holds": ("backward", (1, 10, 17000), "nchw", "two_passes"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_variant_is_chosen_by_sizes_and_device(
    name: str, emulated: CudaKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of a choice is bit-exact the result of the variant when asked for. Runs, clusters and split add in an
    order of their own, and the many sums of the backward pass differ; registers and two passes add in the same."""
    which, shape, layout, expected = CHOICES[name]
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", "10")
    case = NormCase(name, shape)
    chosen = result(emulated, which, case, layout)
    alike = {variant for variant in VARIANTS if result(emulated, which, case, layout, variant) == chosen}
    assert expected in alike
    assert which == "forward" or shape[2] == 1 or alike <= {expected, "registers", "two_passes"}


@both_passes
def test_the_same_call_gives_the_same_bits(which: str, layout: Layout, kernel: CudaKernel) -> None:
    case = sized("bfloat16", 8, 24, 49)
    for variant in (None, "two_passes", "split"):
        assert result(kernel, which, case, layout, variant) == result(kernel, which, case, layout, variant)


def test_what_is_not_there_is_refused(emulated: CudaKernel) -> None:
    def code(block: int = 1, kind: int = 0, variant: str | None = None) -> int:
        return emulated.call(Forward(1, 4, 9, block, kind), variant=variant)

    assert code(kind=9) == INVALID_VALUE
    assert code(block=2) == INVALID_VALUE, "a blocked layout"
    assert code(variant="fast") == INVALID_VALUE


def test_scratch_memory_never_shrinks_as_sizes_grow(emulated: CudaKernel) -> None:
    """A host asks once, for the largest shapes."""
    sizes = [(n, c, s) for n in (1, 2, 64) for c in (8, 64, 2048) for s in (1, 49, 5000, 10**6)]
    for dtype, channels_last in product(range(4), (False, True)):
        asked = {
            (n, c, s): emulated.workspace_bytes(Forward(n, c, s, c if channels_last else 1, dtype)) for n, c, s in sizes
        }
        for small, large in product(sizes, sizes):
            if all(a <= b for a, b in zip(small, large, strict=True)):
                assert asked[small] <= asked[large], (dtype, channels_last, small, large)
        assert max(asked.values()) < 64 * 2**20


def test_what_is_not_there_is_refused_by_the_backward_pass(emulated: CudaKernel) -> None:
    def code(block: int = 1, kind: int = 0, variant: str | None = None, workspace: int | None = 256) -> int:
        return emulated.call(Backward(1, 4, 9, block, kind), variant=variant, workspace=workspace)

    assert code(kind=9) == INVALID_VALUE
    assert code(block=2) == INVALID_VALUE, "a blocked layout"
    assert code(block=8) == INVALID_VALUE, "rows with padding"
    assert code(variant="fast") == INVALID_VALUE
    assert code(workspace=None) == INVALID_VALUE
    assert emulated.workspace_bytes(Backward(1, 4, 9, 1, 9)) == 0


def test_without_channels_there_is_nothing_to_write(emulated: CudaKernel) -> None:
    for sizes in ((2, 0, 9, 1), (2, 0, 9, 0), (0, 0, 0, 0)):
        assert emulated.call(Backward(*sizes, 0)) == 0


@pytest.mark.parametrize("tlu", [True, False], ids=["tlu", "no_tlu"])
def test_the_formulas_are_autograds(tlu: bool) -> None:
    """Of the definition in plain PyTorch; clamp gives its gradient to y where this is at the bound."""
    case = NormCase("formulas", (3, 6, 5, 7), "float64", eps="per_channel", tlu=tlu)
    x, *parameters = make_inputs(case).values()
    x[1] = 0
    parameters[1][:3] = parameters[2][:3] if tlu else 0  # beta is tau: a tie wherever x is 0
    dy = np.random.default_rng(2).standard_normal(x.shape)
    leaves = [torch.from_numpy(each).requires_grad_() for each in (x, *parameters)]
    gamma, beta, tau, eps = (leaf.reshape(1, -1, 1, 1) for leaf in leaves[1:])
    mean = leaves[0].square().mean(dim=(2, 3), keepdim=True)
    y = torch.clamp(gamma * leaves[0] * torch.rsqrt(mean + eps) + beta, min=tau)
    y.backward(torch.from_numpy(dy))
    for mine, leaf in zip(gradients(dy, x, *parameters), leaves, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(mine, leaf.grad.numpy(), **FLOAT64.kwargs())
