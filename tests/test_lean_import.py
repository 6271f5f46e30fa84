"""What an import costs: an optional package is imported only by the file that needs it, when it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deploynorm

PACKAGE = Path(deploynorm.__file__).parent
MODULES = sorted(
    ".".join(("deploynorm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)
OPTIONAL = ("onnxruntime", "tensorrt", "tensorrt_rtx", "triton", "timm", "PIL", "matplotlib", "sklearn")


def _run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_package_alone_imports_nothing() -> None:
    heavy = (*OPTIONAL, "torch", "numpy", "onnx", "rich")
    _run(f"import sys, deploynorm; found = {set(heavy)!r} & set(sys.modules); assert not found, found")


def test_every_module_imports_without_the_optional_packages() -> None:
    """In one process where each optional package is as if it were not installed."""
    _run(
        "import importlib, sys\n"
        f"for name in {OPTIONAL!r}: sys.modules[name] = None\n"
        f"for name in {MODULES!r}: importlib.import_module(name)\n"
    )


def test_functions_of_the_package_are_not_hidden_by_the_modules_they_live_in() -> None:
    _run(
        "import deploynorm._fold, deploynorm._export, deploynorm._check\n"
        "import deploynorm\n"
        "from deploynorm._fold import FoldResult\n"
        "from deploynorm._export import Exported\n"
        "assert all(callable(f) for f in (deploynorm.fold, deploynorm.export, deploynorm.check))\n"
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
