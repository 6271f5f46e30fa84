"""Which libraries of the cache are loaded: those that are whole, and that only this user could have put there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deploynorm import libraries
from deploynorm.errors import BackendError
from deploynorm.files import sha256
from deploynorm.libraries.find import cache_of_these_sources, installed_library
from deploynorm.libraries.tools import tensorrt_headers
from deploynorm.libraries.trust import SUMS, foreign


@pytest.fixture
def installed(require: Callable[[str], None]) -> Path:
    require("native")
    path = installed_library(libraries.ORT_LIBRARY)
    assert path is not None
    return path


@pytest.fixture
def cached(installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library in a cache, with its hash as a build leaves it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = cache_of_these_sources() / "key"
    folder.mkdir(parents=True)
    library = folder / libraries.ORT_LIBRARY
    shutil.copyfile(installed, library)
    (folder / SUMS).write_text(f"{sha256(library)}  {library.name}\n")
    return library


def assert_passed_over(cached: Path, installed: Path, reason: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"is not used: .*{reason}.*Fix: deploynorm plugins build"):
        assert libraries.find_library() == installed


def test_a_library_that_is_whole_and_ours_is_used(cached: Path) -> None:
    assert libraries.find_library() == cached


def flip(content: bytes) -> bytes:
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


DAMAGED = {
    "a flipped bit": (flip, "is not as it was built"),
    "cut in half": (lambda content: content[: len(content) // 2], "damaged or cut short"),
    "cut by a byte": (lambda content: content[:-1], "damaged or cut short"),
    "empty": (lambda content: b"", "no shared library"),
    "text": (lambda content: b"text" * 1000, "no shared library"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_library_gives_way_to_the_installed_one(damage: str, cached: Path, installed: Path) -> None:
    change, reason = DAMAGED[damage]
    content = change(cached.read_bytes())
    cached.unlink()  # or it would change under a process that has it open
    cached.write_bytes(content)
    assert_passed_over(cached, installed, reason)


@pytest.mark.parametrize("above", range(5))
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_library_that_others_can_replace_is_not_loaded(above: int, mode: int, cached: Path, installed: Path) -> None:
    part = (cached, *cached.parents)[above]
    part.chmod(mode)
    assert_passed_over(cached, installed, f"others may write to {part} ")
    part.chmod(0o755)
    assert libraries.find_library() == cached


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("above", range(3))
def test_a_library_of_another_user_is_not_loaded(above: int, cached: Path, installed: Path) -> None:
    part = (cached, *cached.parents)[above]
    os.chown(part, 12345, -1)
    assert_passed_over(cached, installed, f"{part} belongs to another user")


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "open")
    assert foreign(tmp_path / "link" / "file") is None
    (tmp_path / "open").chmod(0o777)
    assert foreign(tmp_path / "link" / "file") == f"others may write to {tmp_path / 'open'} (chmod go-w)"
    (tmp_path / "open").chmod(0o1777)
    assert foreign(tmp_path / "link" / "file") is None, "as in /tmp, nobody removes what another one has put there"


def test_without_a_home_there_is_no_cache(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert libraries.find_library() == installed
    with pytest.raises(BackendError, match="no home folder"):
        cache_of_these_sources()


def test_a_relative_cache_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_of_these_sources().is_relative_to(Path.home())


def test_a_build_into_a_cache_that_others_may_write_to_is_refused(
    require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require("compiler")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "open"))
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    for build in (libraries.build, lambda: tensorrt_headers(tmp_path / "open")):
        with pytest.raises(BackendError, match=r"others may write to .*open"):
            build()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BackendError, match=r"the folder cannot be made: .*XDG_CACHE_HOME"):
        libraries.build()


def test_a_compiler_that_makes_nothing_is_found_out(
    require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require("compiler")
    lazy = tmp_path / "lazy"
    lazy.write_text("#!/bin/sh\necho lazy 1.0\n")
    lazy.chmod(0o755)
    monkeypatch.setenv("CXX", str(lazy))
    with pytest.raises(BackendError, match=rf"but not with {libraries.ORT_LIBRARY}.*Got .*lazy 1\.0.*Fix: .*CXX"):
        libraries.build(tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]


@pytest.mark.slow
def test_a_build_leaves_the_hashes_of_what_it_made(
    unoptimized_compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", unoptimized_compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = libraries.build()
    sums = dict(reversed(line.split()) for line in (built.library.parent / SUMS).read_text().splitlines())
    assert sums == {path.name: sha256(path) for path in built.libraries}
    assert libraries.find_library() == built.library
