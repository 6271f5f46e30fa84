"""The CUDA kernels of the backward pass in the emulation, as test_cuda_kernel.py has those of the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

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
    BackwardCall,
    CudaKernel,
    Layout,
    check_backward,
    check_ties,
    make_dy,
    make_rstd,
    sized,
    variants_to_check,
)
from emulated import build_broken_kernels, find_faults
from frn_gradient import Gradients, gradients
from tolerances import FLOAT64

from deploynorm.contract import DTYPES


@pytest.mark.parametrize("layout", BACKWARD_LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case: NormCase, layout: Layout, emulated: CudaKernel) -> None:
    check_backward(emulated, case, variants_to_check(case), layout=layout)
    assert check_backward(emulated, case, layout=layout, in_place=True) == 1


@pytest.mark.parametrize("layout", BACKWARD_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_every_turn(dtype: str, layout: Layout, emulated: CudaKernel) -> None:
    sizes = [(2, 3, spatial) for spatial in SPATIAL] + [(1, channels, 5) for channels in CHANNELS]
    taken = dict.fromkeys(VARIANTS, 0)
    for size, variant in product(sizes, VARIANTS):
        taken[variant] += check_backward(emulated, sized(dtype, *size), [variant], layout=layout)
    # Packed and split may refuse many of these, and two passes none; strips are held in whole packs alone.
    assert taken["two_passes"] == len(sizes)
    assert taken["registers"] >= (len(CHANNELS) if layout == "nchw" else 3)


@pytest.mark.parametrize("samples", [3, 4, 5, 127, 129, 700])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_over_the_samples(dtype: str, samples: int, emulated: CudaKernel) -> None:
    for channels in (1, 8, 17):
        assert check_backward(emulated, sized(dtype, samples, channels, 2)) == 1


@pytest.mark.parametrize("shifts", [(1, 1, 1), (3, 3, 3), (1, 0, 0), (0, 1, 0), (0, 0, 1), (5, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_begin_off_16_bytes(dtype: str, shifts: tuple[int, int, int], emulated: CudaKernel) -> None:
    """A view into a larger tensor does. The emulation stops at an access that is not aligned, as a device does."""
    for layout, spatial in product(BACKWARD_LAYOUTS, (1, 5, 49, 1025)):
        assert check_backward(emulated, sized(dtype, 2, 8, spatial), (None, *VARIANTS), layout=layout, shifts=shifts)


@pytest.mark.parametrize("layout", BACKWARD_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_its_threshold_an_element_is_where_the_forward_pass_had_it(
    dtype: str, layout: Layout, emulated: CudaKernel
) -> None:
    check_ties(emulated, dtype, (None, *VARIANTS), layout=layout)


def run(kernel: CudaKernel, case: NormCase, layout: Layout, variant: str | None = None) -> Gradients | None:
    x, gamma, beta, tau, _eps = make_inputs(case).values()
    return kernel.backward(make_dy(case), x, make_rstd(case), gamma, beta, tau, layout=layout, variant=variant)


def same(a: Gradients | None, b: Gradients | None) -> bool:
    """To the bit."""
    assert a is not None
    assert b is not None
    return all(np.array_equal(mine.view(np.uint8), other.view(np.uint8)) for mine, other in zip(a, b, strict=True))


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
    "112x112 channels last": ((1, 80, 12544), "nhwc", "split"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_variant_is_chosen_by_sizes_and_device(
    name: str, emulated: CudaKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of a choice is the same, to the bit, as that of the variant when asked for. Packed and split add in an
    order of their own, and differ; registers and two passes add in the same."""
    shape, layout, expected = CHOICES[name]
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", "10")
    case = NormCase(name, shape)
    chosen = run(emulated, case, layout)
    others = {variant: run(emulated, case, layout, variant) for variant in VARIANTS}
    alike = {variant for variant, other in others.items() if other and same(chosen, other)}
    assert expected in alike
    assert shape[2] == 1 or alike <= {expected, "registers", "two_passes"}


