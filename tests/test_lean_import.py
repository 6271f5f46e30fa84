"""What is needed: an import brings no package that it can do without, and a serving environment has few of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from graphs import CHANNELS, frn_model

import deploynorm

PACKAGE = Path(deploynorm.__file__).parent
MODULES = sorted(
    ".".join(("deploynorm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)
OPTIONAL = (
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "triton",
    "timm",
    "PIL",
    "matplotlib",
    "sklearn",
    "onnx_graphsurgeon",
    "openvino",
    "ncnn",
    "MNN",
)


def _run(program: str, *arguments: object, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A program in a process where these packages are as if they were not installed."""
    hide = f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", hide + program, *map(str, arguments)], capture_output=True, text=True)


def _succeeds(program: str, *arguments: object, absent: tuple[str, ...] = ()) -> str:
    done = _run(program, *arguments, absent=absent)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = (*OPTIONAL, "torch", "numpy", "onnx", "rich")
LEAN = {
    "import deploynorm": HEAVY,
    "import deploynorm.run": ("torch", "onnx", "onnxruntime"),
    "import deploynorm.reference": tuple(name for name in HEAVY if name != "numpy"),
    "from deploynorm.doctor import diagnose, examine; diagnose(examine())": HEAVY,
}


@pytest.mark.parametrize(("program", "absent"), LEAN.items(), ids=LEAN)
def test_what_is_not_needed_is_not_imported(program: str, absent: tuple[str, ...]) -> None:
    _succeeds(f"{program}\nfound = {set(absent)!r} & set(sys.modules)\nassert not found, found")


def test_every_module_imports_without_the_optional_packages_and_hides_no_function_of_the_package() -> None:
    _succeeds(
        f"import importlib, deploynorm\nfor name in {MODULES!r}: importlib.import_module(name)\n"
        "assert all(callable(f) for f in (deploynorm.fold, deploynorm.export, deploynorm.check))\n",
        absent=OPTIONAL,
    )


@pytest.mark.parametrize("name", deploynorm.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(deploynorm, name) is not None


def test_type_checkers_see_the_names_that_are_there() -> None:
    """The block under TYPE_CHECKING and the table that imports at run time: one list for two readers."""
    tree = ast.parse(Path(deploynorm.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == deploynorm._HOME


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = deploynorm.no_such_name


ABSENT = ("torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "google.protobuf", "google")
"""What a serving environment lacks: it has onnxruntime, numpy and rich."""
NEEDED = "this package is needed here, and is not installed. Fix: pip install "


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(frn_model(body=True).SerializeToString())
    return path


def test_a_session_needs_onnxruntime_and_numpy_only(model: Path, require: Callable[[str], None]) -> None:
    require("ort")
    shape = _succeeds(
        "import numpy, deploynorm.ort\n"
        "session = deploynorm.ort.session(sys.argv[1], plugins=[])\n"
        f"x = numpy.ones((1, {CHANNELS}, 2, 2), numpy.float32)\n"
        "print(session.run(None, {'X': x})[0].shape)\n",
        model,
        absent=ABSENT,
    )
    assert shape == f"(1, {CHANNELS}, 2, 2)\n"


@pytest.mark.parametrize("name", ["load", "export", "convert", "build"])
def test_a_function_that_needs_more_names_the_package(name: str) -> None:
    program = f"import deploynorm\ntry: deploynorm.{name}\nexcept deploynorm.BackendError as error: print(error)\n"
    assert NEEDED in _succeeds(program, absent=ABSENT)


def _verb(verb: str, model: Path, absent: tuple[str, ...] = ABSENT) -> subprocess.CompletedProcess[str]:
    """One verb of the command line on the model, and what else it asks for."""
    np.save(model.with_suffix(".npy"), np.ones((1, CHANNELS, 2, 2), np.float32))
    rest = {"run": [model.with_suffix(".npy")], "check": [model], "rewrite": ["--optimize-for-cpu"]}.get(verb, [])
    return _run("from deploynorm.cli import main; sys.exit(main())", verb, model, *rest, absent=absent)


@pytest.mark.parametrize("verb", ["run", "check", "inspect", "build", "rewrite"])
def test_a_verb_that_needs_more_names_the_package(verb: str, model: Path) -> None:
    done = _verb(verb, model)
    assert done.returncode == 3, done.stderr
    assert NEEDED in done.stderr
    assert "fault of deploynorm" not in done.stderr


@pytest.mark.parametrize("verb", ["run", "inspect"])
def test_a_file_runs_and_is_shown_without_torch(verb: str, model: Path, require: Callable[[str], None]) -> None:
    require("ort")
    done = _verb(verb, model, absent=("torch",))
    assert done.returncode == 0, done.stderr
