"""The pass of `surgery`: what a function of the user's does to the graph, with onnx-graphsurgeon."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from deploynorm import gs as _registered  # noqa: F401  # which gives the graph its method frn
from deploynorm.changes import Change
from deploynorm.errors import InputError, ModelError
from deploynorm.onnx_file import node_counts
from deploynorm.quiet import first_line
from deploynorm.rewrite.graphsurgeon import Operation
from deploynorm.rewrite.intake import unchanged
from deploynorm.rewrite.result import RewriteResult

if TYPE_CHECKING:
    import onnx_ir as ir

_EXPECTED: Final = "FILE.py:FUNCTION"


def surgery(model: ir.Model, named: str, *, source_sha256: str | None = None) -> RewriteResult:
    """Calls a function of the user's with the graph; what it leaves, sorted and without unused nodes, is the result.

    Args:
        model: Any graph, which is raised to opset 18 where it is earlier. It is left untouched.
        named: FILE.py:FUNCTION. The file is run, as `python FILE.py` would. The function takes an
            onnx_graphsurgeon.Graph, which has `deploynorm.gs.frn` as its method, and changes it.
        source_sha256: Not used.

    Raises:
        InputError: There is no such file or function.
        ModelError: The function raises, returns another thing than None or the graph, or leaves no valid graph; the
            opset cannot be raised.
        BackendError: onnx-graphsurgeon is not installed.
    """
    name, colon, function_name = named.rpartition(":")
    path = Path(name)
    if not (colon and name and function_name.isidentifier()):
        raise InputError("surgery", "no function is named", got=repr(named), expected=_EXPECTED)
    if not path.is_file():
        raise InputError("surgery", "no such file", got=name, expected=_EXPECTED)
    operation = Operation(model)
    file = str(path.absolute())  # which Python finds from any working directory, to read a line
    with _loaded(path, file) as module:
        function: Callable[[Any], object] | None = getattr(module, function_name, None)
        if not callable(function):
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            got = f"functions {', '.join(own)}" if own else "a file without functions"
            raise InputError("surgery", f"{path} has no function {function_name}", got=got)
        with _naming_the_line(path, file):
            returned = function(operation.graph)
    if returned is not None and returned is not operation.graph:
        expected = "None or the graph that it was given"
        where, got = f"{path}:{function_name}", type(returned).__name__
        raise ModelError(where, "it returns another thing", got=got, expected=expected)
    result, changed = operation.result()
    if not changed:
        return unchanged(model, [Change(named, "surgery", "unchanged", detail="the function changed nothing")])
    before, after = (node_counts(each.graph.all_nodes()) for each in (model, result))
    gone, new = sum((before - after).values()), sum((after - before).values())
    became = f"a graph with {new} other nodes in place of {gone}"
    return RewriteResult(result, (Change(named, function_name, "rewritten", became=became),), before, after)


@contextmanager
def _loaded(path: Path, file: str) -> Iterator[ModuleType]:
    """The module that a file is, which may import what lies beside it."""
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    # All of which the user's code may change.
    folder, search, before = Path.cwd(), [*sys.path], sys.modules.get(path.stem)
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[path.stem] = module
    try:
        with _naming_the_line(path, file):
            exec(compile(path.read_bytes(), file, "exec"), vars(module))
        yield module
    finally:
        os.chdir(folder)
        sys.path[:] = search
        sys.modules.pop(path.stem, None)
        if before is not None:
            sys.modules[path.stem] = before


@contextmanager
def _naming_the_line(path: Path, file: str) -> Iterator[None]:
    """Turns what the user's code raises into an error that names the line in the user's file."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        calls = [call for call in traceback.extract_tb(error.__traceback__) if call.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else calls[-1].lineno if calls else None
        code = (error.text if isinstance(error, SyntaxError) else calls[-1].line if calls else None) or ""
        where = str(path) if line is None else f"{path}, line {line}"
        problem = f"{code.strip()}: {type(error).__name__}: {first_line(error)}".removeprefix(": ")
        raise ModelError(where, problem) from error
