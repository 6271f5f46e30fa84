"""The library that registers the plugin in hosts which only open it: with which TensorRT it does what.

TensorRT is a stand-in here, whose registry has as many methods as the real one, and notes which of them was called.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from deploynorm.contract import DOMAIN, OP_TYPE, VERSION
from deploynorm.libraries import TENSORRT_LIBRARY, TENSORRT_REGISTER_LIBRARY, find_tools, source_folder

STAND_IN = r"""
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>

namespace {  // so that several of these in one process share nothing

// What this copy of the library is to be, from the file beside it.
struct Facts {
  std::string name;
  int version = 0, takes = 0, has = 0;

  Facts() {
    Dl_info here;
    dladdr(this, &here);
    const std::string path = here.dli_fname;
    name = path.substr(path.rfind('/') + 1);
    std::FILE* file = std::fopen((path + ".facts").c_str(), "r");
    if (std::fscanf(file, "%d %d %d", &version, &takes, &has) != 3) std::printf("no facts\n");
    std::fclose(file);
  }
} facts;

// A method that says which it is. Where the plugin's creator is asked for, it is there or not.
template <int kSlot>
void* method(void*, void* a, const char* b, const char* c) {
  if (kSlot == 8 || kSlot == 12) {
    std::printf("%s slot %d: creator %s in %s\n", facts.name.c_str(), kSlot, static_cast<const char*>(a), b);
    return reinterpret_cast<void*>(static_cast<uintptr_t>(facts.takes));
  }
  std::printf("%s slot %d: %s %s %s\n", facts.name.c_str(), kSlot, static_cast<const char*>(a), b, c);
  return facts.has ? a : nullptr;
}

template <int... kSlots>
void* make(std::integer_sequence<int, kSlots...>) {
  static void* table[] = {reinterpret_cast<void*>(method<kSlots>)...};
  static void** object = table;
  return &object;
}

}  // namespace

