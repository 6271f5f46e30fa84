"""The CPU kernels through their C interface: every case, type, layout and variant of both passes, and no framework."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import CASES, NUMPY_DTYPES, NormCase, make_rstd, tolerance
from frn_gradient import Gradients
from kernels import Array, Guarded, Into, Kernel, ParallelFor, shuffled
from references import backward_inputs, check_backward, check_forward, gradients_of, inputs_of
from tolerances import GRADIENT_SUMMED, PLANE_FLOAT32, PLANE_OF_ONE_VALUE_FLOAT32, RSTD

from deploynorm.contract import DTYPES
from deploynorm.libraries import TORCH_LIBRARY, library_path
from deploynorm.libraries.kernels import TYPES, Backward, Forward
from deploynorm.reference import filter_response_norm

BLOCKS = {"nchw": 1, "nhwc": 0, "blocks_of_8": 8, "blocks_of_16": 16, "blocks_of_5": 5, "blocks_of_3": 3}
"""Layout -> channel_block; 0 stands for all channels."""

HALVES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

all_layouts = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
all_types = pytest.mark.parametrize("dtype", DTYPES)
half_types = pytest.mark.parametrize("dtype", HALVES)


def a_call(shape: tuple[int, ...], dtype: str, seed: int = 0) -> list[Array]:
    """x and the four parameters; a third of the channels has no threshold."""
    rng = np.random.default_rng(seed)
    channels = shape[1]
    wide = np.float64 if dtype == "float64" else np.float32
    tau = np.where(np.arange(channels) % 3 == 1, -np.inf, rng.normal(0, 0.5, channels))
    parameters = (rng.normal(1, 0.5, channels), rng.normal(0, 0.5, channels), tau, 10 ** rng.uniform(-6, -1, channels))
    return [rng.standard_normal(shape).astype(NUMPY_DTYPES[dtype]), *(p.astype(wide) for p in parameters)]


def in_float64(x: Array, gamma: Array, beta: Array, tau: Array, eps: Array, residual: Array | None = None) -> Array:
    """The kernel's definition: the operator's, with what is added before the threshold."""
    none = np.full(len(tau), -np.inf)
    y = filter_response_norm(*(np.asarray(a, np.float64) for a in (x, gamma, beta, none, eps)))
    if residual is not None:
        y = y + residual.astype(np.float64)
    t = tau.astype(np.float64).reshape(1, -1, *(1,) * (x.ndim - 2))
    return np.where(y < t, t, y)


def assert_near(got: Array, wanted: Array, dtype: str, message: str) -> None:
    bound = tolerance(NormCase("", got.shape, dtype))
    np.testing.assert_allclose(got.astype(np.float64), wanted, **bound.kwargs(), err_msg=message)


def bits(array: Array) -> Array:
    return array.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.itemsize])


def test_the_variants_are_those_that_the_processor_has(kernel: Kernel) -> None:
    assert kernel.variants[-1] == "baseline"
    information = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and information.is_file():
        flags = set(information.read_text().split())
        has = {
            "avx512": {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= flags,
            "avx2": {"avx2", "fma"} <= flags,
            "baseline": True,
        }
        assert kernel.variants == [name for name, there in has.items() if there]


@all_layouts
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_in_every_layout_and_variant(case: NormCase, block: int, kernel: Kernel) -> None:
    """Of y, and of what the backward pass needs where it is asked for."""
    inputs, right = inputs_of(case).values(), make_rstd(case)
    for variant in (*kernel.variants, None):
        rstd = None if variant is None else np.empty_like(right)
        got = kernel(*inputs, block=block or case.shape[1], variant=variant, rstd=rstd)
        check_forward(got, case, f"variant {variant}")
        if rstd is not None and got.size:
            np.testing.assert_allclose(rstd, right, **RSTD[right.dtype.name].kwargs(), err_msg=variant)


@all_layouts
@all_types
@pytest.mark.parametrize("shape", [(2, 6, 7, 9), (3, 33), (1, 2, 301, 301), (2, 70, 3, 3)], ids=str)
def test_a_residual_is_added_before_the_threshold(
    shape: tuple[int, ...], dtype: str, block: int, kernel: Kernel
) -> None:
    call = a_call(shape, dtype)
    residual = np.random.default_rng(1).normal(0, 2, shape).astype(call[0].dtype)
    wanted = in_float64(*call, residual)
    for variant in kernel.variants:
        got = kernel(*call, residual=residual, block=block or shape[1], variant=variant)
        assert_near(got, wanted, dtype, variant)


@all_layouts
@all_types
@pytest.mark.parametrize("into", ["x", "residual"])
@pytest.mark.parametrize("shape", [(2, 6, 7, 9), (3, 33), (1, 2, 301, 301), (2, 70, 3, 3), (1, 3, 1, 4099)], ids=str)
def test_writing_over_an_input_changes_no_bit(
    shape: tuple[int, ...], into: Into, dtype: str, block: int, kernel: Kernel
) -> None:
    call = a_call(shape, dtype)
    residuals: list[Array | None] = [np.random.default_rng(1).normal(0, 2, shape).astype(call[0].dtype)]
    if into == "x":
        residuals.append(None)
    for residual in residuals:
        for variant in kernel.variants:
            options: dict[str, Any] = {"residual": residual, "block": block or shape[1], "variant": variant}
            wanted, got = kernel(*call, **options), kernel(*call, **options, into=into)
            np.testing.assert_array_equal(bits(got), bits(wanted), err_msg=variant)


@all_layouts
@all_types
def test_a_nan_stays_a_nan_and_a_nan_of_tau_is_no_threshold(dtype: str, block: int, kernel: Kernel) -> None:
    """The comparison is v < tau ? tau : v: false for a NaN on either side."""
    for positions in (1, 3, 8, 9, 40):
        x, gamma, beta, tau, eps = a_call((2, 9, positions), dtype)
        x[0, 2, 0] = np.nan
        x[1, 4, -1] = np.inf
        beta[5] = np.nan
        tau[:] = 0.25
        tau[6] = np.nan
        wanted = in_float64(x, gamma, beta, tau, eps)
        # What the definition says of each, so that it is not the reference alone that says so.
        assert np.isnan(wanted[0, 2]).all()
        assert not np.isnan(wanted[1, 2]).any()
        assert np.isnan(wanted[1, 4, -1])
        assert (wanted[1, 4, :-1] == max(np.float64(beta[4]), 0.25)).all()
        assert np.isnan(wanted[:, 5]).all()
        assert (wanted[:, 6] < 0.25).any()
        for variant in kernel.variants:
            got = kernel(x, gamma, beta, tau, eps, block=block or 9, variant=variant)
            assert_near(got, wanted, dtype, f"{variant}, {positions} positions")


@all_types
def test_nothing_is_read_or_written_for_a_size_of_0(dtype: str, kernel: Kernel) -> None:
    kind = TYPES[dtype]
    for sizes in ((0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)):
        for block in (1, 4, 16):
            for variant in kernel.variants:
                for threads in (None, ParallelFor(threads=2)):
                    # Null pointers: any access ends the process.
                    assert kernel.call(Forward(*sizes, block, kind), variant=variant, parallel_for=threads) == 0


def test_an_unknown_type_or_variant_is_refused_and_y_left_alone(kernel: Kernel) -> None:
    x, *parameters = (Guarded(array) for array in a_call((2, 3, 5), "float32"))
    y = Guarded(np.full((2, 3, 5), -7, np.float32))
    pointers = (x.pointer, y.pointer, None, *(p.pointer for p in parameters))
    refused: list[tuple[int, str | None]] = [(kind, None) for kind in (-1, 4, 10, 2**31 - 1)]
    refused += [(kind, variant) for kind in (-1, 4) for variant in kernel.variants]
    refused += [(0, variant) for variant in ("", "avx", "avx512 ", "AVX2", "baseline\n", "sse2")]
    for kind, variant in refused:
        assert kernel.call(Forward(2, 3, 5, 1, kind, *pointers), variant=variant) == 1, (kind, variant)
        y.check(f"y of type {kind} and variant {variant}", written=False)
    assert kernel.call(Forward(2, 3, 5, 1, 0, *pointers)) == 0
    with pytest.raises(AssertionError, match=r"byte \d of it was written"):
        y.check("y", written=False)


# ---- 16-bit types. With x = 0 the result is beta + residual, so that every value can be had and nothing is rounded
# but by the store.


def converted(
    kernel: Kernel, values: Array, dtype: str, variant: str, spread: Literal["channels", "lanes", "positions"]
) -> Array:
    """The float32 values as the kernel stores them, by the code for channels side by side or for planes."""
    channels = {"channels": len(values), "lanes": 16, "positions": 16}[spread]
    beta = np.resize(values, (-(-len(values) // channels), channels))
    got = []
    for row in beta if spread != "channels" else [values]:
        x = np.zeros((1, len(row), 1 if spread == "channels" else 11), HALVES[dtype])
        none = np.full(len(row), -np.inf, np.float32)
        ones = np.ones(len(row), np.float32)
        y = kernel(x, ones, row, none, ones, block=len(row) if spread == "lanes" else 1, variant=variant)
        assert (bits(y) == bits(y)[:, :, :1]).all()  # vectors and what is left of them alike
        got.append(y[0, :, 0])
    return np.concatenate(got)[: len(values)]


def assert_same_half(got: Array, wanted: Array, message: str) -> None:
    """Bit for bit, but any NaN stands for any other."""
    nan = np.isnan(wanted.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan, err_msg=message)
    np.testing.assert_array_equal(bits(got)[~nan], bits(wanted)[~nan], err_msg=message)


@pytest.fixture(params=[False, True], ids=["", "subnormals_flushed"])
def flush(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the host has the processor take float32 subnormals for zeros, as ONNX Runtime's users can ask it to."""
    if request.param and not torch.set_flush_denormal(True):
        pytest.fail("this processor cannot flush subnormals")
    yield bool(request.param)
    torch.set_flush_denormal(False)


