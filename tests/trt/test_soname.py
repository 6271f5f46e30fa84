"""A second name for a library that is loaded, without a compiler and without a file."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploynorm.errors import BackendError
from deploynorm.trt.soname import also_known_as, empty_library, loaded_library

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ELF")


def library(stem: str) -> str:
    ctypes.CDLL(f"{stem}.6")
    path = loaded_library(stem)
    assert path is not None
    return path


def test_a_library_is_found_under_the_other_name_with_its_symbols() -> None:
    name = "libdeploynorm_test_other_name.so"
    with pytest.raises(OSError, match=name):
        ctypes.CDLL(name)
    also_known_as(name, library("libm.so"))
    also_known_as(name, library("libm.so"))
    cosine = ctypes.CDLL(name).cos
    cosine.restype, cosine.argtypes = ctypes.c_double, [ctypes.c_double]
    assert cosine(1.0) == math.cos(1.0)


def test_a_name_that_is_there_is_left_alone() -> None:
    before = Path("/proc/self/maps").read_text().count("memfd")
    also_known_as("libm.so.6", library("libm.so"))
    assert Path("/proc/self/maps").read_text().count("memfd") == before


def test_a_system_that_refuses_is_reported_with_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise PermissionError("no memory files here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(BackendError, match=r"no memory files here.*Fix: make a link .*LD_LIBRARY_PATH"):
        also_known_as("libdeploynorm_test_refused.so", library("libm.so"))


def test_it_is_a_well_formed_library_that_asks_for_no_executable_memory(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(empty_library("libname.so", "/folder/libreal.so.1"))
    try:
        found = subprocess.run(["readelf", "-W", "-d", "-l", path], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("readelf is not installed")
    assert "Library soname: [libname.so]" in found
    assert "Shared library: [/folder/libreal.so.1]" in found
    flags = [line.split()[-2] for line in found.splitlines() if line.split()[:1] in (["LOAD"], ["GNU_STACK"])]
    assert flags == ["RW", "RW"]


def test_a_library_that_is_not_loaded_is_not_found() -> None:
    assert loaded_library("libdeploynorm_none.so") is None
