"""The facts of this machine, and of installations put together here that are broken as users' are."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deploynorm import libraries
from deploynorm.doctor import Examination, Finding, diagnose, examine
from deploynorm.doctor import examination as examination_module
from deploynorm.libraries.find import cache_of_these_sources

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ELF")

WORKING = """
__version__ = "{version}"
get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
class SessionOptions:
    def register_custom_ops_library(self, path): {registration}
"""


@pytest.fixture(autouse=True)
def _torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can be imported; that of this machine may be for another torch."""
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "torchvision.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "vision")


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands before all others from which Python imports, here and in the processes of the probes."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    for name in ("onnxruntime", "torch"):  # other tests have imported them, which is where Python looks first
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    return folder


def add_metadata(folder: Path, versions: dict[str, str]) -> None:
    """What pip leaves of packages beside their files."""
    for name, version in versions.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def add_onnxruntime(folder: Path, *, registration: str = "pass") -> None:
    (folder / "onnxruntime").mkdir()
    text = WORKING.format(version="1.32.0", registration=registration)
    (folder / "onnxruntime" / "__init__.py").write_text(text)


@pytest.fixture
def built_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what was built on this machine of the sources that the package brings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = cache_of_these_sources() / "key"
    folder.mkdir(parents=True)
    return folder


def broken(examination: Examination) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(examination).findings if finding.level == "broken"}


def test_this_machine_as_it_is(require: Callable[[str], None]) -> None:
    require("ort")
    require("native")
    found = examine()
    for name in ("torch", "onnx", "numpy", "onnxruntime"):
        assert name not in found.packages or found.packages[name] == importlib.metadata.version(name)
    assert {"torch", "onnx", "numpy"} <= set(found.packages)
    assert sys.executable in found.python
    assert found.onnxruntime.takes_library is True
    assert "CPUExecutionProvider" in found.onnxruntime.providers
    assert found.torch_cuda == torch.version.cuda
    library = found.library(libraries.ORT_LIBRARY)
    assert library is not None
    assert (library.path, library.problem) == (str(libraries.library_path()), None)
    assert library.size_bytes == libraries.library_path().stat().st_size
    assert json.loads(json.dumps(dataclasses.asdict(found)))["packages"] == found.packages


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ('cuda = "12.8"', "12.8"),
        ("cuda: Optional[str] = None", None),
        ("cuda_archs = '8.0'", None),
    ],
)
def test_the_cuda_of_a_torch_that_is_not_imported(line: str, cuda: str | None, site_packages: Path) -> None:
    (site_packages / "torch").mkdir()
    (site_packages / "torch" / "__init__.py").write_text("raise ImportError('too slow')")
    (site_packages / "torch" / "version.py").write_text(f"__version__ = '9.9'\n{line}\nhip = None\n")
    assert examination_module._torch_cuda() == cuda


