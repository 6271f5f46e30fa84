"""plugins/onnxruntime/ort_abi.h, which is ours, against ONNX Runtime's own header."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deploynorm.libraries import find_tools

HEADER = Path(__file__).parents[2] / "plugins" / "onnxruntime" / "ort_abi.h"
CHECK = Path(__file__).with_name("ort_abi_check.cpp")

TEXT = HEADER.read_text()
FUNCTIONS = dict(re.findall(r"^  X\((\w+), (\d+),", TEXT, flags=re.MULTILINE))
MEMBERS = re.findall(r"^  X\((\w+), [^\d]", TEXT, flags=re.MULTILINE)
CONSTANTS = dict(re.findall(r"^constexpr int (k\w+) = (\d+);", TEXT, flags=re.MULTILINE))


@pytest.fixture(scope="session")
def errors(require: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], set[str]]:
    """errors(text): what is found wrong with this text as ort_abi.h, as "OrtApi::CreateStatus: wrong slot"."""
    require("ort-headers")
    require("compiler")
    compiler = find_tools().compiler

    def errors(text: str) -> set[str]:
        folder = tmp_path_factory.mktemp("abi")
        (folder / HEADER.name).write_text(text)
        options = ["-std=c++17", "-fsyntax-only", "-fmax-errors=0", "-Wno-invalid-offsetof"]
        if "clang" in compiler.name:
            options[2] = "-ferror-limit=0"
        includes = ["-I", str(folder), "-I", os.environ["ONNXRUNTIME_INCLUDE_DIR"]]
        done = subprocess.run([str(compiler), *options, *includes, str(CHECK)], capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if re.search(r"\berror:", line)]
        words = [re.search(r"\b\w+(::\w+)?: (wrong|ours|the header) [\w ]+", line) for line in lines]
        # An error of another kind would hide those that are looked for.
        assert all(words), done.stderr
        found = {word[0] for word in words if word is not None}
        assert bool(found) == (done.returncode != 0), done.stderr
        return found

    return errors


def test_the_interface_is_that_of_the_header(errors: Callable[[str], set[str]]) -> None:
    assert errors(TEXT) == set()


def test_everything_is_looked_at() -> None:
    assert len(FUNCTIONS) > 10
    assert len(MEMBERS) > 20
    check = CHECK.read_text()
    assert "DEPLOYNORM_ORT_FUNCTIONS(CHECK_SLOT)\n" in check
    assert "DEPLOYNORM_ORT_MEMBERS(CHECK_MEMBER)\n" in check
    assert dict.fromkeys(re.findall(r"CHECK_CONSTANT\((k\w+),", check)).keys() == CONSTANTS.keys()


@pytest.mark.parametrize("by", [-1, 1])
def test_a_wrong_slot_of_any_function_is_found(by: int, errors: Callable[[str], set[str]]) -> None:
    wrong = re.sub(r"^(  X\(\w+), (\d+),", lambda m: f"{m[1]}, {int(m[2]) + by},", TEXT, flags=re.MULTILINE)
    assert errors(wrong) == {f"OrtApi::{name}: wrong slot" for name in FUNCTIONS}


def test_a_wrong_parameter_is_found(errors: Callable[[str], set[str]]) -> None:
    wrong = TEXT.replace("size_t index, const OrtValue** out)", "int index, const OrtValue** out)")
    assert errors(wrong) == {"OrtApi::KernelContext_GetInput: wrong type"}
    wrong = TEXT.replace("(int code, const char* message)", "(int code)")
    assert errors(wrong) == {"OrtApi::CreateStatus: wrong type"}
    wrong = TEXT.replace("(OrtStatus * status)", "(OrtStatus * status, int more)")
    assert errors(wrong) == {"OrtApi::ReleaseStatus: wrong type"}


def test_a_member_too_many_too_few_or_of_another_type_is_found(errors: Callable[[str], set[str]]) -> None:
    members = "  DEPLOYNORM_ORT_MEMBERS(DEPLOYNORM_ORT_MEMBER)\n"
    assert TEXT.count(members) == 1
    wrong = errors(TEXT.replace(members, f"  void* another;\n{members}"))
    assert wrong >= {f"OrtCustomOp::{name}: wrong place" for name in MEMBERS}
    wrong = errors(TEXT.replace(members, f"{members}  void* another;\n"))
    assert wrong & {"OrtCustomOp: wrong size", "OrtCustomOp: ours is larger"}
    wrong = errors(TEXT.replace("X(GetMayInplace, size_t", "X(GetMayInplace, int"))
    assert wrong == {"OrtCustomOp::GetMayInplace: wrong type"}
    version = errors(TEXT.replace("  uint32_t version;\n", "  uint64_t version;\n"))
    assert version == {"OrtCustomOp::version: wrong type"}


def test_a_wrong_constant_is_found(errors: Callable[[str], set[str]]) -> None:
    wrong = re.sub(r"^(constexpr int k\w+) = (\d+);", lambda m: f"{m[1]} = {int(m[2]) + 1};", TEXT, flags=re.MULTILINE)
    assert errors(wrong) == {f"{name}: wrong value" for name in CONSTANTS}
    assert errors(TEXT.replace("kApiVersion = 18", "kApiVersion = 1000")) >= {
        "kApiVersion: the header is older than the interface that is used"
    }


def test_a_wrong_base_is_found(errors: Callable[[str], set[str]]) -> None:
    lines = re.search(r"struct ApiBase \{\n(.*\n)(.*\n)\};", TEXT)
    assert lines is not None
    wrong = errors(TEXT.replace(lines[1] + lines[2], lines[2] + lines[1]))
    assert wrong >= {"OrtApiBase::GetApi: wrong place", "OrtApiBase::GetVersionString: wrong place"}
