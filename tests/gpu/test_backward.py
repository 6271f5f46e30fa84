"""The CUDA kernels of the backward pass, on the emulation and on a GPU where there is one, as test_forward.py has those
of the forward pass."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from cases import CASES, NormCase, make_inputs
from cuda_kernels import (
    BACKWARD_LAYOUTS,
    CHANNELS,
    INVALID_VALUE,
    SPATIAL,
    VARIANTS,
    CudaKernel,
    Layout,
    check_backward,
    check_ties,
    sized,
    variants_to_check,
)
from frn_gradient import Gradients, gradients
from references import backward_inputs
from tolerances import FLOAT64

from deploynorm.contract import DTYPES
from deploynorm.libraries.kernels import Backward


@pytest.mark.parametrize("layout", BACKWARD_LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case: NormCase, layout: Layout, kernel: CudaKernel) -> None:
    check_backward(kernel, case, variants_to_check(kernel, case), layout=layout)
    assert check_backward(kernel, case, layout=layout, in_place=True) == 1


@pytest.mark.parametrize("layout", BACKWARD_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_every_turn(dtype: str, layout: Layout, kernel: CudaKernel) -> None:
    sizes = [(2, 3, spatial) for spatial in SPATIAL] + [(1, channels, 5) for channels in CHANNELS]
    taken = dict.fromkeys(VARIANTS, 0)
    for size, variant in product(sizes, VARIANTS):
        taken[variant] += check_backward(kernel, sized(dtype, *size), [variant], layout=layout)
    # Packed and split may refuse many of these, and two passes none; strips are held in whole packs alone.
    assert taken["two_passes"] == len(sizes)
    assert taken["registers"] >= (len(CHANNELS) if layout == "nchw" else 3)


@pytest.mark.parametrize("samples", [3, 4, 5, 127, 129, None], ids=["3", "4", "5", "127", "129", "many"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_over_the_samples(dtype: str, samples: int | None, kernel: CudaKernel) -> None:
    samples = samples or (700 if kernel.device == "cpu" else 5000)
    for channels in (1, 8, 17):
        assert check_backward(kernel, sized(dtype, samples, channels, 2)) == 1


@pytest.mark.parametrize("shifts", [(1, 1, 1), (3, 3, 3), (1, 0, 0), (0, 1, 0), (0, 0, 1), (5, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_begin_off_16_bytes(dtype: str, shifts: tuple[int, int, int], kernel: CudaKernel) -> None:
    """A view into a larger tensor does. The emulation stops at an access that is not aligned, as a GPU does."""
    for layout, spatial in product(BACKWARD_LAYOUTS, (1, 5, 49, 1025)):
        assert check_backward(kernel, sized(dtype, 2, 8, spatial), (None, *VARIANTS), layout=layout, shifts=shifts)


@pytest.mark.parametrize("layout", BACKWARD_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_its_threshold_an_element_is_where_the_forward_pass_had_it(
    dtype: str, layout: Layout, kernel: CudaKernel
) -> None:
    check_ties(kernel, dtype, (None, *VARIANTS), layout=layout)


def run(kernel: CudaKernel, case: NormCase, layout: Layout, variant: str | None = None) -> Gradients | None:
    return kernel.backward(*backward_inputs(case), layout=layout, variant=variant)


def same(a: Gradients | None, b: Gradients | None) -> bool:
    """Whether two results are bit-exact."""
    assert a is not None
    assert b is not None
    return all(mine.tobytes() == other.tobytes() for mine, other in zip(a, b, strict=True))


@pytest.mark.parametrize("grid", ["1", "3"])
@pytest.mark.parametrize("layout", BACKWARD_LAYOUTS)
def test_more_tiles_than_a_grid_may_have_blocks(
    layout: Layout, grid: str, emulated: CudaKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spatial, variant in product((4, 300), VARIANTS):
        case = sized("float16", 4, 24, spatial)
        if (freely := run(emulated, case, layout, variant)) is not None:
            monkeypatch.setenv("EMULATED_MAX_GRID", grid)
            assert same(freely, run(emulated, case, layout, variant))
            monkeypatch.delenv("EMULATED_MAX_GRID")


# What runs on a device of 10 multiprocessors.
CHOICES: dict[str, tuple[tuple[int, ...], Layout, str]] = {
    "5x5": ((8, 64, 25), "nchw", "packed"),
    "7x7": ((8, 64, 49), "nchw", "registers"),
    "1x1, either layout": ((64, 48, 1), "nhwc", "packed"),
    "14x14": ((2, 64, 196), "nchw", "registers"),
    "56x56": ((1, 16, 3136), "nchw", "registers"),
    "112x112, few": ((1, 3, 12544), "nchw", "registers"),
    "7x7 channels last": ((3, 128, 49), "nhwc", "registers"),
    "28x28 channels last": ((1, 80, 784), "nhwc", "registers"),
    "a plane that no block holds": ((1, 10, 17000), "nchw", "two_passes"),
    "few that no block holds": ((1, 3, 33000), "nchw", "split"),
    "112x112 channels last": ((1, 16, 12544), "nhwc", "split"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_variant_is_chosen_by_sizes_and_device(
    name: str, emulated: CudaKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of a choice is bit-exact the result of the variant when asked for. Packed and split add in an
    order of their own, and differ; registers and two passes add in the same."""
    shape, layout, expected = CHOICES[name]
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", "10")
    case = NormCase(name, shape)
    chosen = run(emulated, case, layout)
    others = {variant: run(emulated, case, layout, variant) for variant in VARIANTS}
    alike = {variant for variant, other in others.items() if other and same(chosen, other)}
    assert expected in alike
    assert shape[2] == 1 or alike <= {expected, "registers", "two_passes"}


def test_the_same_call_gives_the_same_bits(kernel: CudaKernel) -> None:
    case = sized("bfloat16", 8, 24, 49)
    for layout, variant in product(BACKWARD_LAYOUTS, (None, "two_passes", "split")):
        assert same(run(kernel, case, layout, variant), run(kernel, case, layout, variant))


def test_what_is_not_there_is_refused(emulated: CudaKernel) -> None:
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
