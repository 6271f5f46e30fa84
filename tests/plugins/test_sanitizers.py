"""The kernel and the operator under the sanitizers of the compiler: no access outside a tensor, nothing undefined."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, tolerance
from graphs import frn_model
from kernels import Kernel
from references import inputs_of, want_of

from deploynorm.contract import DTYPES, INPUTS
from deploynorm.libraries import ORT_LIBRARY, TORCH_LIBRARY, find_tools

pytestmark = pytest.mark.slow  # a build with sanitizers takes minutes

TESTS = Path(__file__).parents[1]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def sanitized(require: Callable[[str], None], build_once: Callable[..., Path]) -> Path:
    """The libraries, built with sanitizers: the path of the operators', beside which the other lies."""
    require("compiler")
    return build_once("sanitized") / ORT_LIBRARY


@pytest.fixture(scope="session")
def run(require: Callable[[str], None]) -> Run:
    """run(*arguments): a Python with the sanitizers in it, started with these arguments."""
    require("compiler")
    compiler = str(find_tools().compiler)
    # The C++ runtime too, as what catches exceptions is to find it when the process begins.
    asks = [[compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    names = [subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() for ask in asks]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(names),
        # Python itself keeps memory until its end, and asks for more than there is.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300
        )

    return run


@pytest.fixture
def calls(run: Run, sanitized: Path) -> Run:
    """calls(*arguments): sanitized.py of the library with the operator, or of another beside it."""
    program = Path(__file__).with_name("sanitized.py")
    return lambda *arguments, library=ORT_LIBRARY: run(str(program), str(sanitized.with_name(library)), *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case_in_every_layout_is_clean(dtype: str, calls: Run, kernel: Kernel, tmp_path: Path) -> None:
    chosen = [case for case in CASES if case.dtype == dtype]
    content: dict[str, np.ndarray] = {"names": np.array([case.name for case in chosen])}
    for case in chosen:
        x, *parameters = (np.ascontiguousarray(array) for array in inputs_of(case).values())
        # NumPy cannot save bfloat16.
        stored = {"x": x.view(f"u{x.itemsize}"), **dict(zip(("gamma", "beta", "tau", "eps"), parameters, strict=True))}
        stored |= {"dtype": np.array(dtype), "want": want_of(case)}
        stored["tolerance"] = np.array([tolerance(case).rtol, tolerance(case).atol])
        content |= {f"{case.name}/{name}": array for name, array in stored.items()}
    np.savez(tmp_path / "cases.npz", **content)
    done = calls("cases", str(tmp_path / "cases.npz"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(chosen) * 5 * len(kernel.variants)} calls\n"


@pytest.mark.parametrize(
    ("what", "seed", "library"),
    [("fuzz", "0", ORT_LIBRARY), ("fuzz", "1", ORT_LIBRARY), ("gradients", "0", TORCH_LIBRARY)],
)
def test_calls_of_any_size_type_and_layout_are_clean(what: str, seed: str, library: str, calls: Run) -> None:
    done = calls(what, seed, "1000", library=library)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1000 calls\n"


OPERATOR = f"""
import sys
import numpy as np
import onnxruntime
library, *models = sys.argv[1:]
for model in models:
    for threads in (1, 2):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        dtype = {{"tensor(float)": "f4", "tensor(double)": "f8", "tensor(float16)": "f2"}}[session.get_inputs()[0].type]
        for shape in ((2, 4, 3, 5), (1, 4, 300, 301), (0, 4, 3, 3), (3, 4, 1, 1)):
            x = np.random.default_rng(0).normal(size=shape).astype(dtype)
            (y,) = session.run(None, {{"{INPUTS[0]}": x}})
            assert y.shape == shape and np.isfinite(y).all()
        try:
            session.run(None, {{"{INPUTS[0]}": x[:, :3]}})
        except Exception as error:
            assert "gamma" in str(error), error
        else:
            raise AssertionError("a wrong shape was taken")
print("clean")
"""


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_the_operator_in_onnx_runtime_is_clean(
    dtype: str, run: Run, sanitized: Path, require: Callable[[str], None], tmp_path: Path
) -> None:
    require("ort")
    path = tmp_path / "model.onnx"
    path.write_bytes(frn_model(dtype, shape=("N", "C", "H", "W")).SerializeToString())
    done = run("-c", OPERATOR, str(sanitized), str(path))
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr


@pytest.mark.parametrize(
    ("mistake", "finding"),
    [("past_the_end", "AddressSanitizer: heap-buffer-overflow"), ("misaligned", "runtime error: .*misaligned")],
)
def test_the_sanitizers_are_at_work(mistake: str, finding: str, calls: Run) -> None:
    """A mistake of the caller is found, so that one of the kernel's would be."""
    done = calls(mistake)
    assert done.returncode != 0
    assert re.search(finding, done.stderr), done.stderr
