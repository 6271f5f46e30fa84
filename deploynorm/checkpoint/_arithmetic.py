"""Which Python expressions of a torch.export program are certain to be arithmetic on sizes: torch evaluates them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

__all__ = ["plain_guard", "plain_size"]

_SYMPY = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Abs|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|FloatTrueDiv"
    "|ModularIndexing|Identity|Where|ToFloat|CeilToInt|FloorToInt|RoundToInt|TruncToInt|TruncToFloat"
    "|Equality|Unequality|StrictLessThan|StrictGreaterThan|LessThan|GreaterThan|And|Or|Not"
)
_PYTHON = re.compile(
    r"(max|min|abs|round|Eq|Ne|Max|Min|Mod|FloorDiv|PythonMod|CeilToInt|FloorToInt|TruncToInt)"
    r"|math\.(trunc|floor|ceil|sqrt)|torch\.sym_(float|int|max|min|not|ite)"
)
_SIZE = re.compile(r"L(\['\w+'\]|\[\d+\])+\.(size\(\)|stride\(\))\[\d+\]", re.ASCII)


def plain_size(text: str) -> str | None:
    """A size as sympy's srepr writes it, Add(Symbol('s53', positive=True), Integer(-3)); None if text is more."""
    return _checked(text, _is_sympy)


def plain_guard(text: str) -> str | None:
    """A comparison of input sizes, (1 + (((-3) + L['x'].size()[3]) // 2)) != 1; None if text is more."""
    return _checked(text, _is_python)


def _checked(text: str, is_plain: Callable[[ast.expr], bool]) -> str | None:
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    # Written anew, for torch pastes guards between others: no comments, no line breaks.
    return ast.unparse(tree) if is_plain(tree) else None


def _is_sympy(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=str(text)):  # sympy evaluates text wherever it meets it
            return re.fullmatch(r"[a-z]+[0-9]+|-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?", text) is not None
        case ast.Constant():
            return isinstance(node.value, int | float)
        case ast.Name():
            return re.fullmatch(r"[a-z]+[0-9]+|true|false", node.id) is not None
        case ast.UnaryOp():
            return _is_sympy(node.operand)
        case ast.Call(func=ast.Name(id=name)):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            # A tower of powers would keep sympy busy for ever.
            tame = name != "Pow" or re.fullmatch(r"Integer\(-?[0-9]\)", ast.unparse(node.args[-1])) is not None
            return _SYMPY.fullmatch(name) is not None and tame and all(map(_is_sympy, arguments))
    return False


def _is_python(node: ast.expr) -> bool:
    match node:
        case ast.Constant():
            return isinstance(node.value, int | float)
        case ast.Subscript():
            return _SIZE.fullmatch(ast.unparse(node)) is not None
        case ast.UnaryOp():
            return _is_python(node.operand)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod()):
            return _is_python(node.left) and _is_python(node.right)
        case ast.BoolOp():
            return all(map(_is_python, node.values))
        case ast.Compare():
            return all(map(_is_python, (node.left, *node.comparators)))
        case ast.Call(keywords=[]):
            return _PYTHON.fullmatch(ast.unparse(node.func)) is not None and all(map(_is_python, node.args))
    return False