@half_types
def test_every_half_is_read_and_written_unchanged(dtype: str, flush: bool, kernel: Kernel) -> None:
    every = np.arange(65536, dtype=np.uint16).view(HALVES[dtype])
    if flush and dtype == "bfloat16":  # its subnormals are float32's
        every = every[(bits(every) & 0x7F80 != 0) | (bits(every) & 0x7FFF == 0)]
    zeros, none, one = (np.full(1, v, np.float32) for v in (-0.0, -np.inf, 1))
    for variant in kernel.variants:
        for block in (1, 8, 16, 5):
            for positions in (1, 3, 4096):
                # As the residual of x = -0: that may be a NaN or an infinity. A vector's worth of it, or less.
                count = len(every) // positions * positions
                residual = every[:count].reshape(count // positions, 1, positions)
                residual = np.repeat(residual, block, axis=1)
                x = np.full_like(residual, -0.0)
                parameters = (np.repeat(p, block) for p in (one, zeros, none, one))
                got = kernel(x, *parameters, residual=residual, block=block, variant=variant)
                assert_same_half(got, residual, f"{variant}, blocks of {block}, {positions} positions")


@half_types
def test_every_half_is_read_right_as_x(dtype: str, kernel: Kernel) -> None:
    every = np.arange(65536, dtype=np.uint16).view(HALVES[dtype])
    # The square has to be lost beside eps, for the scale to be exactly 1.
    every = every[(bits(every) & 0x7FFF) <= bits(np.array(2.0**15, every.dtype))]
    big, root, zero, none = (np.full(len(every), v, np.float32) for v in (2.0**100, 2.0**50, -0.0, -np.inf))
    for variant in kernel.variants:
        for positions in (1, 7, 16):
            x = np.repeat(every[None, :, None], positions, axis=2)
            for block in (1, len(every)):
                got = kernel(x, root, zero, none, big, block=block, variant=variant)
                assert_same_half(got, x, f"{variant}, {positions} positions, blocks of {block}")


@half_types
@pytest.mark.parametrize("spread", ["channels", "lanes", "positions"])
def test_the_store_rounds_to_nearest_and_ties_to_even(
    dtype: str, spread: Literal["channels", "lanes", "positions"], flush: bool, kernel: Kernel
) -> None:
    half = HALVES[dtype]
    step = 1 if spread == "channels" else 61  # the one way sees them all, the others enough to see another code
    with np.errstate(all="ignore"):
        each = np.arange(0, 65536, step, dtype=np.uint16).view(half).astype(np.float32)
        following = (np.arange(0, 65536, step, dtype=np.uint16) + np.uint16(1)).view(half).astype(np.float32)
        middle = ((each.astype(np.float64) + following) / 2).astype(np.float32)  # exact: one more bit
        largest = np.float32(np.finfo(np.float16).max if dtype == "float16" else ml_dtypes.finfo(half).max)
        edge = largest + np.float32(2.0 ** (np.floor(np.log2(largest)) - (11 if dtype == "float16" else 8)))
        random = np.random.default_rng(0).integers(0, 2**32, 200_000 // step, dtype=np.uint32).view(np.float32)
        exact = np.concatenate([each, middle, [edge, -edge]]).astype(np.float32)
        around = [np.nextafter(exact, np.float32(towards)) for towards in (-np.inf, np.inf)]
        nans = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7FBFFFFF], np.uint32).view(np.float32)
        values = np.concatenate([exact, *around, random, nans])
        # By their bits, as the processor may take subnormals for zeros now.
        if flush:
            values = values[(bits(values) & 0x7F800000 != 0) | (bits(values) << 1 == 0)]
        values = values[bits(values) != 0x80000000]  # 0 * 1 + -0 is 0
        wanted = values.astype(half)
    assert np.isinf(wanted.astype(np.float32)).any()
    for variant in kernel.variants:
        assert_same_half(converted(kernel, values, dtype, variant, spread), wanted, variant)


