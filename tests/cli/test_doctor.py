"""deploynorm doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploynorm import doctor, libraries
from deploynorm.doctor.elf import CudaCode
from deploynorm.doctor.facts import Driver, Examination, Gpu, Library, OnnxRuntime, Provider, TensorRT

FACTS = Examination(
    python="3.12.1 (/usr/bin/python3)",
    system="Linux",
    packages={"numpy": "2.4.6", "nvidia-cudnn-cu13": "9.20", "onnxruntime-gpu": "1.31.1", "torch": "2.13.0+cu130"},
    torch_cuda="13.0",
    onnxruntime=OnnxRuntime(
        "1.31.1", ("onnxruntime-gpu",), ("CUDAExecutionProvider", "CPUExecutionProvider"), takes_library=True
    ),
    providers=(Provider("cuda", ("libcublas.so.13",)),),
    tensorrt=(TensorRT("tensorrt", "10.14.1", takes_plugin=True, creators=41),),
    compiler="g++ 14",
    nvcc="/usr/local/cuda/bin/nvcc (release 13.0)",
    nvcc_release=(13, 0),
    driver=Driver("580.95", (13, 0), (Gpu("NVIDIA H100", (9, 0), 80 * 2**30),)),
    machine="x86-64",
    libraries=tuple(
        Library(name, f"/c/{name}", 2**20, "built here", "x86-64", ("libc.so.6",), exports, code)
        for name, exports, code in [
            (libraries.ORT_LIBRARY, ("RegisterCustomOps",), (CudaCode("sm", (9, 0)),)),
            (libraries.TORCH_LIBRARY, ("deploynorm_frn_cpu", "deploynorm_frn_backward_cpu"), (CudaCode("sm", (9, 0)),)),
            (libraries.TENSORRT_LIBRARY, ("getCreators", "setLoggerFinder"), (CudaCode("compute", (9, 0), 13),)),
        ]
    ),
)
"""A machine on which nothing is broken; the plugin has PTX alone, which is a note."""

BROKEN = replace(FACTS, providers=(Provider("cuda", ("libcublas.so.13",), {"libcublas.so.13": None}),))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Examination], None]:
    monkeypatch.chdir(tmp_path)
    return lambda facts: monkeypatch.setattr(doctor, "examine", lambda: facts)


def test_a_machine_on_which_all_works_together(machine: Callable, deploynorm: Callable) -> None:
    machine(FACTS)
    shown = deploynorm("doctor")
    assert (shown.code, shown.err) == (0, "")
    for text in (
        "torch                2.13.0+cu130 (for CUDA 13.0)",
        "580.95, for CUDA up to 13.0",
        "NVIDIA H100  compute capability 9.0, 80.0 GiB",
        "1.31.1, providers CUDA, CPU; takes our library",
        "10.14.1; takes our plugin",
        "1.00 MiB  sm_90 ",
        "Not here, or slower than it could be\n- libdeploynorm_trt.so has compute_90",
        "What is installed works together.",
    ):
        assert text in shown.out, text
    assert "Broken" not in shown.out
    assert "cudnn" not in shown.out


def test_verbose_tells_all_packages_needs_and_exports(machine: Callable, deploynorm: Callable) -> None:
    machine(FACTS)
    shown = deploynorm("doctor", "--verbose")
    for text in ("nvidia-cudnn-cu13", "RegisterCustomOps", "libc.so.6", "41 plugins", "finds all that it needs"):
        assert text in shown.out, text


def test_what_is_broken_comes_first_with_its_remedy_and_makes_the_exit_code(
    machine: Callable, deploynorm: Callable
) -> None:
    machine(BROKEN)
    shown = deploynorm("doctor")
    assert shown.code == 3
    assert shown.out.index(
        "Broken\n- onnxruntime's CUDA provider cannot start: libcublas.so.13 not found\n  Fix: pip install"
    )
    assert shown.out.index("Broken") < shown.out.index("Not here")
    assert "works together" not in shown.out
    assert "cuda  missing libcublas.so.13" in shown.out


def test_quiet_tells_what_is_broken_alone(machine: Callable, deploynorm: Callable) -> None:
    machine(BROKEN)
    shown = deploynorm("doctor", "--quiet")
    assert (shown.code, shown.out) == (3, "")
    assert shown.err.startswith("deploynorm doctor: onnxruntime's CUDA provider cannot start")
    assert shown.err.count("\n") == 1
    machine(FACTS)
    assert deploynorm("doctor", "-q") == (0, "", "")


@pytest.mark.parametrize(("facts", "ok"), [(FACTS, True), (BROKEN, False)], ids=["sound", "broken"])
def test_json_has_every_fact_and_finding(facts: Examination, ok: bool, machine: Callable, deploynorm: Callable) -> None:
    machine(facts)
    assert deploynorm("doctor", "--json", "doctor.json").code == (0 if ok else 3)
    content = json.loads(Path("doctor.json").read_text())
    assert content["ok"] is ok
    assert content["findings"] == [finding._asdict() for finding in doctor.diagnose(facts).findings]
    assert content["facts"]["driver"]["gpus"] == [
        {"name": "NVIDIA H100", "capability": [9, 0], "memory_bytes": 80 * 2**30}
    ]
    assert content["facts"]["libraries"][2]["code"] == [{"kind": "compute", "capability": [9, 0], "cuda": 13}]
    assert set(content["facts"]) == set(Examination.__dataclass_fields__)


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (Examination(), "driver  none"),
        (replace(FACTS, driver=Driver("580.95", (13, 0), problem="CUDA_ERROR_UNKNOWN")), "GPUs    CUDA_ERROR_UNKNOWN"),
        (replace(FACTS, onnxruntime=OnnxRuntime("1.31.1", problem="half of it")), "onnxruntime  half of it"),
        (replace(FACTS, tensorrt=(TensorRT("tensorrt_rtx", problem="no such library"),)), "no such library"),
    ],
)
def test_what_is_missing_or_broken_is_shown_in_its_table(
    facts: Examination, text: str, machine: Callable, deploynorm: Callable
) -> None:
    machine(facts)
    assert text in deploynorm("doctor").out


def test_this_machine(deploynorm: Callable, tmp_path: Path) -> None:
    path = tmp_path / "doctor.json"
    shown = deploynorm("doctor", "-v", "--json", path)
    content = json.loads(path.read_text())
    levels = [finding["level"] for finding in content["findings"]]
    assert shown.code == (3 if "broken" in levels else 0), shown.err
    assert content["ok"] is ("broken" not in levels)
    assert sys.executable in shown.out
    assert [each["name"] for each in content["facts"]["libraries"]] == [
        row.file for row in libraries.LIBRARIES.values() if libraries.find_library(row.file)
    ]
