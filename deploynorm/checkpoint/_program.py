"""The JSON of a torch.export program, and which forms of it are certain to be no code, and to end.

Loading it evaluates size expressions (sympy.sympify), imports modules that tree specs name, looks up any function
under `torch` that a node names, and compiles guards and node names as Python source. Running it calls the operators,
some of which trust their arguments (see _operators.py), and computes sizes with integers that know no bound.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable
from typing import Any

from deploynorm.checkpoint._operators import TRAINING, WEIGHT_NORM, find_operator

MOST_NODES = 100_000
MOST_SYMBOLS = 256
_MOST_TERMS = 2_000
"""Of one size or guard."""
_MOST_CHOICES = 32
"""How often one size may take Max or Min: sympy compares each of their arguments with each other one."""
_MOST_DEGREE = 32
"""How many sizes may be multiplied with one another. A tower of powers would keep Python busy for ever."""


class RefusedError(Exception):
    """A part of an archive, `got`, is not known to be harmless."""

    def __init__(self, problem: str, got: object = None, *, fix: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.got = got
        self.fix = fix


def clean(value: Any, field: str = "") -> Any:
    """A copy of a part of the program's JSON, in which every string has the form that its field asks for.

    RefusedError if one has not, or a number has more than 64 bits.
    """
    if field in _RULES:
        return _RULES[field](value, field)
    if isinstance(value, dict):
        if isinstance(value.get("target"), str):
            _refuse_training(value)
        # Fields of the schema and names from the graph are distinguished by the field that holds them.
        named = field in _TABLES
        if field == "range_constraints":  # torch also lists sizes that follow from others, as 2*s81
            value = {key: item for key, item in value.items() if _KEY.fullmatch(key)}
        return {_matching(key, "key", _KEY): clean(item, "" if named else key) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item, field) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise RefusedError(f"a {field or 'value'} of the program has more than 64 bits", f"{value:.3e}")
    return _matching(value, field, _NAME) if isinstance(value, str) else value


def check_extent(program: Any) -> None:
    """RefusedError for a program, as `clean` returns it, with more nodes, symbols or products of sizes than any has."""
    nodes = program["graph_module"]["graph"]["nodes"]
    symbols = set(re.findall(r"Symbol\('(\w+)'", json.dumps(program)))
    for what, got, most in (("nodes", len(nodes), MOST_NODES), ("symbols", len(symbols), MOST_SYMBOLS)):
        if got > most:
            raise RefusedError(f"the program has too many {what}", f"{got:,}, and at most {most:,} are read")
    degrees: dict[str, float] = {}
    for node in nodes:
        operator = node["target"].removeprefix("_operator.")
        if operator == node["target"]:
            continue
        arguments = [_degree(item["arg"], degrees) for item in node["inputs"]]
        exponent = node["inputs"][-1]["arg"].get("as_int", _MOST_DEGREE + 1) if operator == "pow" else 1
        degree = sum(arguments) if operator == "mul" else max(arguments, default=1) * max(exponent, 1)
        if degree > _MOST_DEGREE:
            raise RefusedError("the program multiplies too many sizes", node["target"])
        degrees.update((name, degree) for output in node["outputs"] for name in _names(output))


def _degree(argument: Any, degrees: dict[str, float]) -> float:
    return max((degrees.get(name, 1) for name in _names(argument)), default=1)


def _names(argument: Any) -> list[str]:
    """The names in an argument or output of a node: {"as_sym_int": {"as_name": "add"}}."""
    if isinstance(argument, dict | list):
        items = argument.values() if isinstance(argument, dict) else argument
        return [name for item in items for name in _names(item)]
    return [argument] if isinstance(argument, str) else []


_TABLES = (
    "as_string_to_argument",
    "config",
    "opset_version",
    "range_constraints",
    "sym_bool_values",
    "sym_float_values",
    "sym_int_values",
    "tensor_values",
)
_KEY = _PATH = re.compile(r"[\w.:-]*", re.ASCII)
_NAME = re.compile(r"\w*", re.ASCII)
_TEXT = re.compile(r"[^\x00-\x08\x0b-\x1f\x7f]{0,1000}")
_FLOAT = re.compile(r"-?Infinity|NaN")


def _matching(value: Any, field: str, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str) and not pattern.fullmatch(value):
        raise RefusedError(f"a {field or 'value'} of the program is not a plain name or value", repr(value[:80]))
    return value


def _strings(pattern: re.Pattern[str]) -> Callable[[Any, str], Any]:
    def rule(value: Any, field: str) -> Any:
        if isinstance(value, list):
            return [rule(item, field) for item in value]
        if isinstance(value, dict):
            raise RefusedError(f"a {field} of the program is not a value", value)
        return _matching(value, field, pattern)

    return rule


def _refuse(value: Any, field: str) -> Any:
    if value:
        raise RefusedError(f"the program holds more than operators and tensors ({field})")
    return value


def _strided(value: Any, field: str) -> Any:
    if value != _STRIDED:
        raise RefusedError("the program holds tensors that are not dense", f"layout {value}")
    return value


_STRIDED = 7
"""torch._export.serde.schema.Layout.Strided."""


def _operator(value: Any, field: str) -> str:
    name = str(value)
    if _ARITHMETIC.fullmatch(name):
        return name
    if name == "torch.ops.higher_order.wrap_with_set_grad_enabled":
        fix = "call model.eval() before torch.export.export; where forward has torch.no_grad() itself, leave it out"
        raise RefusedError("the program switches gradients off inside, as layers in training mode do", fix=fix)
    parts = re.fullmatch(r"torch\.ops\.(aten|prims|deploynorm)\.(\w+)\.(\w+)", name, re.ASCII)
    if parts is None:
        raise RefusedError("the program calls a function that is not an ATen or deploynorm operator", name)
    if find_operator(*parts.groups()) is None:
        problem = "the program calls an operator that is not among those of networks in evaluation"
        raise RefusedError(problem, name)
    return name


def _refuse_training(node: dict[str, Any]) -> None:
    """RefusedError for a node whose operator is not admitted, and is one that only training, or weight_norm, calls."""
    name = node["target"].removeprefix("torch.ops.aten.").partition(".")[0]
    if name not in TRAINING | WEIGHT_NORM:
        return
    outputs = [output for output in _names(node.get("outputs", {})) if _NAME.fullmatch(output)]
    place = name + (f" (node {outputs[0]})" if outputs else "")
    if name in TRAINING:
        problem, fix = "traced in training mode", "call model.eval() before torch.export.export"
        raise RefusedError(f"{problem}: {place} normalizes by the statistics of the batch", fix=fix)
    fix = "call torch.nn.utils.remove_weight_norm, or parametrize.remove_parametrizations, before torch.export.export"
    raise RefusedError(f"a weight is computed anew in each call, as for training: {place}", fix=fix)


_ARITHMETIC = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|getitem)"
    r"|math\.(trunc|ceil|floor)|torch\.sym_(not|int|float|ite|max|min|sqrt)"
)


def _plain(value: object, check: Callable[[str], str | None], problem: str) -> str:
    text = check(str(value))
    if text is None:
        raise RefusedError(problem, repr(str(value)[:80]))
    return text


def _size(value: Any, field: str) -> str:
    return _plain(value, plain_size, "a size of the program is not plain arithmetic")


def _guards(value: Any, field: str) -> list[str]:
    return [_plain(guard, plain_guard, "a guard of the program does more than compare sizes") for guard in value]


def _tree(value: Any, field: str) -> str:
    protocol, tree = json.loads(value)
    return json.dumps([int(protocol), _clean_tree(tree)])


def _clean_tree(tree: Any) -> dict[str, Any]:
    kind = tree["type"]
    if kind is None:
        return {"type": None, "context": None, "children_spec": []}
    if kind not in ("builtins.tuple", "builtins.list", "builtins.dict"):
        raise RefusedError("inputs or outputs are not tensors, tuples, lists and dicts of tensors", repr(kind))
    keys = _strings(_PATH)(json.loads(tree["context"]), "key")
    return {"type": kind, "context": json.dumps(keys), "children_spec": [*map(_clean_tree, tree["children_spec"])]}


_RULES: dict[str, Callable[[Any, str], Any]] = {
    # Provenance and old forms of tree specs: nothing that later stages need.
    **dict.fromkeys(("metadata", "treespec_namedtuple_fields", "torch_version"), lambda value, field: type(value)()),
    **dict.fromkeys(
        ("as_graph", "as_operator", "as_custom_obj", "custom_obj", "custom_obj_values", "use_pickle"), _refuse
    ),
    **dict.fromkeys(
        ("device", "as_device"), lambda value, field: None if value is None else {"type": "cpu", "index": None}
    ),
    **dict.fromkeys(("layout", "as_layout"), _strided),
    **dict.fromkeys(("in_spec", "out_spec"), _tree),
    **dict.fromkeys(("as_string", "as_strings"), _strings(_TEXT)),
    **dict.fromkeys(("as_float", "as_floats", "as_float_lists"), _strings(_FLOAT)),
    **dict.fromkeys(("fqn", "parameter_name", "buffer_name", "tensor_constant_name"), _strings(_PATH)),
    "target": _operator,
    "expr_str": _size,
    "guards_code": _guards,
}


# Which Python expressions of a program are certain to be arithmetic on sizes: torch evaluates them.

_SYMPY = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Abs|Max|Min"
    "|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|FloatTrueDiv"
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
    if len(text) > 20 * _MOST_TERMS:
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    nodes = list(ast.walk(tree))
    choices = sum(isinstance(node, ast.Call) and _called(node).lower() in ("max", "min") for node in nodes)
    if len(nodes) > _MOST_TERMS or choices > _MOST_CHOICES or _powers(tree) > _MOST_DEGREE:
        return None
    # Written anew, for torch pastes guards between others: no comments, no line breaks.
    return ast.unparse(tree) if is_plain(tree) else None


def _called(call: ast.Call) -> str:
    """Name of the function: max, Max, torch.sym_max."""
    return ast.unparse(call.func).rpartition(".")[2].removeprefix("sym_")


def _powers(node: ast.AST) -> float:
    """How many sizes and numbers are multiplied in an expression at most; infinite where an exponent is no number."""
    below = [_powers(child) for child in ast.iter_child_nodes(node)]
    if isinstance(node, ast.Constant | ast.Name):
        return 1
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return sum(below)
    if isinstance(node, ast.Call) and _called(node) == "Mul":
        return sum(below[1:])
    if isinstance(node, ast.Call) and _called(node) == "Pow":
        exponent = re.fullmatch(r"Integer\((-?[0-9])\)", ast.unparse(node.args[-1])) if len(node.args) == 2 else None
        return math.inf if exponent is None else below[1] * max(abs(int(exponent[1])), 1)
    return max(below, default=1)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**64)


def _is_sympy(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=str(text)):  # sympy evaluates text wherever it meets it
            return re.fullmatch(r"[a-z]+[0-9]+|-?[0-9]{1,20}(\.[0-9]{1,20})?(e-?[0-9]{1,3})?", text) is not None
        case ast.Constant():
            return _is_number(node.value)
        case ast.Name():
            return re.fullmatch(r"[a-z]+[0-9]+|true|false", node.id) is not None
        case ast.UnaryOp():
            return _is_sympy(node.operand)
        case ast.Call(func=ast.Name(id=name)):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            return _SYMPY.fullmatch(name) is not None and all(map(_is_sympy, arguments))
    return False


def _is_python(node: ast.expr) -> bool:
    match node:
        case ast.Constant():
            return _is_number(node.value)
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
