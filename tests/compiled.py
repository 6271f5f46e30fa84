"""What the tests compile, kept for the next run and shared by pytest-xdist's workers.

    PYTHONPATH=. python tests/compiled.py .pytest_cache/d/compiled

compiles what takes longest, ahead of the tests, with no package but CMake; .ci/run does so while pip installs.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from emulated import build_kernels
from unoptimized import build_cuda_libraries

from deploynorm import libraries

BUILDS: Final[Mapping[str, Callable[[Path], object]]] = {
    "emulated": build_kernels,
    "cuda-libraries": build_cuda_libraries,
    "sanitized": partial(libraries.build, sanitize="address,undefined"),
}
"""What is compiled ahead, by the names that the fixtures have for it: what most tests wait for comes first."""

TESTS = Path(__file__).parent


def digest() -> str:
    """Of all sources that the tests compile, and of how."""
    sources = sorted(path for path in libraries.source_folder().rglob("*") if path.is_file())
    sources += sorted(path for path in TESTS.rglob("*") if path.suffix in (".cpp", ".cu", ".h"))
    sources += [TESTS / name for name in ("compiled.py", "emulated.py", "unoptimized.py", "gpu/test_broken.py")]
    hashed = hashlib.sha256()
    for path in sources:
        hashed.update(path.name.encode() + path.read_bytes())
    return hashed.hexdigest()[:16]


def build_once(parent: Path, key: str, build: Callable[[Path], object]) -> Path:
    """A folder that build(folder) has filled. One process builds, those that ask at the same time wait for it.

    Args:
        parent: Holds the folder, and one folder of another key until this one is built.
        key: Says what it is built from.
        build: Fills an empty folder.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = parent / key
        if not folder.is_dir():
            staging = parent / "incomplete"
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            build(staging)
            for other in parent.iterdir():
                if other.is_dir() and other != staging:
                    shutil.rmtree(other)
            staging.rename(folder)
    return folder


if __name__ == "__main__":
    for name, build in BUILDS.items():
        build_once(Path(sys.argv[1]) / name, digest(), build)
