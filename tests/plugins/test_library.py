"""The libraries, as built without CUDA and by nvcc: what they and their sources need, what they give to a machine, and
that those of nvcc are as good where there is no GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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
from deploynorm.libraries import (
    ORT_LIBRARY,
    TENSORRT_LIBRARY,
    TENSORRT_REGISTER_LIBRARY,
    TORCH_LIBRARY,
    find_tools,
    library_path,
)
from deploynorm.libraries.elf import CudaCode, read_library

SOURCES = Path(__file__).parents[2] / "plugins"

FORWARD = {"deploynorm_cpu_variants", "deploynorm_frn_cpu"}
BACKWARD = {"deploynorm_frn_backward_cpu", "deploynorm_frn_backward_cpu_workspace", "deploynorm_openmp_parallel_for"}
CUDA_FORWARD = FORWARD | {"deploynorm_cuda_variants", "deploynorm_frn_cuda", "deploynorm_frn_cuda_workspace"}
CUDA_BACKWARD = BACKWARD | {"deploynorm_frn_backward_cuda", "deploynorm_frn_backward_cuda_workspace"}

EXPORTED = {
    ("plain", ORT_LIBRARY): FORWARD | {"RegisterCustomOps"},
    ("plain", TORCH_LIBRARY): FORWARD | BACKWARD,
    ("cuda", ORT_LIBRARY): CUDA_FORWARD | {"RegisterCustomOps"},
    ("cuda", TORCH_LIBRARY): CUDA_FORWARD | CUDA_BACKWARD,
    ("cuda", TENSORRT_LIBRARY): {"getCreators", "setLoggerFinder"},
    ("cuda", TENSORRT_REGISTER_LIBRARY): set(),
}
"""Build and library -> the names that it exports."""

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

reads_elf = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the library is no ELF file here")


def undefined(library: Path) -> list[str]:
    """Names that the process must provide, with their versions, as "malloc@GLIBC_2.2.5"; not the weak ones."""
    done = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [line.split()[1] for line in done.stdout.splitlines() if line.split()[0] == "U"]


def too_new(names: list[str]) -> list[str]:
    """Those of a version that is not glibc's, or above 2.17, which manylinux2014 is."""
    versions = {name: re.fullmatch(r".*@GLIBC_(\d+)\.(\d+)(\.\d+)?", name) for name in names if "@" in name}
    assert versions
    return [name for name, version in versions.items() if not version or (int(version[1]), int(version[2])) > (2, 17)]


@pytest.fixture(params=EXPORTED, ids="-".join)
def built(request: pytest.FixtureRequest, require: Callable[[str], None]) -> tuple[str, Path]:
    """How a library was built, and the library."""
    build, name = request.param
    require("native")
    require("compiler")
    return build, library_path(name) if build == "plain" else request.getfixturevalue("cuda_libraries") / name


@reads_elf
def test_it_exports_its_entry_points_and_nothing_else(built: tuple[str, Path]) -> None:
    build, path = built
    assert set(read_library(path).exports) - {"_init", "_fini"} == EXPORTED[build, path.name]


@reads_elf
def test_it_needs_the_c_library_alone(built: tuple[str, Path]) -> None:
    """Nothing of CUDA or TensorRT: it loads on a machine without a GPU, and beside any version of those."""
    build, path = built
    allowed = {"c", "m"} if build == "plain" else {"c", "dl", "pthread", "rt"}
    if path.name == TENSORRT_LIBRARY:
        allowed |= {"stdc++", "m", "gcc_s"}
    needed = read_library(path).needed
    assert needed
    names = {re.sub(r"^lib(.+)\.so\.\d$", r"\1", name) for name in needed if not name.startswith("ld-linux-")}
    assert names <= allowed


@reads_elf
def test_it_takes_nothing_from_the_process_that_it_is_loaded_into(built: tuple[str, Path]) -> None:
    """Of ONNX Runtime, CUDA, TensorRT, and without CUDA of the C++ runtime or threads: a name of theirs would show."""
    build, path = built
    foreign = r"Ort|cuda|cu[A-Z]|getPluginRegistry|getLogger|createInfer"
    if build == "plain":
        foreign += "|_Z|__cxa|__gxx|pthread_|omp_|GOMP_|__asan|__ubsan"
    names = undefined(path)
    assert names
    assert not [name for name in names if re.match(foreign, name)]


@reads_elf
@pytest.mark.parametrize("name", [ORT_LIBRARY, TORCH_LIBRARY])
def test_it_runs_on_the_oldest_linux_that_python_wheels_are_for(name: str, require: Callable[[str], None]) -> None:
    require("native")
    require("compiler")
    assert not too_new(undefined(library_path(name)))