@half_types
def test_a_16_bit_result_is_the_float32_result_rounded_once(dtype: str, kernel: Kernel) -> None:
    for shape in ((2, 5, 9, 9), (3, 40)):
        x, *parameters = a_call(shape, dtype)
        for variant in kernel.variants:
            wide = kernel(x.astype(np.float32), *parameters, variant=variant)
            got = kernel(x, *parameters, variant=variant)
            np.testing.assert_array_equal(bits(got), bits(wide.astype(HALVES[dtype])), err_msg=variant)


# ---- Sizes


def a_plane(shape: tuple[int, ...]) -> list[Array]:
    """x of one sign and size, whose sum of squares a float32 would lose; the error of y is that of the mean."""
    x = np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32)
    channels = shape[1]
    return [x, *(np.full(channels, v, np.float32) for v in (1, 0, -np.inf, 1e-6))]


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((1, 2, 512, 512), 1),
        ((1, 2, 512, 512), 2),
        ((1, 16, 512, 512), 16),
        ((20, 1, 512, 512), 1),
        ((1, 1, 4096, 4096), 1),
    ],
    ids=str,
)
def test_a_large_plane_loses_nothing_in_its_sum(shape: tuple[int, ...], block: int, kernel: Kernel) -> None:
    call = a_plane(shape)
    x = call[0].astype(np.float64)
    wanted = x / np.sqrt((x * x).mean(axis=(2, 3), keepdims=True) + 1e-6)
    for variant in kernel.variants:
        got = kernel(*call, block=block, variant=variant)
        np.testing.assert_allclose(got, wanted, **PLANE_FLOAT32.kwargs(), err_msg=variant)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((1, 16, 16384), 1), ((16, 16, 16384), 1), ((1, 16, 65536), 16), ((16, 16, 16384), 16), ((16, 64, 9000), 64)],
    ids=str,
)
def test_a_plane_of_one_value_loses_little(shape: tuple[int, ...], block: int, kernel: Kernel) -> None:
    """The hardest of planes: what each addition rounds off has the same sign, and so is never made up for."""
    _, *parameters = a_plane(shape)
    value = np.random.default_rng(1).uniform(1, 2, (1, shape[1], 1)).astype(np.float32)
    wanted = value / np.sqrt(value.astype(np.float64) ** 2 + 1e-6)
    for variant in kernel.variants:
        got = kernel(np.broadcast_to(value, shape), *parameters, block=block, variant=variant)
        wanted = np.broadcast_to(wanted, shape)
        np.testing.assert_allclose(got, wanted, **PLANE_OF_ONE_VALUE_FLOAT32.kwargs(), err_msg=variant)