def test_the_same_call_gives_the_same_bits(emulated: CudaKernel) -> None:
    case = sized("bfloat16", 8, 24, 49)
    for layout, variant in product(BACKWARD_LAYOUTS, (None, "two_passes", "split")):
        assert same(run(emulated, case, layout, variant), run(emulated, case, layout, variant))


def test_what_is_not_there_is_refused(emulated: CudaKernel) -> None:
    def code(lanes: int = 1, kind: int = 0, variant: str | None = None, workspace: int | None = 256) -> int:
        return emulated.call(BackwardCall(1, 4, 9, lanes, kind), variant=variant, workspace=workspace)

    assert code(kind=9) == INVALID_VALUE
    assert code(lanes=2) == INVALID_VALUE, "a blocked layout"
    assert code(lanes=8) == INVALID_VALUE, "rows with padding"
    assert code(variant="fast") == INVALID_VALUE
    assert code(workspace=None) == INVALID_VALUE
    assert emulated.workspace_bytes(BackwardCall(1, 4, 9, 1, 9)) == 0


def test_without_channels_there_is_nothing_to_write(emulated: CudaKernel) -> None:
    for sizes in ((2, 0, 9, 1), (2, 0, 9, 0), (0, 0, 0, 0)):
        assert emulated.call(BackwardCall(*sizes, 0)) == 0


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


BROKEN = {
    "a barrier is missing": ("    });\n    __syncthreads();\n#pragma unroll", "    });\n#pragma unroll"),
    "the edge of a plane is forgotten": ("if constexpr (!W::kStrip) gradient.add(edge_dy, edge_x);", ""),
    "the threshold is forgotten on the second reading": ("    gradient.bound(dy, x);\n", ""),
    "a tie goes to tau": ("< tau[sum]", "<= tau[sum]"),
    "y is rounded twice": ("return normalised(x, scale[sum], beta[sum]) <", "return scale[sum] * x + beta[sum] <"),
    "the mean is over a position too many": ("(product / static_cast<A>(spatial))",
                                             "(product / static_cast<A>(spatial + 1))"),
    "a chunk is left out": ("if (lane < walk.lanes) gradient", "if (lane < walk.lanes && chunk > 0) gradient"),
    "a sample is left out": ("int64_t sample = row;", "int64_t sample = row + 1;"),
    "what is packed is not masked": ("if (bounded) narrow(A(0), &dy[i]);", ""),
}  # fmt: skip

_CHECK = """
from math import prod
from cases import CASES
from cuda_kernels import BACKWARD_LAYOUTS, VARIANTS, CudaKernel, check_backward, check_ties, sized

def check(library):
    kernel = CudaKernel(library, "cpu")
    for layout in BACKWARD_LAYOUTS:
        check_ties(kernel, "float16", VARIANTS, layout=layout)
        for case in (sized("float16", 1, 2, 5000), *CASES):
            if case.dtype == "float16" and prod(case.shape) < 10**5:
                check_backward(kernel, case, VARIANTS, layout=layout)
"""


@pytest.fixture(scope="module")
def found(
    emulated_library: Path, require: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, bool]:
    """In which of BROKEN something is found, and in the kernels as they are: "none"."""
    require("compiler")
    folder = tmp_path_factory.mktemp("broken")
    libraries = {
        fault: build_broken_kernels(folder / str(number), "frn_backward.cu", *change)
        for number, (fault, change) in enumerate(BROKEN.items())
    } | {"none": emulated_library}
    return dict(zip(libraries, find_faults(list(libraries.values()), _CHECK), strict=True))


@pytest.mark.parametrize("fault", BROKEN)
def test_the_emulation_finds(fault: str, found: Mapping[str, bool]) -> None:
    """A check of the check: each of these faults in the source has to be seen."""
    assert found[fault]


def test_without_a_fault_nothing_is_found(found: Mapping[str, bool]) -> None:
    assert not found["none"]
