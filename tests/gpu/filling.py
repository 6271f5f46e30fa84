"""Fills a folder with what tests/gpu/prove needs on a machine without a package index, and prints the sizes.

    tests/gpu/fill [FOLDER] [--python 3.12] [--architecture 90]

Run it where pip reaches a package index, from an environment that has deploynorm's requirements. Send the folder, by
default build/prove/parts in the clone, or as many of its parts as fit, first part1: what is worth most lies in front.

    headers  TensorRT's, for the plugin
    wheels   requirements of deploynorm and pytest, of which the machine takes what it lacks
    rtx      TensorRT-RTX 1.6.1 with the ONNX parser of 1.7.1: the last core that does not refuse Hopper by name, and
             the first parser that takes plugins. That is a mix which NVIDIA does not support, for an experiment.
    ort      onnxruntime-gpu without its TensorRT provider and without the device code of other GPUs
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from parts import pack  # noqa: E402
from prune import prune  # noqa: E402

from deploynorm.libraries.tools import tensorrt_headers  # noqa: E402

# Not torch, nor what it brings: the machine has it.
WHEELS = ("ml_dtypes", "onnx", "onnx-ir", "onnxscript", "protobuf", "typing_extensions",
          "rich", "markdown-it-py", "mdurl", "pygments",
          "pytest", "pytest-xdist", "execnet", "iniconfig", "packaging", "pluggy")  # fmt: skip

CORE, PARSER = "1.6.1.120", "1.7.1.116"  # versions of TensorRT-RTX
ONNXRUNTIME = "1.31.1"

_MANYLINUX = ("2014", "_2_17", "_2_24", "_2_26", "_2_27", "_2_28")
_PARSER = "tensorrt_rtx_libs/libtensorrt_onnxparser_rtx.so.1"
_CUDA_PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
_LEFT_OUT = ("onnxruntime/capi/libonnxruntime.so", "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
             "onnxruntime/transformers/", "onnxruntime/tools/", "onnxruntime/quantization/")  # fmt: skip


def download(folder: Path, python: str, *packages: str) -> list[Path]:
    """Wheels of these packages, and of nothing that they require, for that Python on Linux on x86-64."""
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    words += ["--implementation", "cp", "--python-version", python]
    for tag in _MANYLINUX:
        words += ["--platform", f"manylinux{tag}_x86_64"]
    subprocess.run([*words, *packages], check=True)
    return sorted(folder.glob("*.whl"))


def extract(wheels: list[Path], into: Path, *, only: str = "", without: tuple[str, ...] = ()) -> None:
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(only)]
            wheel.extractall(into, [name for name in names if not (without and name.startswith(without))])


def fill_rtx(folder: Path, work: Path, python: str) -> None:
    core = (f"tensorrt_rtx_cu13_libs=={CORE}", f"tensorrt_rtx_cu13_bindings=={CORE}")
    extract(download(work / "core", python, *core), folder)
    extract(download(work / "parser", python, f"tensorrt_rtx_cu13_libs=={PARSER}"), folder, only=_PARSER)
    # Their package tensorrt_rtx is no wheel, but a program that fetches these two.
    (folder / "tensorrt_rtx.py").write_text(
        "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"
    )


def fill_onnxruntime(folder: Path, work: Path, python: str, architecture: int) -> None:
    wheels = download(work, python, f"onnxruntime-gpu=={ONNXRUNTIME}")
    extract(wheels, folder, without=_LEFT_OUT)
    provider = folder / _CUDA_PROVIDER
    zeroed = prune(provider, provider, architecture)
    print(f"ort: of {provider.name}, {_mib(provider.stat().st_size)}, {_mib(zeroed)} are for other GPUs", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/gpu/fill", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=ROOT / "build" / "prove" / "parts", help="for the parts"
    )
    parser.add_argument("--python", default="3.12", help="the other machine's (default: 3.12)")
    parser.add_argument("--architecture", type=int, default=90, help="of its GPU (default: 90)")
    options = parser.parse_args()
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as temporary:
        work = Path(temporary)
        pieces = {name: work / "pieces" / name for name in ("headers", "wheels", "rtx", "ort")}
        shutil.copytree(tensorrt_headers(work / "cache"), pieces["headers"])
        constrained = [f"{name}{_version(name)}" for name in WHEELS]
        download(pieces["wheels"], options.python, *constrained)
        fill_rtx(pieces["rtx"], work, options.python)
        fill_onnxruntime(pieces["ort"], work / "ort", options.python, options.architecture)
        before = {name: sum(path.stat().st_size for path in piece.rglob("*")) for name, piece in pieces.items()}
        print("packing, which takes some minutes", flush=True)
        for name, size in pack(pieces, options.folder).items():
            print(f"{name:>8}: {_mib(before[name])}, packed {_mib(size)}")
    for part in sorted(options.folder.iterdir()):
        print(f"{part}: {_mib(part.stat().st_size)}")


def _version(name: str) -> str:
    """As "==1.2" of constraints.txt, which names it for several Pythons where they differ, the newest first."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = (line.partition(";")[0] for line in lines if line.startswith(f"{name}=="))
    return next(found, "").strip().removeprefix(name)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
