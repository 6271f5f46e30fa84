"""The CUDA kernels of the forward pass, on the emulation and on a GPU where there is one: right numbers, and nothing
else touched, in every type, layout and variant."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from cases import CASES, NormCase
from cuda_kernels import (
    CHANNELS,
    INVALID_VALUE,
    LAYOUTS,
    SPATIAL,
    VARIANTS,
    CudaKernel,
    Layout,
    check,
    check_one_rounding,
    sized,
    variants_to_check,
)

from deploynorm.contract import DTYPES
from deploynorm.libraries.kernels import Forward


def test_variants_are_those_that_are_tested(kernel: CudaKernel) -> None:
    assert kernel.variants == list(VARIANTS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case: NormCase, layout: Layout, kernel: CudaKernel) -> None:
    assert check(kernel, case, layout=layout)
    for variant in variants_to_check(kernel, case):
        check(kernel, case, layout=layout, variant=variant)


@pytest.mark.parametrize("dtype", DTYPES)
def test_y_is_rounded_once_behind_its_scale(dtype: str, kernel: CudaKernel) -> None:
    for layout, variant in product(LAYOUTS, VARIANTS):
        taken = check_one_rounding(kernel, dtype, layout=layout, variant=variant)
        assert taken or variant in ("packed", "split")  # neither takes planes of all sizes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_place_without_scratch_memory_and_without_rstd(case: NormCase, kernel: CudaKernel) -> None:
    for layout in LAYOUTS:
        assert check(kernel, case, layout=layout, statistics=False, in_place=True)
        assert check(kernel, case, layout=layout, statistics=False, workspace=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_every_turn(dtype: str, layout: Layout, kernel: CudaKernel) -> None:
    sizes = [(2, 3, spatial) for spatial in SPATIAL] + [(1, channels, 5) for channels in CHANNELS]
    taken = dict.fromkeys(VARIANTS, 0)
    for size, variant in product(sizes, VARIANTS):
        taken[variant] += check(kernel, sized(dtype, *size), layout=layout, variant=variant)
    # Packed and split may refuse many of these, and two passes none.
    assert taken["two_passes"] == len(sizes)
    assert taken["registers"] > len(CHANNELS)


@pytest.mark.parametrize("shifts", [(1, 1), (3, 3), (0, 1), (1, 0), (5, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_begin_off_16_bytes(dtype: str, shifts: tuple[int, int], kernel: CudaKernel) -> None:
    """A view into a larger tensor does. The emulation stops at an access that is not aligned, as a GPU does."""
    for layout, spatial, variant in product(LAYOUTS, (1, 5, 49, 1025), (None, *VARIANTS)):
        check(kernel, sized(dtype, 2, 8, spatial), layout=layout, variant=variant, shifts=shifts)


@pytest.mark.parametrize("grid", ["1", "3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_tiles_than_a_grid_may_have_blocks(
    layout: Layout, grid: str, emulated: CudaKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMULATED_MAX_GRID", grid)
    for spatial, variant in product((4, 300), VARIANTS):
        check(emulated, sized("float16", 4, 24, spatial), layout=layout, variant=variant)


# What runs on a device of 100 multiprocessors.
CHOICES = {
    "5x5": ((64, 512, 5, 5), "nchw", "packed"),
    "7x7": ((64, 512, 7, 7), "nchw", "registers"),
    "1x1, either layout": ((64, 2048, 1, 1), "nhwc", "packed"),
    "14x14": ((8, 256, 14, 14), "nchw", "registers"),
    "56x56": ((8, 64, 56, 56), "nchw", "registers"),
    "112x112, few": ((1, 3, 112, 112), "nchw", "registers"),
    "56x56 channels last": ((8, 64, 56, 56), "nhwc", "registers"),
    "7x7 channels last": ((8, 512, 7, 7), "nhwc", "registers"),
    "a plane that no block holds": ((2, 50, 111, 300), "nchw", "two_passes"),
    "few that no block holds": ((1, 3, 300, 300), "nchw", "split"),
    "112x112 channels last": ((1, 64, 112, 112), "nhwc", "split"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_variant_is_chosen_by_sizes_and_device(
    case: str, emulated: CudaKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of a choice is bit-exact the result of the variant when asked for; another differs."""
    shape, layout, expected = CHOICES[case]
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", "100")
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, dtype=np.float32)
    parameters = [rng.uniform(0.5, 1, shape[1]).astype(np.float32) for _ in range(4)]
    chosen = emulated(x, *parameters, layout=layout)
    asked = emulated(x, *parameters, layout=layout, variant=expected)
    assert asked is not None
    assert np.array_equal(chosen, asked)


def test_what_is_not_there_is_refused(emulated: CudaKernel) -> None:
    def code(block: int = 1, kind: int = 0, residual: int | None = None, variant: str | None = None) -> int:
        return emulated.call(Forward(1, 4, 9, block, kind, residual=residual), variant=variant)

    assert code(kind=9) == INVALID_VALUE
    assert code(block=2) == INVALID_VALUE, "a blocked layout"
    assert code(residual=64) == INVALID_VALUE
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
