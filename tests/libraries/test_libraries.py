"""Finding and building the operator library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploynorm import libraries
from deploynorm.errors import BackendError
from deploynorm.libraries import tools as plugin_tools
from deploynorm.libraries.compile import cache_key
from deploynorm.libraries.find import cache_of_these_sources
from deploynorm.libraries.tools import CudaTools, find_program


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of built libraries with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "deploynorm" / "plugins"


@pytest.fixture(scope="module")
def compiler(unoptimized_compiler: str) -> Iterator[None]:
    """CMake and a C++ compiler, without which nothing can be built."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CXX", unoptimized_compiler)
        yield


@pytest.fixture(scope="module")
def built_at_once(compiler: None, build_once: Callable[..., Path]) -> Path:
    """A cache in which two processes have built at once."""

    def build(cache: Path) -> None:
        program = "from deploynorm import libraries; print(libraries.cpu_variants(libraries.build().library)[-1])"
        command, environment = [sys.executable, "-c", program], {**os.environ, "XDG_CACHE_HOME": str(cache)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(2)]
        for process in running:
            out, err = process.communicate()
            assert (process.returncode, out.strip()) == (0, "baseline"), err

    return build_once("built-at-once", build)


@pytest.fixture
def full_cache(empty_cache: Path, built_at_once: Path) -> Path:
    """A cache with the libraries that were built from these sources, by this compiler."""
    shutil.copytree(built_at_once, empty_cache.parents[1], dirs_exist_ok=True)
    return empty_cache


def a_path_with(folder: Path, *programs: str) -> str:
    """The value of a PATH on which these programs are, and no others."""
    folder.mkdir()
    for name in programs:
        found = find_program(name)
        assert found is not None, name
        (folder / name).symlink_to(found)
    return str(folder)


def test_the_installation_brings_a_library(empty_cache: Path, require: Callable[[str], None]) -> None:
    require("native")
    library = libraries.library_path()
    assert library.name == libraries.ORT_LIBRARY
    assert not library.is_relative_to(empty_cache)
    assert libraries.cpu_variants(library)[-1] == "baseline"


@pytest.mark.usefixtures("without_library")
def test_a_missing_library_is_an_error_of_the_environment_with_a_remedy() -> None:
    with pytest.raises(BackendError, match=r"not built on this machine\. Fix: .*deploynorm plugins build") as caught:
        libraries.library_path()
    assert caught.value.exit_code == 3


