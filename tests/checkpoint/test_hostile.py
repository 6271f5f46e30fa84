"""Files that try to run code. Each would make a folder; none may, unless the file is trusted, and then it does."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import FACTORY, own, rewritten, saved
from torch import nn

from deploynorm.checkpoint import load
from deploynorm.errors import ModelError


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


class Evaluated(Hostile):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (code(Path(self.marker)),)


def code(marker: Path) -> str:
    return f"__import__('os').mkdir('{marker}')"


def network_with(attribute: object) -> nn.Module:
    network = nn.Sequential(nn.ReLU())
    network[0].attribute = attribute
    return network


LEGACY = {"_use_new_zipfile_serialization": False}

PICKLES: dict[str, Callable[[Path], bytes]] = {
    "plain": lambda marker: saved(Hostile(marker)),
    "eval": lambda marker: saved([Evaluated(marker)]),
    "beside a state dict": lambda marker: saved({"model": {"w": torch.ones(1)}, "args": Hostile(marker)}),
    "kwargs": lambda marker: saved(own(kwargs={"num_classes": Hostile(marker)})),
    "training": lambda marker: saved(own(training={"log": [Hostile(marker)]})),
    "a network": lambda marker: saved(network_with(Hostile(marker))),
    "legacy": lambda marker: saved(Hostile(marker), **LEGACY),
    "legacy kwargs": lambda marker: saved(own(kwargs={"num_classes": Hostile(marker)}), **LEGACY),
    "legacy network": lambda marker: saved(network_with(Hostile(marker)), **LEGACY),
    "protocol 4": lambda marker: saved(Hostile(marker), pickle_protocol=4),
    "legacy protocol 4": lambda marker: saved(Hostile(marker), pickle_protocol=4, **LEGACY),
}


Change = Callable[[str, bytes], bytes | None]
Attack = tuple[Change, dict[str, bytes]]
"""What changes in the members of an archive of torch.export, and which are added."""


def instead(member: str, content: bytes) -> Change:
    return lambda name, old: content if name == member else old


def samples(content: bytes) -> Attack:
    return instead("data/sample_inputs/model.pt", content), {}


def added(member: str, content: bytes) -> Attack:
    return (lambda name, old: old), {member: content}


def payload(kind: str, name: str, path: str, content: bytes) -> Attack:
    """The archive names a pickle as one of its weights or constants, and has it."""
    config = {name: {"path_name": path, "is_param": False, "use_pickle": True, "tensor_meta": None}}
    change = instead(f"data/{kind}/model_{kind}_config.json", json.dumps({"config": config}).encode())
    return change, {f"data/{kind}/{path}": content}


def program(edit: Callable[[Any], Any]) -> Attack:
    """The program with its JSON changed, in place or by what `edit` returns."""

    def change(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        program = json.loads(content)
        return json.dumps(edit(program) or program).encode()

    return change, {}


def renamed(value: Any, new: str) -> Any:
    """The program with its input called otherwise; the argument called "input" of its operators keeps its name."""
    if value == {"name": "input"}:
        return {"name": new}
    if isinstance(value, dict):
        return {new if name == "input" else name: renamed(item, new) for name, item in value.items()}
    return [renamed(item, new) for item in value] if isinstance(value, list) else value


def with_size(program: Any, text: str) -> None:
    sizes = [size for meta in program["graph_module"]["graph"]["tensor_values"].values() for size in meta["sizes"]]
    next(size for size in sizes if "as_expr" in size)["as_expr"]["expr_str"] = text


def with_tree(program: Any, kind: str, context: object) -> None:
    tree = {"type": kind, "context": context, "children_spec": []}
    program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, tree])


def with_node(program: Any, target: str, *arguments: Any) -> None:
    node = {
        "target": target,
        "inputs": [{"name": name, "arg": argument, "kind": 1} for name, argument in arguments],
        "outputs": [{"as_none": True}],
        "metadata": {},
        "name": "added",
    }
    program["graph_module"]["graph"]["nodes"].append(node)


ENUM = json.dumps({"__enum__": True, "fqn": "hostile_module:A", "name": "B"})
DEFAULT = {"default_factory_module": "hostile_module", "default_factory_name": "a", "dict_context": []}

RUNNING: dict[str, Callable[[Path], Attack]] = {
    "sample inputs": lambda m: samples(saved(((Hostile(m),), {}))),
    "sample inputs, legacy": lambda m: samples(saved(Hostile(m), **LEGACY)),
    "sample inputs, protocol 4": lambda m: samples(saved(Hostile(m), pickle_protocol=4)),
    "sample inputs, bare": lambda m: samples(pickle.dumps(Hostile(m))),
    "sample inputs, a network": lambda m: samples(saved(network_with(Hostile(m)))),
    "weights in one pickle": lambda m: added("data/weights/model.pt", saved(Hostile(m))),
    "constants in one pickle": lambda m: added("data/constants/model.pt", saved(Hostile(m))),
    "a pickled weight": lambda m: payload("weights", "0.weight", "weight_99", saved(Hostile(m))),
    "a pickled constant": lambda m: payload("constants", "c", "tensor_99", saved(Hostile(m))),
    "a Python object": lambda m: payload("constants", "c", "opaque_obj_0", pickle.dumps(Hostile(m))),
    "a size": lambda m: program(lambda p: with_size(p, code(m))),
    "a size inside a size": lambda m: program(lambda p: with_size(p, f"Add(Integer(1), {code(m)})")),
    "a size as text": lambda m: program(lambda p: with_size(p, f"Abs({code(m)!r})")),
    "a guard": lambda m: program(lambda p: p.update(guards_code=[code(m)])),
    "a guard in an index": lambda m: program(
        lambda p: p.update(guards_code=[f"L['input'].size()[{code(m)} or 0] > 0"])
    ),
    "a name": lambda m: program(lambda p: renamed(p, f"input={code(m)}")),
    "an enum of a module": lambda m: program(lambda p: with_tree(p, "builtins.dict", ENUM)),
    "a default of a module": lambda m: program(lambda p: with_tree(p, "collections.defaultdict", DEFAULT)),
}
"""Archives of whose code torch itself runs some."""

FILE = (("shared", {"as_bool": True}), ("size", {"as_int": 8}))

REFUSED: dict[str, Callable[[Path], Attack]] = {
    "sample inputs, a known network": lambda m: samples(saved(((nn.ReLU(),), {}))),
    "a TorchScript object": lambda m: payload("constants", "c", "custom_obj_0", saved(Hostile(m))),
    "machine code": lambda m: added("data/aotinductor/model/wrapper.so", b"\x7fELF"),
    "an unknown member": lambda m: added("data/more/model.pt", saved(Hostile(m))),
    "a second program": lambda m: added("models/other.json", b"{}"),
    "a function of Python": lambda m: program(lambda p: with_node(p, "torch.os.mkdir", ("", {"as_string": str(m)}))),
    "an operator on files": lambda m: program(
        lambda p: with_node(p, "torch.ops.aten.from_file.default", ("filename", {"as_string": str(m)}), *FILE)
    ),
}
"""Archives of which torch does not run any (yet)."""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that hostile code makes; the module `hostile_module` makes it too when it is imported."""
    marker = tmp_path / "code_ran"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "hostile_module.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "hostile_module", raising=False)
    return marker


