"""The numbers of the TensorRT plugin, on the emulation and on a GPU where there is one; tests/plugins has all else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cases import ADD_CASES, CASES, NormCase
from emulated import HOSTS, build_plugin
from references import check_forward, inputs_of
from tensorrt_host import Host, check_every_format, formats_of

from deploynorm.libraries import TENSORRT_LIBRARY

DTYPES = ("float32", "float16", "bfloat16")
LARGEST = (4, 12, 31, 40)
SEQUENCE = [LARGEST, (1, 12, 1, 1), LARGEST, (2, 12, 7, 9), (0, 12, 7, 9), (3, 12, 0, 5), (1, 12, 31, 1)]


@pytest.fixture(scope="module")
def host(
    device: str,
    require: Callable[[str], None],
    request: pytest.FixtureRequest,
    build_once: Callable[..., Path],
) -> Host:
    require("trt-headers")
    if device == "gpu":
        found: Host = request.getfixturevalue("gpu_host")
        return found
    kernels = request.getfixturevalue("emulated_library")
    emulated = build_once("plugin", lambda folder: build_plugin(folder, kernels))
    return Host(emulated / HOSTS[0], emulated / TENSORRT_LIBRARY)


@pytest.mark.parametrize("case", [case for case in (*CASES, *ADD_CASES) if case.dtype in DTYPES], ids=str)
def test_every_case_in_every_format(case: NormCase, host: Host) -> None:
    check_every_format(host, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 9, 16, 67])
def test_channels_off_the_vector_of_a_format(channels: int, dtype: str, host: Host) -> None:
    check_every_format(host, NormCase(f"{channels}_channels", (2, channels, 5, 3), dtype))


@pytest.mark.parametrize("rank", [2, 6, 7, 8])
def test_every_rank_of_tensorrt(rank: int, host: Host) -> None:
    for dtype in DTYPES:
        check_every_format(host, NormCase(f"rank_{rank}", (2, 3, *range(2, rank)), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_engine_runs_every_shape_of_its_profile(dtype: str, host: Host) -> None:
    """What was seen while building, or at the last shape, is not what counts now."""
    for format in formats_of(dtype, 4):
        engine = host.build(dtype, format, (0, 12, 0, 1), LARGEST)
        with engine.context() as context, engine.context() as other:
            for index, shape in enumerate(SEQUENCE):
                case = NormCase(f"shape_{index}", shape, dtype, eps="per_channel")
                for each in (context, other):
                    check_forward(each.run(inputs_of(case)), case, f"{format.name}, {shape}")


def test_a_size_that_the_network_leaves_open_may_be_the_channels(host: Host) -> None:
    for format in formats_of("float16", 4):
        with host.build("float16", format, (1, 1, 3, 3), (2, 20, 9, 9)).context() as context:
            for channels in (20, 1, 8, 13):
                case = NormCase(f"{channels}_of_20", (2, channels, 5, 5), "float16")
                check_forward(context.run(inputs_of(case)), case, format.name)