@all_types
@pytest.mark.parametrize("spread", ["positions", "lanes", "channels"])
def test_every_size_up_to_200(spread: str, dtype: str, kernel: Kernel) -> None:
    for size in range(1, 201):
        ways = {"positions": ((1, 2, size), 1), "lanes": ((1, size, 3), size), "channels": ((1, size), 1)}
        shape, block = ways[spread]
        call = a_call(shape, dtype, seed=size)
        residual = np.random.default_rng(size).normal(0, 2, shape).astype(call[0].dtype) if size % 2 else None
        wanted = in_float64(*call, residual)
        for variant in kernel.variants:
            got = kernel(*call, residual=residual, block=block, variant=variant)
            assert_near(got, wanted, dtype, f"{variant}, size {size}")


AROUND = [size + off for size in (4096, 8192, 16384, 32768, 65536) for off in (-1, 1)] + [10_007, 99_991]


@all_types
@pytest.mark.parametrize("size", AROUND)
def test_sizes_beside_those_at_which_the_kernel_works_otherwise(size: int, dtype: str, kernel: Kernel) -> None:
    for shape, block in (((1, 3, size), 1), ((1, 5, size // 5), 5), ((17, 1, size // 2), 1), ((1, size), 1)):
        call = a_call(shape, dtype)
        wanted = in_float64(*call)
        for variant in kernel.variants:
            assert_near(kernel(*call, block=block, variant=variant), wanted, dtype, f"{variant}, {shape}")


@all_layouts
@all_types
@pytest.mark.parametrize("shift", [1, 3])
def test_tensors_need_no_more_alignment_than_their_elements(shift: int, dtype: str, block: int, kernel: Kernel) -> None:
    for shape in ((2, 6, 5, 7), (3, 70), (1, 2, 200, 201)):
        call = a_call(shape, dtype)
        for variant in kernel.variants:
            options: dict[str, Any] = {"block": block or shape[1], "variant": variant}
            wanted, got = kernel(*call, **options), kernel(*call, **options, shift=shift)
            np.testing.assert_array_equal(bits(got), bits(wanted), err_msg=variant)


# ---- Threads

HOSTS: dict[str, Callable[[], ParallelFor]] = {
    "one after the other": ParallelFor,
    "reversed": lambda: ParallelFor(reversed),
    "shuffled": lambda: ParallelFor(shuffled),
    **{f"{number} threads": lambda number=number: ParallelFor(threads=number) for number in (1, 2, 3, 8)},
}

SHARED: dict[str, tuple[tuple[int, ...], int]] = {
    "many planes": ((8, 16, 40, 41), 1),
    "many small planes": ((4, 300, 7, 7), 1),
    "one plane": ((1, 1, 700, 701), 1),
    "fewer planes than threads": ((1, 3, 300, 301), 1),
    "few planes of two samples": ((2, 3, 300, 301), 1),
    "few lanes": ((1, 3, 300, 301), 3),
    "few blocks": ((1, 32, 150, 151), 16),
    "many lanes": ((2, 200, 30, 31), 200),
    "many channels and one position": ((8, 40_000), 1),
    "most segments": ((1, 1, 1600, 1601), 1),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("shape", "block"), SHARED.values(), ids=SHARED)
def test_the_host_s_threads_change_no_bit(shape: tuple[int, ...], block: int, dtype: str, kernel: Kernel) -> None:
    call = a_call(shape, dtype)
    residual = np.random.default_rng(1).normal(0, 2, shape).astype(call[0].dtype)
    variants = kernel.variants if call[0].size < 1_000_000 else kernel.variants[:1]
    for variant in variants:
        options: dict[str, Any] = {"block": block, "variant": variant, "residual": residual}
        wanted = kernel(*call, **options)
        assert_near(wanted, in_float64(*call, residual), dtype, variant)
        for name, make in HOSTS.items():
            host = make()
            into: Into = "x" if name.endswith("threads") else "y"  # the harder: x is gone once it is written over
            got = kernel(*call, **options, into=into, parallel_for=host)
            np.testing.assert_array_equal(bits(got), bits(wanted), err_msg=f"{variant}, {name}")
            assert host.counts, "the work was not shared out at all"
            assert min(host.counts) > 1


def test_a_small_call_is_not_worth_a_thread(kernel: Kernel) -> None:
    host = ParallelFor()
    kernel(*a_call((1, 64, 7, 7), "float32"), parallel_for=host)
    assert host.counts == []


def test_calls_from_several_threads_at_once_do_not_meet(kernel: Kernel) -> None:
    calls = [a_call((1, 3, 100 + size, 101), "float32", seed=size) for size in range(8)]
    wanted = [kernel(*call) for call in calls]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(25):
            for got, expected in zip(pool.map(lambda call: kernel(*call), calls), wanted, strict=True):
                np.testing.assert_array_equal(bits(got), bits(expected))


# ---- The backward pass

BACKWARD_BLOCKS = {name: BLOCKS[name] for name in ("nchw", "nhwc", "blocks_of_8", "blocks_of_5")}

backward_layouts = pytest.mark.parametrize("block", BACKWARD_BLOCKS.values(), ids=BACKWARD_BLOCKS)

# Where the code turns: what a vector, a block and a column hold, and what is shared out among the threads.
SHAPES = (
    *((2, 3, spatial) for spatial in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 49, 63, 65, 2047, 4096, 4097, 8193)),
    *((2, channels, 3) for channels in (1, 7, 8, 9, 15, 16, 17, 24, 63, 64, 65, 255, 256, 257, 513)),
    *((1, channels, 40, 40) for channels in (16, 63, 130)),
    (1, 2, 40_000),
    (1, 70, 1200),
)


@pytest.fixture(scope="session")
def training(require: Callable[[str], None], foreign: Kernel | None) -> Kernel:
    require("native")
    return foreign or Kernel(library_path(TORCH_LIBRARY))


def check_gradients(training: Kernel, case: NormCase, block: int, **how: object) -> Gradients:
    got = training.backward(*backward_inputs(case), block=block or case.shape[1], **how)  # type: ignore[arg-type]
    check_backward(got, case)
    return got


@backward_layouts
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_every_case_in_every_layout_and_variant(case: NormCase, block: int, training: Kernel) -> None:
    for variant in (*training.variants, None):
        check_gradients(training, case, block, variant=variant)


@backward_layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_sizes_around_every_turn(dtype: str, block: int, training: Kernel) -> None:
    for shape in SHAPES:
        for variant in training.variants:
            check_gradients(training, NormCase("sized", shape, dtype, eps="per_channel"), block, variant=variant)


@backward_layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 6, 7, 9), (3, 33), (1, 2, 301, 301), (2, 70, 3, 3), (1, 3, 1, 4099)], ids=str)
def test_neither_threads_nor_writing_over_dy_nor_alignment_change_a_bit(
    shape: tuple[int, ...], dtype: str, block: int, training: Kernel
) -> None:
    case = NormCase("steady", shape, dtype)
    want = check_gradients(training, case, block)
    hosts = (ParallelFor(reversed), ParallelFor(shuffled), ParallelFor(threads=3))
    ways = [{"parallel_for": host} for host in hosts] + [
        {"in_place": True},
        {"shift": 1},
        {"shift": 3, "in_place": True},
    ]
    for way in ways:
        got = check_gradients(training, case, block, **way)
        for name, mine, other in zip(Gradients._fields, got, want, strict=True):
            assert mine.tobytes() == other.tobytes(), f"{name}, {way}"


