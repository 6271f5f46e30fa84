"""The JSON of a torch.export program: which text of it may reach torch."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest

from deploynorm.checkpoint._program import RefusedError, clean, plain_guard, plain_size

CODE = "x=__import__('os').mkdir('a')"


@pytest.fixture(scope="module")
def members(pt2: bytes) -> list[Any]:
    with zipfile.ZipFile(io.BytesIO(pt2)) as archive:
        return [json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json")]


def tables(value: Any) -> Iterator[Any]:
    """Every dict and list in JSON."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from tables(item)


def reaches_torch(program: Any) -> bool:
    try:
        return CODE in json.dumps(clean(program))
    except (RefusedError, ValueError):  # a ValueError is reported as a damaged archive
        return False


def test_code_reaches_torch_from_no_text_of_an_archive(members: list[Any]) -> None:
    assert reaches_torch({"as_string": CODE})  # what an operator takes as a string is data, and no code
    tried = 0
    for member in members:
        for table in tables(member):
            for key in list(table) if isinstance(table, dict) else range(len(table)):
                old = table[key]
                if isinstance(old, str):
                    table[key] = CODE
                    assert not reaches_torch(member), (key, old)
                    table[key] = old
                    tried += 1
    assert tried > 100


def test_code_reaches_torch_from_no_key_of_an_archive(members: list[Any]) -> None:
    tried = 0
    for member in members:
        for table in tables(member):
            for key in list(table) if isinstance(table, dict) else ():
                table[CODE] = table.pop(key)
                assert not reaches_torch(member), key
                table[key] = table.pop(CODE)
                tried += 1
    assert tried > 100


@pytest.mark.parametrize("text", [CODE, "x\ny", "x'y", 'x"y', "x\\", "é", "x y", "x()", "x[0]", "x;y", "x#"], ids=repr)
def test_a_name_is_letters_and_digits(text: str) -> None:
    for program in ({"name": text}, {"names": [text]}, {"fqn": text}, {text: 1}, {"tensor_values": {text: {}}}):
        with pytest.raises(RefusedError):
            clean(program)


SIZES = {
    "s0": True,
    "Integer(3)": True,
    "Symbol('s53', positive=True, integer=True)": True,
    "Add(FloorDiv(Add(Symbol('s53', positive=True, integer=True), Integer(-3)), Integer(4)), Integer(1))": True,
    "TruncToInt(Mul(Float('1.5', precision=53), ToFloat(Symbol('s0'))))": True,
    "Pow(Symbol('s0'), Integer(2))": True,
    "StrictLessThan(Symbol('u0'), Integer(2))": True,
    "Pow(Integer(9), Pow(Integer(9), Integer(9)))": False,
    "__import__('os')": False,
    "Symbol('__import__')": False,
    "Abs('print(1)')": False,
    "Lambda(s0, s0)": False,
    "Integer.mro()": False,
    "(lambda: 1)()": False,
    "[s0 for s0 in s1]": False,
    "s0.x": False,
    "Integer": False,
    "eval": False,
    "Add(*s0)": False,
    "Add(**s0)": True,  # a symbol is no mapping: an error in sympy, and no code
    "f'{s0}'": False,
    "s0; s1": False,
    "": False,
    "s0\x00": False,
    "(" * 300: False,
}

GUARDS = {
    "L['x'].size()[2] >= 3": True,
    "(1 + (((-3) + L['x'].size()[3]) // 2)) != 1": True,
    "math.trunc(1.5*torch.sym_float(L['flat_args'][0].size()[2] // 2)) >= 2": True,
    "max(1, L['x']['a'].size()[3] // 2) != 1 and not (L['x'].stride()[0] == 3)": True,
    "L['x'].size()[f()] >= 3": False,
    "L['x\\'].f()#'].size()[0] >= 3": False,
    "L['x'].numpy()[0]": False,
    "L['x'].__class__": False,
    "torch.load('x')": False,
    "math.factorial(3)": False,
    "9 ** 9 ** 9 > 1": False,
    "'a' * 3 == 'b'": False,
    "max(1, key=print)": False,
    "max(*L['x'])": False,
    "exec('1')": False,
    "x": False,
    "(y := 1)": False,
    "[1][0]": False,
}


@pytest.mark.parametrize("text", SIZES, ids=lambda text: repr(text[:40]))
def test_a_size_is_arithmetic_alone(text: str) -> None:
    assert (plain_size(text) is not None) == SIZES[text]


@pytest.mark.parametrize("text", GUARDS, ids=lambda text: repr(text[:40]))
def test_a_guard_compares_sizes_alone(text: str) -> None:
    assert (plain_guard(text) is not None) == GUARDS[text]


def test_comments_and_line_breaks_are_left_out_of_a_guard() -> None:
    assert plain_guard("L['x'].size()[0] > 1 # no more\n") == "L['x'].size()[0] > 1"


TARGETS = """
    torch.ops.aten.save.default torch.ops.aten.from_file.default torch.ops.aten.gone.default
    torch.ops.aten.__class__.__mro__ torch.ops.higher_order.cond torch.ops.load_library
    torch.hub.load math.factorial _operator.attrgetter _operator.methodcaller #registry:op
"""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("target", name) for name in TARGETS.split()),
        ("target", {"a": 1}),
        ("as_operator", "torch.os.system"),
        ("as_graph", {"name": "a"}),
        ("as_custom_obj", {"name": "a", "class_fqn": "b"}),
        ("custom_obj_values", {"a": {}}),
        ("use_pickle", True),
        ("in_spec", '[1, {"type": "torch.Size", "context": "null", "children_spec": []}]'),
        ("in_spec", '[1, {"type": "builtins.dict", "context": "{}", "children_spec": []}]'),
        ("in_spec", '[1, {"type": "builtins.dict", "context": "[[{}]]", "children_spec": []}]'),
        ("as_float", "inf()"),
        ("as_string", "\x00"),
    ],
    ids=repr,
)
def test_a_part_that_may_hold_code_is_refused(field: str, value: object) -> None:
    with pytest.raises(RefusedError):
        clean({"nodes": [{field: value}]})


def test_where_a_program_came_from_is_left_behind() -> None:
    program = {"metadata": {"stack_trace": "File /home/me"}, "torch_version": "2.13"}
    program |= {"treespec_namedtuple_fields": {"a": 1}}
    assert clean(program) == {"metadata": {}, "torch_version": "", "treespec_namedtuple_fields": {}}