BROKEN_ONNXRUNTIMES = {
    "two in one folder": (
        WORKING.format(version="1.32.0", registration="pass"),
        {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1", "onnxruntime-extensions": "0.15.2"},
        "onnxruntime-twice",
        "onnxruntime and onnxruntime-gpu",
    ),
    "what one of two leaves": ("", {"onnxruntime": "1.32.0"}, "onnxruntime-import", "has no attribute"),
    "built for NumPy 1": (
        "raise ImportError('_ARRAY_API not found')",
        {"onnxruntime": "1.18.1", "numpy": "2.4.0"},
        "onnxruntime-numpy",
        "1.18.1",
    ),
    "too old": (
        WORKING.format(version="1.17.3", registration='raise RuntimeError("needs onnxruntime 1.18")'),
        {"onnxruntime": "1.17.3"},
        "onnxruntime-old",
        "1.17.3",
    ),
}


@pytest.mark.parametrize(
    ("source", "versions", "name", "problem"), BROKEN_ONNXRUNTIMES.values(), ids=BROKEN_ONNXRUNTIMES
)
def test_an_onnxruntime_that_is_broken(
    source: str, versions: dict[str, str], name: str, problem: str, site_packages: Path
) -> None:
    (site_packages / "onnxruntime" / "capi").mkdir(parents=True)
    (site_packages / "onnxruntime" / "__init__.py").write_text(source)
    add_metadata(site_packages, versions)
    examination = examine()
    found = broken(examination)
    assert set(found) == {name}
    assert problem in found[name].problem
    assert set(examination.onnxruntime.packages) == versions.keys() & {"onnxruntime", "onnxruntime-gpu"}


def test_two_onnxruntimes_in_two_folders_of_which_python_sees_one(site_packages: Path, tmp_path: Path) -> None:
    add_onnxruntime(site_packages)
    add_metadata(site_packages, {"onnxruntime-gpu": "1.31.1"})
    add_metadata(tmp_path / "other", {"onnxruntime": "1.32.0"})
    sys.path.insert(1, str(tmp_path / "other"))  # which the fixture's monkeypatch takes back
    found = examine()
    assert found.packages["onnxruntime"] == "1.32.0"
    assert found.onnxruntime.packages == ("onnxruntime-gpu",)
    assert "onnxruntime-twice" not in broken(found)


def test_tensorrt_of_another_major_version_than_the_provider_opens(
    site_packages: Path, compile_library: Callable[..., Path]
) -> None:
    """A provider library that is linked as onnxruntime-gpu's is."""
    add_onnxruntime(site_packages)
    capi = site_packages / "onnxruntime" / "capi"
    infer = compile_library("libnvinfer.so.10", "int infer;", "-Wl,-soname,libnvinfer.so.10")
    shared = compile_library(
        "libonnxruntime_providers_shared.so", "int host;", "-Wl,-soname,libonnxruntime_providers_shared.so", folder=capi
    )
    linked = ("-Wl,--no-as-needed", str(infer), str(shared))
    compile_library("libonnxruntime_providers_tensorrt.so", "int provider;", *linked, folder=capi)
    add_metadata(site_packages, {"onnxruntime-gpu": "1.31.1", "tensorrt": "11.4.0.106"})
    found = examine()
    (provider,) = (each for each in found.providers if each.name == "tensorrt")
    assert provider.needed[0] == "libnvinfer.so.10"
    assert provider.missing["libnvinfer.so.10"] is None
    assert "libonnxruntime_providers_shared.so" not in provider.needed, "it lies beside the provider"
    assert broken(found)["tensorrt-major"].problem.startswith("TensorRT 11.4.0.106 is installed")

    by_pip = site_packages / "tensorrt_libs"
    by_pip.mkdir()
    shutil.move(infer, by_pip)
    (provider,) = (each for each in examine().providers if each.name == "tensorrt")
    assert provider.missing["libnvinfer.so.10"] == str(by_pip)


def test_a_torchvision_that_is_for_another_torch(site_packages: Path) -> None:
    (site_packages / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    add_metadata(site_packages, {"torchvision": "0.28.0"})
    found = broken(examine())["torchvision-import"]
    assert "torchvision 0.28.0 cannot be imported" in found.problem
    assert "RuntimeError: operator torchvision::nms does not exist" in found.problem


@pytest.mark.usefixtures("without_library")
def test_a_machine_without_our_libraries(site_packages: Path) -> None:
    add_onnxruntime(site_packages)
    found = examine()
    assert found.libraries == ()
    assert found.onnxruntime.takes_library is None
    assert "library-missing" in {finding.name for finding in diagnose(found).findings}


def test_a_library_whose_entry_point_has_another_name(built_here: Path, require: Callable[[str], None]) -> None:
    require("native")
    require("ort")
    content = libraries.library_path().read_bytes()
    assert b"RegisterCustomOps\0" in content
    (built_here / libraries.ORT_LIBRARY).write_bytes(content.replace(b"RegisterCustomOps\0", b"RegisterCustomOpz\0"))
    found = examine()
    assert found.onnxruntime.takes_library is False
    assert "RegisterCustomOps" in str(found.onnxruntime.library_problem)
    assert set(broken(found)) == {"library-not-ours"}


def test_a_library_that_was_cut_short(built_here: Path, require: Callable[[str], None]) -> None:
    require("native")
    content = libraries.library_path().read_bytes()
    (built_here / libraries.ORT_LIBRARY).write_bytes(content[: len(content) // 2])
    found = examine()
    assert found.onnxruntime is None or found.onnxruntime.takes_library is None, "who opens it dies of it"
    assert set(broken(found)) == {"library-unreadable"}


def test_a_library_of_which_onnxruntime_dies(
    site_packages: Path, built_here: Path, compile_library: Callable[..., Path]
) -> None:
    add_onnxruntime(site_packages, registration="import ctypes; ctypes.CDLL(path).RegisterCustomOps()")
    source = "#include <stdlib.h>\nint RegisterCustomOps(void) { abort(); }"
    compile_library(libraries.ORT_LIBRARY, source, folder=built_here)
    found = examine()
    assert (found.onnxruntime.version, found.onnxruntime.problem) == ("1.32.0", None)
    assert set(broken(found)) == {"onnxruntime-library"}
    assert "SIGABRT" in broken(found)["onnxruntime-library"].problem


def test_a_library_that_needs_what_is_not_there(built_here: Path, compile_library: Callable[..., Path]) -> None:
    infer = compile_library("libnvinfer.so.8", "int infer;", "-Wl,-soname,libnvinfer.so.8")
    source = "int getCreators(void) { return 0; } int setLoggerFinder(void) { return 0; }"
    compile_library(libraries.TENSORRT_LIBRARY, source, "-Wl,--no-as-needed", str(infer), folder=built_here)
    infer.unlink()
    found = examine()
    library = found.library(libraries.TENSORRT_LIBRARY)
    assert library is not None
    assert "libnvinfer.so.8" in library.needed
    assert "libnvinfer.so.8" in broken(found)["library-does-not-load"].problem


def test_all_libraries_as_they_are_built(
    built_here: Path, cuda_libraries: Path, require: Callable[[str], None]
) -> None:
    require("ort")
    for library in cuda_libraries.glob("*.so"):
        shutil.copy2(library, built_here)
    found = examine()
    assert tuple(library.name for library in found.libraries) == tuple(row.file for row in libraries.LIBRARIES.values())
    operators, training, plugin, register = found.libraries
    for library in found.libraries:
        assert (library.origin, library.problem, library.outdated) == ("built here", None, False)
        assert not [name for name in library.needed if "nv" in name or "cuda" in name or "onnxruntime" in name]
    assert set(plugin.exports) == {"getCreators", "setLoggerFinder"}
    assert [code.name for code in plugin.code] == ["compute_90"]
    assert operators.code == training.code == plugin.code
    assert register.code == ()
    assert not {name for name in broken(found) if name.startswith("library")}


def test_libraries_of_other_sources_are_named(built_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (built_here / libraries.ORT_LIBRARY).write_bytes(b"")
    assert examination_module._stale() == ()
    monkeypatch.setattr("deploynorm.libraries.find.source_digest", lambda: "other sources")
    assert examination_module._stale() == (str(built_here.parent),)


def test_an_installed_library_that_is_older_than_the_sources_of_the_clone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repository, library = tmp_path / "repository", tmp_path / libraries.ORT_LIBRARY
    (repository / "kernels").mkdir(parents=True)
    sources = tmp_path / "plugins"
    sources.symlink_to(repository)
    (sources / "kernels" / "frn.cu").write_text("")
    library.write_bytes(b"")
    built = tmp_path / "cache" / libraries.ORT_LIBRARY
    built.parent.mkdir()
    built.write_bytes(b"")
    monkeypatch.setattr(libraries, "source_folder", lambda: sources)
    monkeypatch.setattr(examination_module, "cache_of_these_sources", lambda: built.parent)
    for age, outdated in ((-10, False), (10, True)):
        changed = library.stat().st_mtime + age
        os.utime(sources / "kernels" / "frn.cu", (changed, changed))
        assert examination_module._library(libraries.ORT_LIBRARY, library).outdated is outdated
        assert not examination_module._library(libraries.ORT_LIBRARY, built).outdated, (
            "its key is that of these sources"
        )
    # Where pip has installed the sources too, their times are those of the installation.
    monkeypatch.setattr(libraries, "source_folder", lambda: repository)
    assert not examination_module._library(libraries.ORT_LIBRARY, library).outdated


def test_remains_of_an_installation_that_was_cut_short(site_packages: Path) -> None:
    expected = examination_module._packages()
    for name in ("~orch-2.13.0.dist-info", "torch-1.0.dist-info", "numpy-.dist-info", "-.dist-info"):
        (site_packages / name).mkdir()
    (site_packages / "numpy-.dist-info" / "METADATA").write_bytes(b"\xff\xfe")
    assert examination_module._packages() == expected
