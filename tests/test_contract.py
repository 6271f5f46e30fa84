"""The operator's names stand in contract.py, and every other place takes them from there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import onnx
import pytest
import torch

import deploynorm
from deploynorm import contract
from deploynorm.lowering import function_proto, register_schema
from deploynorm.packages import load

PACKAGE = Path(deploynorm.__file__).parent


def test_no_other_module_spells_the_operator_out() -> None:
    name = re.compile(rf"""["']{contract.OP_TYPE}\w*["']|["']{contract.DOMAIN}["']""")
    spelled = {
        path.relative_to(PACKAGE).as_posix(): found
        for path in PACKAGE.rglob("*.py")
        if path.name != "contract.py" and (found := name.findall(path.read_text(encoding="utf-8")))
    }
    # The checkpoint format and the program bear the project's name for reasons of their own.
    allowed = """
        _convert/conversion.py checkpoint/_own.py checkpoint/_load.py cli/__init__.py _export/exporting.py
        libraries/find.py packages.py ort/machine.py rewrite/cpu.py sources.py
    """
    assert set(spelled) <= set(allowed.split()), spelled
    assert not any(contract.OP_TYPE in text for found in spelled.values() for text in found)


def test_torch_operator_has_the_inputs_of_the_contract() -> None:
    import deploynorm.layers.functional  # noqa: F401  registers it

    schema = getattr(getattr(torch.ops, contract.DOMAIN), contract.TORCH_OP).default._schema
    names = [argument.name for argument in schema.arguments]
    assert (names[0].upper(), *names[1:]) == contract.INPUTS


@pytest.mark.parametrize("op_type", contract.OPERATORS)
def test_schema_and_function_have_the_inputs_of_the_contract(op_type: str) -> None:
    register_schema()
    register_schema()  # a second call is not an error
    schema, inputs = onnx.defs.get_schema(op_type, contract.VERSION, contract.DOMAIN), contract.OPERATORS[op_type]
    assert tuple(value.name for value in schema.inputs) == inputs
    assert {value.name for value in schema.inputs if value.type_str == "P"} == set(contract.PARAMETERS)
    assert set(schema.attributes) == set(contract.NODE_ATTRIBUTES)
    for opset in range(contract.MIN_OPSET, contract.MAX_OPSET + 1):
        body = function_proto(opset, op_type)
        assert (body.domain, body.name, tuple(body.input), tuple(body.output)) == (
            contract.DOMAIN,
            op_type,
            inputs,
            (contract.OUTPUT,),
        )
        assert [each.version for each in body.opset_import] == [opset]


def test_every_lowering_has_a_writer() -> None:
    assert all(callable(load(row.writer)) for row in contract.LOWERINGS.values())


def test_names_suit_every_host() -> None:
    """Quickly deployable TensorRT plugins refuse a dot; torch.ops wants an identifier; TensorRT finds by name."""
    assert contract.DOMAIN.isidentifier()
    assert contract.TORCH_OP.isidentifier()
    assert contract.NODE_ATTRIBUTES == {"plugin_namespace": contract.DOMAIN, "plugin_version": "1"}
    assert not any(schema.name in contract.OPERATORS for schema in onnx.defs.get_all_schemas() if schema.domain == "")


def test_the_c_header_has_the_same_names() -> None:
    text = (Path(__file__).parents[1] / "plugins" / "contract.h").read_text(encoding="utf-8")
    constant = re.compile(r"^constexpr (?:const char\*|int) (k\w+)(?:\[\w+\])? = (?!k)([^;]+);", flags=re.MULTILINE)
    want = {
        "kDomain": contract.DOMAIN,
        "kOpType": contract.OP_TYPE,
        "kAddOpType": contract.ADD_OP_TYPE,
        "kVersion": contract.VERSION,
        "kInputs": len(contract.INPUTS),
        "kInputNames": set(contract.INPUTS),
        "kBlockedOpType": contract.BLOCKED_OP_TYPE,
        "kBlockAttribute": contract.BLOCK_ATTRIBUTE,
    }
    assert {name: ast.literal_eval(value) for name, value in constant.findall(text)} == want
    names = re.search(r"kInputNames\[kInputs\] = \{([^}]+)\}", text)
    assert names is not None
    assert ast.literal_eval(f"({names[1]},)") == contract.INPUTS  # a set has no order