@pytest.mark.slow
def test_what_is_built_here_is_preferred_until_the_sources_change(
    full_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = libraries.library_path()
    assert built.is_relative_to(full_cache)
    assert libraries.cpu_variants(built)[-1] == "baseline"
    monkeypatch.setattr("deploynorm.libraries.find.source_digest", lambda: "other sources")
    assert libraries.find_library() != built


@pytest.mark.usefixtures("compiler")
def test_compiler_and_flags_are_in_the_key(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = libraries.find_tools()
    cuda = CudaTools(Path("nvcc"), "release 13.0")
    keys = {
        cache_key(tools, None, []),
        cache_key(tools._replace(compiler_version="another"), None, []),
        cache_key(tools, None, ["-DDEPLOYNORM_CUDA_ARCHITECTURES=90"]),
        cache_key(tools, cuda, []),
        cache_key(tools, cuda._replace(version="release 12.9"), []),
    }
    monkeypatch.setenv("CXXFLAGS", "-O1")
    keys.add(cache_key(tools, None, []))
    assert len(keys) == 6
    assert {key.parent for key in keys} == {cache_of_these_sources()}


@pytest.mark.slow
def test_processes_that_build_at_once_do_not_break_each_other(full_cache: Path) -> None:
    assert len(list(full_cache.rglob(libraries.ORT_LIBRARY))) == 1
    found = {path.name for path in libraries.library_path().parent.iterdir()}
    assert found == {libraries.ORT_LIBRARY, libraries.TORCH_LIBRARY, "SHA256SUMS"}


@pytest.mark.slow
@pytest.mark.usefixtures("full_cache")
def test_a_library_in_use_survives_a_new_build() -> None:
    library = libraries.library_path()
    before = library.stat()
    program = (
        "import sys; from pathlib import Path; from deploynorm import libraries; path = Path(sys.argv[1])\n"
        "first = libraries.cpu_variants(path); print(libraries.build())\n"
        "assert libraries.cpu_variants(path) == first\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert library.stat().st_ino != before.st_ino
    tools = libraries.find_tools()
    for part in (tools.compiler, tools.compiler_version, tools.cmake, library):
        assert str(part) in done.stdout, "the build names what it was made with"


@pytest.mark.usefixtures("compiler")
def test_without_a_compiler_or_cmake_a_build_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match="Got CXX=no-such-compiler"):
        libraries.build(tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", a_path_with(tmp_path / "bin", "cmake"))
    with pytest.raises(BackendError, match=r"no C\+\+ compiler found\. Fix: install g\+\+ or clang\+\+"):
        libraries.build(tmp_path)
    monkeypatch.setattr(plugin_tools, "find_program", lambda name: None)
    with pytest.raises(BackendError, match=r"CMake is not installed\. Fix: pip install cmake ninja"):
        libraries.build(tmp_path)


@pytest.mark.usefixtures("compiler")
def test_a_build_that_fails_shows_the_compilers_words_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-include nonsense_here.h")
    with pytest.raises(BackendError, match=r"cmake failed with exit code \d+") as caught:
        libraries.build(tmp_path / "out")
    assert "nonsense_here.h" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / libraries.ORT_LIBRARY
    path.write_text("text")
    with pytest.raises(BackendError, match=r"cannot be loaded.*Fix: deploynorm plugins build"):
        libraries.cpu_variants(path)


@pytest.mark.usefixtures("compiler")
def test_an_installation_without_a_compiler_configures_and_builds_nothing(tmp_path: Path) -> None:
    """What pip runs: it must end well, so that the Python package is installed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    environment["PATH"] = a_path_with(tmp_path / "bin", "cmake", "ninja")
    command = ["cmake", "-S", str(libraries.source_folder()), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stderr
    assert "deploynorm plugins build" in done.stderr
    build, prefix = str(tmp_path / "build"), str(tmp_path / "in")
    for arguments in (["--build", build], ["--install", build, "--prefix", prefix]):
        subprocess.run(["cmake", *arguments], check=True, capture_output=True, env=environment)
    assert not list(tmp_path.rglob("*.so"))


def test_without_nvcc_a_build_with_cuda_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    with pytest.raises(BackendError, match=r"no CUDA compiler .* Got CUDACXX=.*Fix: pip install 'deploynorm"):
        libraries.find_cuda()
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setattr(plugin_tools, "find_program", lambda name: None)
    with pytest.raises(BackendError, match="no CUDA compiler found"):
        libraries.find_cuda()


HEADERS_REFUSED = {
    "a folder without headers": r"TENSORRT_INCLUDE_DIR has no NvInferRuntime\.h\. Got .*Fix: name the folder",
    "pip fails": r"pip cannot get TensorRT's headers \(kernel-lens==2\.0\.1\)\. Got no such package\.",
    "another file": r"kernel\.whl is not the file that is known\. Got \w{64}; expected \w{64}",
}


@pytest.mark.parametrize("case", HEADERS_REFUSED)
def test_headers_that_cannot_be_had_are_an_error_with_a_remedy(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if case == "pip fails":
            return subprocess.CompletedProcess(command, 1, "", "ERROR\nno such package\n")
        (Path(command[command.index("-d") + 1]) / "kernel.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    if case == "a folder without headers":
        monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    else:
        monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    with pytest.raises(BackendError, match=HEADERS_REFUSED[case]) as caught:
        plugin_tools.tensorrt_headers(tmp_path / "cache")
    assert caught.value.fix is not None
    assert not list(tmp_path.rglob("*.h"))


def test_headers_are_unpacked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "kernel.whl", "w") as wheel:
            wheel.writestr("kernel_lens/include/tensorrt/NvInferRuntime.h", "// a header")
            wheel.writestr("kernel_lens/core.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(plugin_tools, "sha256", lambda path: plugin_tools.HEADERS_SHA256)
    for _ in range(2):
        folder = plugin_tools.tensorrt_headers(tmp_path)
        assert [path.name for path in folder.iterdir()] == ["NvInferRuntime.h"]
    assert len(calls) == 1
