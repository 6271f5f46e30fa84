"""deploynorm doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from machines import GPU_MACHINE, ORT, PLUGIN, TRAINING

from deploynorm import doctor, libraries
from deploynorm.doctor.facts import Driver, Examination, OnnxRuntime, Provider, TensorRT
from deploynorm.libraries.elf import CudaCode

SM_90 = (CudaCode("sm", (9, 0)),)
FACTS = replace(
    GPU_MACHINE,
    providers=(Provider("cuda", ("libcublas.so.13",)),),
    libraries=(
        replace(ORT, code=SM_90),
        replace(TRAINING, code=SM_90),
        replace(PLUGIN, code=(CudaCode("compute", (9, 0), 13),)),
    ),
)
"""A machine on which nothing is broken; the plugin has PTX alone, which is a note."""

BROKEN = replace(FACTS, providers=(Provider("cuda", ("libcublas.so.13",), {"libcublas.so.13": None}),))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Examination], None]:
    return lambda facts: monkeypatch.setattr(doctor, "examine", lambda: facts)


def test_a_machine_on_which_all_works_together(machine: Callable, deploynorm: Callable) -> None:
    machine(FACTS)
    shown = deploynorm("doctor")
    assert shown.err == ""
    for text in (
        "torch                2.13.0+cu130 (for CUDA 13.0)",
        "580.95.05, for CUDA up to 13.0",
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
    verbose = deploynorm("doctor", "--verbose").out
    for text in ("nvidia-cudnn-cu13", "RegisterCustomOps", "libc.so.6", "41 plugins", "finds all that it needs"):
        assert text in verbose, text


def test_what_is_broken_comes_first_with_its_remedy_and_makes_the_exit_code(
    machine: Callable, deploynorm: Callable
) -> None:
    machine(BROKEN)
    shown = deploynorm("doctor", code=3).out
    broken = "Broken\n- onnxruntime's CUDA provider cannot start: libcublas.so.13 not found\n  Fix: pip install"
    assert shown.index(broken) < shown.index("Not here")
    assert "works together" not in shown
    assert "cuda  missing libcublas.so.13" in shown


def test_quiet_tells_what_is_broken_alone(machine: Callable, deploynorm: Callable) -> None:
    machine(BROKEN)
    shown = deploynorm("doctor", "--quiet", code=3)
    assert shown.out == ""
    assert shown.err.startswith("deploynorm doctor: onnxruntime's CUDA provider cannot start")
    assert shown.err.count("\n") == 1
    machine(FACTS)
    assert deploynorm("doctor", "-q") == (0, "", "")


@pytest.mark.parametrize(("facts", "ok"), [(FACTS, True), (BROKEN, False)], ids=["sound", "broken"])
def test_json_has_every_fact_and_finding(facts: Examination, ok: bool, machine: Callable, deploynorm: Callable) -> None:
    machine(facts)
    deploynorm("doctor", "--json", "doctor.json", code=0 if ok else 3)
    content = json.loads(Path("doctor.json").read_text())
    assert content["ok"] is ok
    assert content["findings"] == [finding._asdict() for finding in doctor.diagnose(facts).findings]
    assert content["facts"]["driver"]["gpus"] == [
        {"name": "NVIDIA H100", "capability": [9, 0], "memory_bytes": 80 * 2**30}
    ]
    assert content["facts"]["libraries"][2]["code"] == [{"kind": "compute", "capability": [9, 0], "cuda": 13}]
    assert set(content["facts"]) == set(Examination.__dataclass_fields__)


@pytest.mark.parametrize(
    ("facts", "text", "code"),
    [
        (Examination(), "driver  none", 0),
        (replace(FACTS, driver=Driver("580.95", (13, 0), problem="CUDA_ERROR")), "GPUs    CUDA_ERROR", 3),
        (replace(FACTS, onnxruntime=OnnxRuntime("1.31.1", problem="half of it")), "onnxruntime  half of it", 3),
        (replace(FACTS, tensorrt=(TensorRT("tensorrt_rtx", problem="no such library"),)), "no such library", 3),
    ],
)
def test_what_is_missing_or_broken_is_shown_in_its_table(
    facts: Examination, text: str, code: int, machine: Callable, deploynorm: Callable
) -> None:
    machine(facts)
    assert text in deploynorm("doctor", code=code).out


def test_this_machine(deploynorm: Callable, machine: Callable) -> None:
    facts = doctor.examine()
    machine(facts)
    ok = not any(finding.level == "broken" for finding in doctor.diagnose(facts).findings)
    shown = deploynorm("doctor", "-v", "--json", "doctor.json", code=0 if ok else 3)
    content = json.loads(Path("doctor.json").read_text())
    assert content["ok"] is ok
    assert sys.executable in shown.out
    assert [each["name"] for each in content["facts"]["libraries"]] == [
        row.file for row in libraries.LIBRARIES.values() if libraries.find_library(row.file)
    ]
