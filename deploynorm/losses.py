"""What other tools take from our files without a word, told from the file alone.

`deploynorm.rewrite.restore` puts it back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

from deploynorm.contract import BLOCKED_OP_TYPE, DOMAIN, METADATA_SIZES, NODE_ATTRIBUTES, OPERATORS, PRODUCER
from deploynorm.onnx_file import OnnxFile, all_nodes

_REMEDY: Final = "deploynorm rewrite {path} --restore ORIGINAL, or export it again"


class Loss(NamedTuple):
    """One thing that is gone, and what to do."""

    name: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}. Fix: {self.remedy}"


def find_losses(file: OnnxFile) -> tuple[Loss, ...]:
    """What a file with our operators lacks of what `export` writes; nothing for a file without them.

    A file of `export --no-function` lacks its function bodies too; nothing in it tells the two apart.
    """
    remedy = _REMEDY.format(path=file.path or "MODEL")
    return tuple(Loss(name, problem, remedy) for name, problem in _problems(file))


def _problems(file: OnnxFile) -> Iterator[tuple[str, str]]:
    nodes = [node for node in all_nodes(file.proto.graph.node) if node.domain == DOMAIN]
    renamed = Counter(node.op_type for node in nodes if renamed_operator(node.op_type) is not None)
    for op_type, count in sorted(renamed.items()):
        effect = "it runs as its function, and neither our kernels nor our plugins take it"
        yield "operator-renamed", f"onnx.compose, or another tool, has renamed {_nodes(count, op_type)}: {effect}"
    bodies = {function.name for function in file.proto.functions if function.domain == DOMAIN}
    bare = Counter(node.op_type for node in nodes if node.op_type in {*OPERATORS, *renamed} - bodies)
    for op_type, count in sorted(bare.items()):
        problem = f"{_nodes(count, op_type)} has no function body, as onnx.version_converter leaves it"
        yield "function-missing", f"{problem}: stock runtimes refuse the file, and only our libraries run it"
    plain = [node for node in nodes if node.op_type in OPERATORS and not _names_plugin(node.attribute)]
    if plain:
        problem = f"{_nodes(len(plain), plain[0].op_type)} does not name its plugin"
        yield "attributes-missing", f"{problem}: of hosts of TensorRT only deploynorm build finds it"
    if nodes and file.proto.producer_name == PRODUCER and METADATA_SIZES not in file.metadata:
        problem = "its metadata is gone, as onnx-graphsurgeon leaves it"
        yield "metadata-missing", f"{problem}: sizes, images and class names are not known"


def renamed_operator(op_type: str) -> str | None:
    """Our operator behind a name of our domain that is a prefix and its own; None for another name."""
    if op_type in OPERATORS or op_type.endswith(BLOCKED_OP_TYPE):
        return None
    return next((name for name in OPERATORS if op_type.endswith(name)), None)


def _names_plugin(attributes: object) -> bool:
    return set(NODE_ATTRIBUTES) <= {attribute.name for attribute in attributes}  # type: ignore[attr-defined]


def _nodes(count: int, op_type: str) -> str:
    name = f"{DOMAIN}::{op_type}"
    return name if count == 1 else f"{name} ({count} nodes)"
