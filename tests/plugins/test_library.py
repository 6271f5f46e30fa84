"""What the library needs of a machine and gives to it, and what its sources need."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deploynorm.libraries import ORT_LIBRARY, TORCH_LIBRARY, find_tools, library_path

SOURCES = Path(__file__).parents[2] / "plugins"

FORWARD = {"deploynorm_cpu_variants", "deploynorm_frn_cpu"}

EXPORTED = {
    ORT_LIBRARY: FORWARD | {"RegisterCustomOps"},
    TORCH_LIBRARY: FORWARD
    | {
        "deploynorm_frn_backward_cpu",
        "deploynorm_frn_backward_cpu_workspace",
        "deploynorm_openmp_parallel_for",
    },
}
"""Of each library, as it is built without CUDA."""

reads_elf = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the library is no ELF file here")


@dataclass
class Elf:
    """What the dynamic linker sees of a 64-bit ELF file.

    Attributes:
        needed: Names of the libraries that are loaded with it.
        exported: Names that others can link against.
        wanted: Names that others have to provide, without those that may be missing.
        versions: Versions of symbols that it needs, as "GLIBC_2.17".
    """

    path: Path
    needed: set[str] = field(default_factory=set)
    exported: set[str] = field(default_factory=set)
    wanted: set[str] = field(default_factory=set)
    versions: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        content = self.path.read_bytes()
        assert content[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
        table, (size, count) = struct.unpack_from("<Q", content, 40)[0], struct.unpack_from("<HH", content, 58)
        sections = [struct.unpack_from("<IIQQQQIIQQ", content, table + size * index) for index in range(count)]

        def text(section: int, offset: int) -> str:
            start = sections[section][4] + offset
            return content[start : content.index(b"\0", start)].decode()

        def entries(kind: int, form: str) -> Iterator[tuple[int, tuple[int, ...]]]:
            for _, each, _, _, offset, length, strings, *_ in sections:
                if each == kind:
                    for at in range(offset, offset + length, struct.calcsize(form)):
                        yield strings, struct.unpack_from(form, content, at)

        for strings, (tag, value) in entries(6, "<QQ"):  # SHT_DYNAMIC
            if tag == 1:  # DT_NEEDED
                self.needed.add(text(strings, value))
        for strings, (name, info, _, section, _, _) in entries(11, "<IBBHQQ"):  # SHT_DYNSYM
            binding = info >> 4  # 1 global, 2 weak
            if section and binding in (1, 2):
                self.exported.add(text(strings, name))
            elif binding == 1:
                self.wanted.add(text(strings, name))
        for _, kind, _, _, at, _, strings, needs, *_ in sections:
            if kind != 0x6FFFFFFE:  # SHT_GNU_verneed
                continue
            for _ in range(needs):
                _, auxiliaries, _, first, following = struct.unpack_from("<HHIII", content, at)
                auxiliary = at + first
                for _ in range(auxiliaries):
                    name, step = struct.unpack_from("<II", content, auxiliary + 8)
                    self.versions.add(text(strings, name))
                    auxiliary += step
                at += following


@pytest.fixture(scope="session", params=EXPORTED)
def elf(request: pytest.FixtureRequest, require: Callable[[str], None]) -> Elf:
    require("native")
    return Elf(library_path(request.param))


@reads_elf
def test_the_reader_sees_what_is_there(tmp_path: Path, require: Callable[[str], None]) -> None:
    """A library that needs the C++ runtime and a new glibc, and exports what ours must not."""
    require("compiler")
    source, target = tmp_path / "wrong.cpp", tmp_path / "libwrong.so"
    source.write_text("#include <string>\nstd::string grown(const char* c) { return std::string(c) + c; }\n")
    subprocess.run([str(find_tools().compiler), "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    wrong = Elf(target)
    assert any(name.startswith(("libstdc++", "libc++")) for name in wrong.needed)
    assert any("grown" in name for name in wrong.exported)
    assert wrong.wanted
    assert any(version.startswith(("GLIBCXX_", "GLIBC_")) for version in wrong.versions)


@reads_elf
def test_the_library_needs_the_c_library_alone(elf: Elf) -> None:
    allowed = re.compile(r"lib[cm]\.so\.6|ld-linux-[\w-]+\.so\.\d")
    assert elf.needed
    assert not [name for name in elf.needed if not allowed.fullmatch(name)]


@reads_elf
def test_the_library_runs_on_the_oldest_linux_that_python_wheels_are_for(elf: Elf) -> None:
    """manylinux2014 is glibc 2.17. Every version that is needed is one of glibc."""
    versions = [re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", version) for version in elf.versions]
    assert versions
    assert all(versions), elf.versions
    assert not [v[0] for v in versions if v is not None and (int(v[1]), int(v[2])) > (2, 17)]


@reads_elf
def test_the_library_exports_its_entry_points_and_nothing_else(elf: Elf) -> None:
    assert elf.exported - {"_init", "_fini"} == EXPORTED[elf.path.name]


@reads_elf
def test_the_library_takes_nothing_from_the_process_that_it_is_loaded_into(elf: Elf) -> None:
    """Of the C++ runtime, ONNX Runtime, CUDA or threads: a name of theirs would show here, whoever provides it."""
    foreign = re.compile(r"^(_Z|__cxa|__gxx|Ort|cuda|cu[A-Z]|pthread_|omp_|GOMP_|__asan|__ubsan)")
    assert elf.wanted
    assert not [name for name in elf.wanted if foreign.match(name)]


def includes(path: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_the_kernels_include_no_header_of_a_framework() -> None:
    own = {path.name for path in (SOURCES / "kernels").iterdir() if path.suffix in (".h", ".cuh")}
    own |= {"cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"}
    files = [path for path in (SOURCES / "kernels").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(files) > 3
    for path in files:
        foreign = includes(path) - own - {"math.h", "stddef.h", "stdint.h", "string.h", "type_traits"}
        assert not foreign, f"{path.name} includes {foreign}"


def test_the_host_includes_no_header_of_onnx_runtime() -> None:
    own = {"../contract.h", "../kernels/frn.h", "frn_cuda.h", "frn_op.h", "ort_abi.h"}
    files = list((SOURCES / "onnxruntime").iterdir())
    assert len(files) > 3
    for path in files:
        foreign = includes(path) - own - {"stddef.h", "stdint.h", "stdio.h", "stdlib.h"}
        assert not foreign, f"{path.name} includes {foreign}"


def test_the_host_for_training_includes_no_header_of_pytorch() -> None:
    for path in (SOURCES / "torch").iterdir():
        assert includes(path) <= {"openmp.h", "../kernels/frn.h"}, path.name


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