@reads_elf
def test_what_is_wrong_with_a_library_is_seen(tmp_path: Path, require: Callable[[str], None]) -> None:
    """One that needs the C++ runtime and a new glibc, and exports what ours must not."""
    require("compiler")
    source, target = tmp_path / "wrong.cpp", tmp_path / "libwrong.so"
    source.write_text("#include <string>\nstd::string grown(const char* c) { return std::string(c) + c; }\n")
    subprocess.run([str(find_tools().compiler), "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    wrong = read_library(target)
    assert any(name.startswith(("libstdc++", "libc++")) for name in wrong.needed)
    assert any("grown" in name for name in wrong.exports)
    assert too_new(undefined(target))


# ---- The libraries of nvcc on a machine without a GPU


@pytest.mark.slow
def test_a_build_asks_for_code_for_every_gpu(tmp_path: Path, require: Callable[[str], None]) -> None:
    """A test of `examine` shows that a library holds what was asked for: compiling for all GPUs takes minutes."""
    require("compiler")
    require("nvcc")
    options = ["-G", "Ninja", "-DDEPLOYNORM_CUDA=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    options.append(f"-DCMAKE_CUDA_COMPILER={libraries.find_cuda().nvcc}")
    done = subprocess.run(["cmake", "-S", SOURCES, "-B", tmp_path, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    kernels = [each["command"] for each in commands if each["file"].endswith(".cu")]
    assert len(kernels) == 2
    for command in kernels:
        names = re.findall(r"\b(sm|compute)_(\d+)(\d)(?=[,\]])", command.replace("arch=compute_", ""))
        code = [CudaCode(kind, (int(major), int(minor))) for kind, major, minor in names]
        missing = [gpu for gpu, capability in GPUS.items() if not any(each.runs_on(capability) for each in code)]
        assert not missing, command


@pytest.mark.slow
@pytest.mark.parametrize("source", ["frn.cu", "frn_backward.cu"])
def test_the_kernels_compile_for_the_oldest_gpu(source: str, tmp_path: Path, require: Callable[[str], None]) -> None:
    """It lacks instructions, of bfloat16 for one, that the GPU of the other tests has."""
    require("nvcc")
    words = [libraries.find_cuda().nvcc, "-std=c++17", "-arch=compute_75", "-Xcicc=-O1", "-ptx"]
    words += [SOURCES / "kernels" / source, "-o", tmp_path / "kernels.ptx"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernels.ptx").read_text().count(".entry") > 30


def test_the_cpu_kernel_is_in_it_and_right(cuda_libraries: Path) -> None:
    library = cuda_libraries / ORT_LIBRARY
    assert libraries.cuda_variants(library)
    kernel = Kernel(library)
    assert kernel.variants == libraries.cpu_variants(library)
    x = np.random.default_rng(0).standard_normal((2, CHANNELS, 9, 7), dtype=np.float32)
    expected = reference.filter_response_norm(x.astype(np.float64), *frn_parameters("float64").values())
    np.testing.assert_allclose(kernel(x, *frn_parameters().values()), expected, **OP_FLOAT32.kwargs())


def test_onnxruntime_without_cuda_takes_it_and_runs_on_the_cpu(
    cuda_libraries: Path, require: Callable[[str], None]
) -> None:
    require("ort")
    onnxruntime: Any = ort.import_onnxruntime()
    options = ort.quiet_options()
    options.register_custom_ops_library(str(cuda_libraries / ORT_LIBRARY))
    wide = np.random.default_rng(0).standard_normal((2, CHANNELS, 9, 7), dtype=np.float32)
    for dtype in ("float32", "float64", "float16"):
        x = wide.astype(dtype)
        session = onnxruntime.InferenceSession(frn_model(dtype).SerializeToString(), options)
        (y,) = session.run(None, {INPUTS[0]: x})
        expected = reference.filter_response_norm(x.astype(np.float64), *frn_parameters("float64").values())
        np.testing.assert_allclose(y, expected, **(OP_FLOAT16 if dtype == "float16" else OP_FLOAT32).kwargs())


# ---- The sources


SYSTEM = {"dlfcn.h", "limits.h", "link.h", "math.h", "new", "stdarg.h", "stddef.h", "stdint.h", "stdio.h", "stdlib.h",
          "string.h", "type_traits"}  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "others"),
    [
        ("kernels", {"cooperative_groups.h", "cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "immintrin.h"}),
        ("onnxruntime", set()),
        ("torch", set()),
        ("tensorrt", {"NvInferRuntime.h"}),
    ],
)
def test_no_header_of_a_framework_is_included(folder: str, others: set[str]) -> None:
    """But TensorRT's runtime header by its plugin; what registers that is to serve every TensorRT."""
    files = [path for path in (SOURCES / folder).iterdir() if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    own = {"../contract.h", "../kernels/frn.h", *(path.name for path in files)}
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        included = set(re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', text, flags=re.MULTILINE))
        allowed = {"register.cpp": {"../contract.h", "host.h"}, "host.h": set()}.get(path.name, own | others)
        assert included <= SYSTEM | allowed, path.name


@pytest.mark.parametrize("language", [("c", "c99"), ("c++", "c++11"), ("c++", "c++20")], ids=lambda each: each[1])
def test_any_host_can_include_the_kernels_interface(
    language: tuple[str, str], require: Callable[[str], None], tmp_path: Path
) -> None:
    require("compiler")
    user = tmp_path / "user"
    user.write_text(
        '#include "frn.h"\n#include "frn.h"\n'
        "int use(struct deploynorm_frn* call) {\n"
        "  call->type = DEPLOYNORM_BFLOAT16;\n"
        "  return deploynorm_frn_cpu(call, 0, 0, deploynorm_cpu_variants()[0]);\n}\n"
    )
    options = ["-x", language[0], f"-std={language[1]}", "-pedantic-errors", "-Wall", "-Wextra", "-Werror"]
    command = [str(find_tools().compiler), *options, "-I", str(SOURCES / "kernels"), "-fsyntax-only", str(user)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