def load_and_run(path: Path, *, trust: bool = False) -> None:
    load(path, trust_pickle=trust).model(torch.ones(2, 3, 16, 20))


def ran_when_trusted(path: Path, marker: Path) -> bool:
    with suppress(ModelError, AssertionError, TypeError):  # whatever becomes of the rest of the file
        load_and_run(path, trust=True)
    return marker.exists()


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_runs_nothing(tmp_path: Path, marker: Path, name: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(PICKLES[name](marker))
    with pytest.raises(ModelError, match=r"run(ning)? (the )?code") as raised:
        load(path)
    assert not marker.exists()
    assert ("mkdir" in str(raised.value) or "eval" in str(raised.value)) or "pickle_protocol" in str(raised.value)
    with pytest.raises(ModelError):
        load(path, factory=FACTORY)
    assert not marker.exists()
    assert ran_when_trusted(path, marker)


@pytest.mark.parametrize("name", [*RUNNING, *REFUSED])
def test_an_archive_runs_nothing(tmp_path: Path, marker: Path, pt2: bytes, name: str) -> None:
    change, add = (RUNNING | REFUSED)[name](marker)
    path = tmp_path / "model.pt2"
    path.write_bytes(rewritten(pt2, change, add))
    with pytest.raises(ModelError):
        load_and_run(path)
    assert not marker.exists()
    assert "hostile_module" not in sys.modules
    if name in RUNNING:
        assert ran_when_trusted(path, marker)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["archive/data/sample_inputs/model.pt", "other/data/sample_inputs/model.pt"])
def test_an_archive_of_two_minds_is_refused(tmp_path: Path, marker: Path, pt2: bytes, name: str) -> None:
    buffer = io.BytesIO(pt2)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(name, saved(Hostile(marker)))
    (tmp_path / "m.pt2").write_bytes(buffer.getvalue())
    with pytest.raises(ModelError, match="two readers would read differently"):
        load(tmp_path / "m.pt2")
    assert not marker.exists()


GLOBALS = """
    torch.from_file torch.load torch.nn.modules.module.register_module_forward_hook
    torch.nn.modules.module.warnings torch.nn.modules.module.OrderedDict
    torch.nn.parallel.distributed.DistributedDataParallel torch.fx.graph_module.reduce_graph_module
    torch.jit._script.RecursiveScriptModule deploynorm.models.train.main deploynorm.models.train.save
    deploynorm.layers.frn.warnings deploynorm.checkpoint.load timm.models.load_checkpoint
    builtins.getattr functools.partial
"""


@pytest.mark.parametrize("name", GLOBALS.split())
@pytest.mark.usefixtures("timm")
def test_a_global_that_makes_no_network_is_refused(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    file = tmp_path / "made"
    # The function, called with (path, True, 8): torch.from_file would make the file.
    call = f"c{module}\n{function}\n(X".encode() + len(str(file)).to_bytes(4, "little") + str(file).encode()
    path = tmp_path / "model.pt"
    path.write_bytes(rewritten(saved(1), instead("data.pkl", b"\x80\x02" + call + b"\x88K\x08tR.")))
    with pytest.raises(ModelError, match="would run code that it names") as raised:
        load(path)
    assert name in str(raised.value)
    assert not file.exists()