@backward_layouts
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_threshold_falls_where_the_forward_pass_had_it(dtype: str, block: int, training: Kernel) -> None:
    """Each channel's threshold is the y of one of its elements, as the same variant computes it: that one gets the
    gradient. All of dy is 1, so that the gradients by beta and tau are counts."""
    case = NormCase("ties", (1, 64, 49), dtype)
    x, gamma, beta, tau, eps = inputs_of(case).values()
    for variant in training.variants:
        rstd = np.empty((1, 64), gamma.dtype)
        y = training(x, gamma, beta, np.full_like(tau, -np.inf), eps, block=block or 64, variant=variant, rstd=rstd)[0]
        at = y[np.arange(64), np.random.default_rng(0).integers(0, 49, 64)]
        reached = (y >= at[:, None]).sum(axis=1)
        got = training.backward(np.ones_like(x), x, rstd, gamma, beta, at, block=block or 64, variant=variant)
        np.testing.assert_array_equal(got.dbeta, reached, err_msg=variant)
        np.testing.assert_array_equal(got.dtau, 49 - reached, err_msg=variant)


def test_without_channels_nothing_is_read_or_written(training: Kernel) -> None:
    for block in (1, 8):
        for variant in training.variants:
            assert training.call(Backward(2, 0, 3, block, 0), 0, variant=variant) == 0  # null pointers


def test_an_unknown_type_or_variant_of_the_backward_pass_is_refused(training: Kernel) -> None:
    assert training.call(Backward(type=99), 0) == 1
    assert training.call(Backward(type=0), 0, variant="avx1024") == 1


def test_a_wrong_gradient_would_be_seen(training: Kernel) -> None:
    """One unit of the last place more than the bound, in one element of one gradient."""
    case = NormCase("default", (2, 4, 5, 5))
    got = training.backward(*backward_inputs(case))
    _, size = gradients_of(case)
    for name in Gradients._fields:
        wrong = {n: g.copy() for n, g in got._asdict().items()}
        wrong[name].flat[1] += 3 * GRADIENT_SUMMED["float32"].rtol * getattr(size, name).flat[1]
        with pytest.raises(AssertionError, match=name):
            check_backward(Gradients(**wrong), case)
