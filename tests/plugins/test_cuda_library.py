"""The libraries as nvcc builds them, on a machine without a GPU: what they hold, need and offer, and that the operator
library is as good on the CPU as the one that is built without CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import CHANNELS, frn_model, frn_parameters
from kernels import Kernel
from tolerances import OP_FLOAT16, OP_FLOAT32

from deploynorm import libraries, ort, reference
from deploynorm.contract import INPUTS
from deploynorm.doctor.elf import read_library

GPUS = {
    "Turing": (7, 5),
    "A100": (8, 0),
    "RTX 30": (8, 6),
    "RTX 40": (8, 9),
    "Hopper": (9, 0),
    "B200": (10, 0),
    "RTX 50": (12, 0),
    "DGX Spark": (12, 1),
    "Thor, whose generation has no code of its own": (11, 0),
    "a generation to come": (13, 0),
}
FORWARD = {"deploynorm_cpu_variants", "deploynorm_cuda_variants", "deploynorm_frn_cpu", "deploynorm_frn_cuda",
           "deploynorm_frn_cuda_workspace"}  # fmt: skip
BACKWARD = {"deploynorm_frn_backward_cpu", "deploynorm_frn_backward_cpu_workspace", "deploynorm_frn_backward_cuda",
            "deploynorm_frn_backward_cuda_workspace"}  # fmt: skip
OPENMP = {"deploynorm_openmp_parallel_for"}
EXPORTED = {
    libraries.ORT_LIBRARY: FORWARD | {"RegisterCustomOps"},
    libraries.TORCH_LIBRARY: FORWARD | BACKWARD | OPENMP,
    libraries.TENSORRT_LIBRARY: {"getCreators", "setLoggerFinder"},
    libraries.TENSORRT_REGISTER_LIBRARY: set(),
}
NEEDED = {"libc.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1"}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_library_offers_its_entry_points_and_nothing_else(name: str, cuda_libraries: Path) -> None:
    assert set(read_library(cuda_libraries / name).exports) == EXPORTED[name]


@pytest.mark.parametrize("name", EXPORTED)
def test_a_library_needs_nothing_of_cuda_or_tensorrt(name: str, cuda_libraries: Path) -> None:
    """No libcudart, libcuda or libnvinfer: they load on a machine without a GPU, and beside any version of those."""
    allowed = NEEDED | (
        {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1"} if name == libraries.TENSORRT_LIBRARY else set()
    )
    assert set(read_library(cuda_libraries / name).needed) <= allowed


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", [libraries.ORT_LIBRARY, libraries.TORCH_LIBRARY, libraries.TENSORRT_LIBRARY])
def test_there_is_code_for(gpu: str, name: str, cuda_libraries: Path) -> None:
    code = read_library(cuda_libraries / name).code
    assert any(each.runs_on(GPUS[gpu]) for each in code), ", ".join(each.name for each in code)


def test_the_cpu_kernel_is_in_it_and_right(cuda_libraries: Path) -> None:
    library = cuda_libraries / libraries.ORT_LIBRARY
    assert libraries.cuda_variants(library)
    kernel = Kernel(library)
    assert kernel.variants == libraries.cpu_variants(library)
    x = np.random.default_rng(0).standard_normal((2, CHANNELS, 9, 7), dtype=np.float32)
    parameters = list(frn_parameters().values())
    expected = reference.filter_response_norm(x.astype(np.float64), *(p.astype(np.float64) for p in parameters))
    np.testing.assert_allclose(kernel(x, *parameters), expected, **OP_FLOAT32.kwargs())


def test_onnxruntime_without_cuda_takes_it_and_runs_on_the_cpu(
    cuda_libraries: Path, require: Callable[[str], None]
) -> None:
    require("ort")
    onnxruntime: Any = ort.import_onnxruntime()
    options = ort.quiet_options()
    options.register_custom_ops_library(str(cuda_libraries / libraries.ORT_LIBRARY))
    x = np.random.default_rng(0).standard_normal((2, CHANNELS, 9, 7), dtype=np.float32)
    for dtype in ("float32", "float64", "float16"):
        session = onnxruntime.InferenceSession(frn_model(dtype).SerializeToString(), options)
        (y,) = session.run(None, {INPUTS[0]: x.astype(dtype)})
        parameters = [value.astype(np.float64) for value in frn_parameters().values()]
        expected = reference.filter_response_norm(x.astype(dtype).astype(np.float64), *parameters)
        np.testing.assert_allclose(y, expected, **(OP_FLOAT16 if dtype == "float16" else OP_FLOAT32).kwargs())
