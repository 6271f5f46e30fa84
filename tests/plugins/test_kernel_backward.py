"""The CPU kernel of the backward pass through its C interface, as test_kernel.py has the forward pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cases import CASES, NormCase
from frn_gradient import Gradients
from kernels import Kernel, ParallelFor, shuffled
from references import backward_inputs, check_backward, gradients_of, inputs_of
from tolerances import GRADIENT_SUMMED

from deploynorm.contract import DTYPES
from deploynorm.libraries import TORCH_LIBRARY, library_path
from deploynorm.libraries.kernels import Backward

BLOCKS = {"nchw": 1, "nhwc": 0, "blocks_of_8": 8, "blocks_of_5": 5}
"""Layout -> channel_block; 0 stands for all channels."""

# Where the code turns: what a vector, a block and a column hold, and what is shared out among the threads.
SHAPES = (
    *((2, 3, spatial) for spatial in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 49, 63, 65, 2047, 4096, 4097, 8193)),
    *((2, channels, 3) for channels in (1, 7, 8, 9, 15, 16, 17, 24, 63, 64, 65, 255, 256, 257, 513)),
    *((1, channels, 40, 40) for channels in (16, 63, 130)),
    (1, 2, 40_000),
    (1, 70, 1200),
)

all_layouts = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


@pytest.fixture(scope="session")
def kernel(require: Callable[[str], None]) -> Kernel:
    require("native")
    return Kernel(library_path(TORCH_LIBRARY))


def check(kernel: Kernel, case: NormCase, block: int, **how: object) -> Gradients:
    got = kernel.backward(*backward_inputs(case), block=block or case.shape[1], **how)  # type: ignore[arg-type]
    check_backward(got, case)
    return got


@all_layouts
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_in_every_layout_and_variant(case: NormCase, block: int, kernel: Kernel) -> None:
    for variant in (*kernel.variants, None):
        check(kernel, case, block, variant=variant)


@all_layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_every_turn(dtype: str, block: int, kernel: Kernel) -> None:
    for shape in SHAPES:
        for variant in kernel.variants:
            check(kernel, NormCase("sized", shape, dtype, eps="per_channel"), block, variant=variant)


@all_layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 6, 7, 9), (3, 33), (1, 2, 301, 301), (2, 70, 3, 3), (1, 3, 1, 4099)], ids=str)
def test_neither_threads_nor_writing_over_dy_nor_alignment_change_a_bit(
    shape: tuple[int, ...], dtype: str, block: int, kernel: Kernel
) -> None:
    case = NormCase("steady", shape, dtype)
    want = check(kernel, case, block)
    hosts = (ParallelFor(reversed), ParallelFor(shuffled), ParallelFor(threads=3))
    ways = [{"parallel_for": host} for host in hosts] + [
        {"in_place": True},
        {"shift": 1},
        {"shift": 3, "in_place": True},
    ]
    for way in ways:
        got = check(kernel, case, block, **way)
        for name, mine, other in zip(Gradients._fields, got, want, strict=True):
            assert mine.tobytes() == other.tobytes(), f"{name}, {way}"


@all_layouts
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_threshold_falls_where_the_forward_pass_had_it(dtype: str, block: int, kernel: Kernel) -> None:
    """Each channel's threshold is the y of one of its elements, as the same variant computes it: that one gets the
    gradient. All of dy is 1, so that the gradients by beta and tau are counts."""
    case = NormCase("ties", (1, 64, 49), dtype)
    x, gamma, beta, tau, eps = inputs_of(case).values()
    for variant in kernel.variants:
        rstd = np.empty((1, 64), gamma.dtype)
        y = kernel(x, gamma, beta, np.full_like(tau, -np.inf), eps, block=block or 64, variant=variant, rstd=rstd)[0]
        at = y[np.arange(64), np.random.default_rng(0).integers(0, 49, 64)]
        reached = (y >= at[:, None]).sum(axis=1)
        got = kernel.backward(np.ones_like(x), x, rstd, gamma, beta, at, block=block or 64, variant=variant)
        np.testing.assert_array_equal(got.dbeta, reached, err_msg=variant)
        np.testing.assert_array_equal(got.dtau, 49 - reached, err_msg=variant)


def test_without_channels_nothing_is_read_or_written(kernel: Kernel) -> None:
    for block in (1, 8):
        for variant in kernel.variants:
            assert kernel.call(Backward(2, 0, 3, block, 0), 0, variant=variant) == 0  # null pointers


def test_a_type_or_variant_that_is_not_there_is_refused(kernel: Kernel) -> None:
    assert kernel.call(Backward(type=99), 0) == 1
    assert kernel.call(Backward(type=0), 0, variant="avx1024") == 1


def test_a_wrong_gradient_would_be_seen(kernel: Kernel) -> None:
    """One unit of the last place more than the bound, in one element of one gradient."""
    case = NormCase("default", (2, 4, 5, 5))
    got = kernel.backward(*backward_inputs(case))
    _, size = gradients_of(case)
    for name in Gradients._fields:
        wrong = {n: g.copy() for n, g in got._asdict().items()}
        wrong[name].flat[1] += 3 * GRADIENT_SUMMED["float32"].rtol * getattr(size, name).flat[1]
        with pytest.raises(AssertionError, match=name):
            check_backward(Gradients(**wrong), case)
