"""The TensorRT plugin on a GPU, driven as TensorRT drives one, through the library as it is shipped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, NormCase, make_inputs, tolerance, want
from emulated import build_host
from tensorrt_host import Host, formats_of, run

from deploynorm import libraries

DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def host(architecture: str, require: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Host:
    """With a CUDA runtime of its own, as TensorRT has one."""
    require("trt-headers")
    folder = tmp_path_factory.mktemp("plugin")
    libraries.build(folder, cuda=True, architectures=[architecture])
    headers = Path(os.environ["TENSORRT_INCLUDE_DIR"])
    return Host(build_host(folder, headers, nvcc=libraries.find_cuda().nvcc), folder / libraries.TENSORRT_LIBRARY)


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype in DTYPES], ids=str)
def test_every_case_in_every_format(case: NormCase, host: Host) -> None:
    for format in formats_of(case.dtype, len(case.shape)):
        y = run(host, case, format)
        np.testing.assert_allclose(y.astype(np.float64), want(case), **tolerance(case).kwargs(), err_msg=format.name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_engine_runs_every_shape_of_its_profile(dtype: str, host: Host) -> None:
    largest = (4, 12, 31, 40)
    for format in formats_of(dtype, 4):
        with host.build(dtype, format, (0, 12, 0, 1), largest).context() as context:
            for shape in (largest, (1, 12, 1, 1), largest, (2, 12, 7, 9), (0, 12, 7, 9), (3, 12, 0, 5)):
                case = NormCase("shape_" + "x".join(map(str, shape)), shape, dtype)
                got = context.run(make_inputs(case)).astype(np.float64)
                np.testing.assert_allclose(got, want(case), **tolerance(case).kwargs(), err_msg=format.name)