extern "C" int32_t getInferLibVersion() { return facts.version; }
extern "C" void* REGISTRY() { return make(std::make_integer_sequence<int, 24>()); }
"""

PLUGIN = r"""
#include <cstdint>
extern "C" void* const* getCreators(int32_t& count) {
  static char name[] = "ours";
  static void* const creators[] = {name};
  count = 1;
  return creators;
}
"""

OPEN = "import ctypes, sys; [ctypes.CDLL(path) for path in sys.argv[1:]]"


@pytest.fixture(scope="session")
def compile_library(require: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compile_library(name, source, "-DNAME=...") in a folder of its own."""
    require("compiler")

    @cache
    def compile_library(name: str, source: str, *options: str) -> Path:
        target = tmp_path_factory.mktemp("library") / name
        command = [str(find_tools().compiler), "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
        command += ["-x", "c++", "-", "-o", str(target), *options]
        done = subprocess.run([*command, "-ldl"], input=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    return compile_library


@pytest.fixture(scope="session")
def register(compile_library: Callable[..., Path]) -> Path:
    """The library, beside a stand-in for the plugin."""
    folder = source_folder() / "tensorrt"
    source = (folder / "register.cpp").read_text(encoding="utf-8")
    flags = ["-O3", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wl,-z,defs"]
    library = compile_library(TENSORRT_REGISTER_LIBRARY, source, f"-I{folder}", *flags)
    shutil.copy(compile_library(TENSORRT_LIBRARY, PLUGIN), library.parent)
    return library


@pytest.fixture
def stand_in(compile_library: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """stand_in("libnvinfer.so.10", 101400): a TensorRT of this version that takes every creator."""

    def stand_in(
        name: str, version: int, *, takes: bool = True, has: bool = False, registry: str = "getPluginRegistry"
    ) -> Path:
        library = tmp_path_factory.mktemp("stand_in") / name
        shutil.copy(compile_library("libstand_in.so", STAND_IN, f"-DREGISTRY={registry}"), library)
        library.with_name(f"{name}.facts").write_text(f"{version} {takes:d} {has:d}")
        return library

    return stand_in


def opened(libraries: Sequence[Path]) -> tuple[list[str], str]:
    """What is printed, and what goes to stderr, in a process that opens the libraries in this order."""
    done = subprocess.run([sys.executable, "-c", OPEN, *map(str, libraries)], capture_output=True, text=True)
    assert done.returncode == 0, done
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("name", "version", "slot"),
    [
        ("libnvinfer.so.10", 100000, 12),
        ("libnvinfer.so.10", 101601, 12),
        ("libnvinfer.so", 101400, 12),
        ("libnvinfer.so.10.14.1", 101401, 12),
        ("libnvinfer_lean.so.10", 101601, 12),
        ("libnvinfer.so.11", 110000, 8),
        ("libnvinfer_lean.so.11", 110400, 8),
        ("libtensorrt_rtx.so.1", 10400, 12),
        ("libtensorrt_rtx.so.1", 10500, 8),
        ("libtensorrt_rtx.so.1", 10701, 8),
    ],
)
def test_each_registry_is_called_where_its_method_is(
    name: str, version: int, slot: int, register: Path, stand_in: Callable[..., Path]
) -> None:
    printed, words = opened([stand_in(name, version), register])
    assert printed == [f"{name} slot {slot}: creator ours in {DOMAIN}"]
    assert words == ""


@pytest.mark.parametrize(
    ("name", "version", "unknown"),
    [
        ("libnvinfer.so.12", 120000, "TensorRT 12.0"),
        ("libnvinfer.so.8", 8601, "TensorRT 8.6"),
        ("libnvinfer.so.9", 90300, "TensorRT 9.3"),
        ("libtensorrt_rtx.so.1", 10300, "TensorRT-RTX 1.3"),
        ("libtensorrt_rtx.so.2", 20000, "TensorRT-RTX 2.0"),
    ],
)
def test_a_registry_that_is_not_known_is_left_alone(
    name: str, version: int, unknown: str, register: Path, stand_in: Callable[..., Path]
) -> None:
    library = stand_in(name, version)
    printed, words = opened([library, register])
    assert printed == []
    assert f"the plugin was not registered: this library does not know {unknown} ({library})" in words
    assert f"Fix: instead of this library load {TENSORRT_LIBRARY}" in words


def test_a_tensorrt_without_a_registry(register: Path, stand_in: Callable[..., Path]) -> None:
    printed, words = opened([stand_in("libnvinfer.so.10", 101400, registry="another"), register])
    assert printed == []
    assert "the plugin was not registered" in words


def test_every_tensorrt_of_the_process_gets_the_plugin(register: Path, stand_in: Callable[..., Path]) -> None:
    all_three = [
        stand_in("libnvinfer_lean.so.11", 110400),
        stand_in("libtensorrt_rtx.so.1", 10701),
        stand_in("libnvinfer.so.10", 101601),
    ]
    printed, words = opened([*all_three, register])
    assert sorted(line.partition(":")[0] for line in printed) == [
        "libnvinfer.so.10 slot 12",
        "libnvinfer_lean.so.11 slot 8",
        "libtensorrt_rtx.so.1 slot 8",
    ]
    assert words == ""


@pytest.mark.parametrize(
    "name", ["libnvinfer_plugin.so.10", "libnvinfer_builder_resource.so.10", "libnvinfer.sort", "mylibnvinfer.so.10"]
)
def test_a_library_of_a_similar_name_is_no_tensorrt(name: str, register: Path, stand_in: Callable[..., Path]) -> None:
    printed, words = opened([stand_in(name, 101400), register])
    assert printed == []
    assert "no TensorRT is loaded" in words


def test_a_plugin_that_is_there_already_is_no_error(register: Path, stand_in: Callable[..., Path]) -> None:
    """It is asked for only when the registry has refused: a registry logs an error for what it does not have."""
    printed, words = opened([stand_in("libnvinfer.so.11", 110000, takes=False, has=True), register])
    assert [line.partition(":")[0].split()[-1] for line in printed] == ["8", "10"]
    assert printed[1].endswith(f": {OP_TYPE} {VERSION} {DOMAIN}")
    assert words == ""
    printed, _ = opened([stand_in("libnvinfer.so.10", 101000, takes=False, has=True), register])
    assert [line.partition(":")[0].split()[-1] for line in printed] == ["12", "14"]


def test_a_registry_that_refuses_the_plugin(register: Path, stand_in: Callable[..., Path]) -> None:
    _, words = opened([stand_in("libnvinfer.so.10", 101601, takes=False), register])
    assert words.startswith("deploynorm: TensorRT 10.16 refused the plugin. Fix: instead of this library load")


@pytest.mark.parametrize("before", [[], ["libnvinfer.so.10"]], ids=["alone", "too_early"])
def test_without_tensorrt_it_says_so(before: list[str], register: Path, stand_in: Callable[..., Path]) -> None:
    printed, words = opened([register, *(stand_in(name, 101400) for name in before)])
    assert printed == []
    assert words.startswith("deploynorm: the plugin was not registered: no TensorRT is loaded. Fix: open this library")
    assert len(words.splitlines()) == 1


@pytest.mark.parametrize("beside", ["nothing", "no_library", "no_creators"])
def test_without_the_plugin_beside_it_it_says_so(
    beside: str, register: Path, stand_in: Callable[..., Path], compile_library: Callable[..., Path], tmp_path: Path
) -> None:
    alone = Path(shutil.copy(register, tmp_path))
    if beside == "no_library":
        (tmp_path / TENSORRT_LIBRARY).write_text("not a library")
    elif beside == "no_creators":
        shutil.copy(compile_library(TENSORRT_LIBRARY, "int other;"), tmp_path)
    printed, words = opened([stand_in("libnvinfer.so.10", 101601), alone])
    assert printed == []
    assert words.startswith("deploynorm: the plugin was not registered: ")
    assert str(tmp_path / TENSORRT_LIBRARY) in words
    assert f"Fix: leave {TENSORRT_LIBRARY} and this library in one folder" in words


def test_a_folder_with_any_name_will_do(register: Path, stand_in: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "a b %s ü"
    shutil.copytree(register.parent, folder)
    printed, words = opened([stand_in("libnvinfer.so.10", 101601), folder / register.name])
    assert len(printed) == 1
    assert words == ""
