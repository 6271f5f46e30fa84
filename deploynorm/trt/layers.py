"""The layers of a built engine, as TensorRT lists them: where there is a GPU by its inspector, else in the build's log.

That an engine computes in float16 is read from its layers, and not taken from what was asked for.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from deploynorm.trt.errors import Message

__all__ = ["Layer", "Tensor", "layer_counts", "layers_of_inspector", "layers_of_log", "products_in_other_types"]

_DTYPES: Final = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "int8": "int8",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
    "fp8": "float8",
}
_PLUGIN_KINDS = ("custom_layer", "PluginV3", "PluginV2")
_MOVES = re.compile(r"^__myl_((Move|Tran|Resh|Slic|Conc)+)_|^Reformatting ")
_IN_LOG = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>.*?), Inputs: \[(?P<inputs>.*?)\](?:, Constants: \[.*?\])?"
    r", Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: .*?, Metadata: (?P<metadata>.*)$",
    re.MULTILINE,
)


class Tensor(NamedTuple):
    """One side of a layer; what TensorRT does not say is empty."""

    name: str
    dtype: str
    format: str


@dataclass(frozen=True)
class Layer:
    """What TensorRT runs as one step.

    Attributes:
        name: TensorRT's name.
        kind: TensorRT's word: correlation, kgen, custom_layer, CaskConvolution, PluginV3, ...
        inputs: Less the constants.
        outputs: Empty where it writes nothing to the GPU's memory.
        nodes: Names of the ONNX nodes that it computes.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]

    @property
    def plugin(self) -> bool:
        return self.kind in _PLUGIN_KINDS

    @property
    def moves_only(self) -> bool:
        """Whether it copies into another layout and computes nothing."""
        return bool(_MOVES.match(self.name)) or self.kind in ("Reformat", "Shuffle")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types of all its tensors, each once."""
        return tuple(dict.fromkeys(tensor.dtype for tensor in (*self.inputs, *self.outputs) if tensor.dtype))


def layers_of_log(heard: Iterable[Message]) -> tuple[Layer, ...]:
    """The layers that a build with detailed verbosity lists at the end; empty where it did not."""
    for _, text in heard:
        if text.startswith("Layers:"):
            return tuple(
                Layer(
                    found["name"],
                    found["kind"],
                    tuple(map(_tensor, _braced(found["inputs"]))),
                    tuple(map(_tensor, _braced(found["outputs"]))),
                    _nodes(found["metadata"]),
                )
                for found in _IN_LOG.finditer(text)
            )
    return ()


def layers_of_inspector(text: str) -> tuple[Layer, ...]:
    """The layers in the JSON of an engine inspector; empty where the engine was built without details."""
    try:
        listed = list(json.loads(text)["Layers"])
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(
        Layer(
            str(each.get("Name", "")),
            str(each.get("LayerType", "")),
            tuple(map(_tensor, each.get("Inputs", ()))),
            tuple(map(_tensor, each.get("Outputs", ()))),
            _nodes(str(each.get("Metadata", ""))),
        )
        for each in listed
        if isinstance(each, dict)
    )


def products_in_other_types(layers: Sequence[Layer], products: Mapping[str, str]) -> tuple[int, list[str]]:
    """Compares the types of convolutions and matrix products with those of the graph.

    Args:
        layers: Of the engine.
        products: Element type by node, of the graph.

    Returns:
        How many nodes were found with their type, and a line for each whose type is another.
    """
    computing: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in layer.nodes:
            if node in products and not layer.moves_only and _float_inputs(layer):
                computing.setdefault(node, []).append(layer)
    verified, wrong = 0, []
    for node, found in computing.items():
        # What TensorRT generates around a product (casts, padding, sums of its parts) bears the product's name too.
        own = [layer for layer in found if layer.kind != "kgen"] or found
        others = {
            dtype for layer in own if products[node] not in _float_inputs(layer) for dtype in _float_inputs(layer)
        }
        verified += not others
        wrong += [f"{node} in {', '.join(sorted(others))} instead of {products[node]}"] if others else []
    return verified, wrong


def _float_inputs(layer: Layer) -> set[str]:
    return {tensor.dtype for tensor in layer.inputs} & {"float32", "float16", "bfloat16"}


def layer_counts(layers: Iterable[Layer]) -> list[tuple[str, str, int]]:
    """Kind, types and number of the layers, the most frequent first."""
    counts = Counter((layer.kind, ", ".join(layer.dtypes) or "-") for layer in layers)
    return [(kind, dtypes, count) for (kind, dtypes), count in counts.most_common()]


def _braced(text: str) -> list[dict[str, str]]:
    """The entries of `{ Name: x, Dimensions: [1,2], ..., Datatype: Half, Format: (NHWC) Channel major format }`."""
    entries = []
    for inner in re.findall(r"\{ (.*?) \}(?:, |$)", text):
        name = re.match(r"Name: (.*?), Dimensions: ", inner)
        datatype = re.search(r"Datatype: (\w+)", inner)
        layout = re.search(r"Format: (.*)$", inner)
        entries.append(
            {
                "Name": name[1] if name else "",
                "Datatype": datatype[1] if datatype else "",
                "Format": layout[1] if layout else "",
            }
        )
    return entries


def _tensor(entry: Any) -> Tensor:
    if not isinstance(entry, Mapping):  # an engine built without details lists names only
        return Tensor(str(entry), "", "")
    layout = str(entry.get("Format", entry.get("Format/Datatype", "")))
    words = f"{entry.get('Datatype', '')} {entry.get('Format/Datatype', '')}".lower()
    dtype = next((_DTYPES[word] for word in re.findall(r"\w+", words) if word in _DTYPES), "")
    return Tensor(str(entry.get("Name", "")), dtype, layout)


def _nodes(metadata: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata))
