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
    r"^Name: (?P<Name>.*?), LayerType: (?P<LayerType>.*?), Inputs: \[(?P<Inputs>.*?)\](?:, Constants: \[.*?\])?"
    r", Outputs: \[(?P<Outputs>.*?)\], TacticName: .*?, StreamId: .*?, Metadata: (?P<Metadata>.*)$",
    re.MULTILINE,
)
"""A layer in the log, its parts named as the inspector names them."""


class Tensor(NamedTuple):
    """One side of a layer; what TensorRT does not say is empty."""

    name: str
    dtype: str
    format: str


@dataclass(frozen=True)
class Layer:
    """What TensorRT runs as one step."""

    name: str
    kind: str  # TensorRT's word: correlation, kgen, custom_layer, CaskConvolution, PluginV3, ...
    inputs: tuple[Tensor, ...]  # less the constants
    outputs: tuple[Tensor, ...]  # empty where it writes nothing to the GPU's memory
    nodes: tuple[str, ...]  # names of the ONNX nodes that it computes

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
                _layer({**found.groupdict(), "Inputs": _braced(found["Inputs"]), "Outputs": _braced(found["Outputs"])})
                for found in _IN_LOG.finditer(text)
            )
    return ()


def layers_of_inspector(text: str) -> tuple[Layer, ...]:
    """The layers in the JSON of an engine inspector; empty where the engine was built without details."""
    try:
        listed = list(json.loads(text)["Layers"])
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(_layer(each) for each in listed if isinstance(each, dict))


def _layer(entry: Mapping[str, Any]) -> Layer:
    inputs, outputs = (tuple(map(_tensor, entry.get(side, ()))) for side in ("Inputs", "Outputs"))
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(entry.get("Metadata", "")))
    return Layer(str(entry.get("Name", "")), str(entry.get("LayerType", "")), inputs, outputs, tuple(nodes))


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product of the graph."""

    dtype: str  # of its inputs
    sources: frozenset[str]
    """The types that its inputs come from: int8 or float8 of one that is dequantized, and else dtype."""


def types_of_products(layers: Sequence[Layer], products: Mapping[str, Product]) -> tuple[dict[str, str], list[str]]:
    """The type that each product was built in, by node, and a line for each that the graph has in another type.

    One whose inputs are all dequantized may be built in their type or in that of the graph. Of a node without layers
    nothing is known, nor of one that dequantizes an input itself and multiplies after that.
    """
    computing: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in layer.nodes:
            if node in products and not layer.moves_only and _number_types(layer):
                computing.setdefault(node, []).append(layer)
    built: dict[str, str] = {}
    wrong: list[str] = []
    for node, found in computing.items():
        dtype, sources = products[node].dtype, products[node].sources
        # What TensorRT generates around a product (casts, padding, sums of its parts) bears the product's name too.
        own = [_number_types(layer) for layer in found if layer.kind != "kgen"] or [*map(_number_types, found)]
        others = {other for types in own if not types & {dtype, *sources} for other in types}
        if others:
            wrong.append(f"{node} in {', '.join(sorted(others))} instead of {' or '.join(sorted({dtype, *sources}))}")
        elif len(sources) == 1 and all(types & sources for types in own):
            [built[node]] = sources
        elif all(dtype in types for types in own):
            built[node] = dtype
    return built, wrong


def _number_types(layer: Layer) -> set[str]:
    return {tensor.dtype for tensor in layer.inputs} & {"float32", "float16", "bfloat16", "float8", "int8"}


def profiles_listed(layers: Iterable[Layer]) -> int:
    """For how many optimization profiles the layers are listed: from the second on names bear the profile's number."""
    names = (name for layer in layers for name in (layer.name, *(x.name for x in (*layer.inputs, *layer.outputs))))
    return 1 + max((int(number) for name in names for number in re.findall(r" \[profile (\d+)\]", name)), default=0)


def layer_counts(layers: Iterable[Layer]) -> list[tuple[str, str, int]]:
    """Kind, types and number of the layers, the most frequent first."""
    counts = Counter((layer.kind, ", ".join(layer.dtypes) or "-") for layer in layers)
    return [(kind, dtypes, count) for (kind, dtypes), count in counts.most_common()]


def _braced(text: str) -> list[dict[str, str]]:
    """The entries of `{ Name: x, Dimensions: [1,2], ..., Datatype: Half, Format: (NHWC) Channel major format }`."""
    keys = {"Name": r"Name: (.*?), Dimensions: ", "Datatype": r"Datatype: (\w+)", "Format": r"Format: (.*)$"}
    inner = re.findall(r"\{ (.*?) \}(?:, |$)", text)
    return [{key: found[1] for key, pattern in keys.items() if (found := re.search(pattern, each))} for each in inner]


def _tensor(entry: Any) -> Tensor:
    if not isinstance(entry, Mapping):  # an engine built without details lists names only
        return Tensor(str(entry), "", "")
    layout = str(entry.get("Format", entry.get("Format/Datatype", "")))
    words = f"{entry.get('Datatype', '')} {entry.get('Format/Datatype', '')}".lower()
    dtype = next((_DTYPES[word] for word in re.findall(r"\w+", words) if word in _DTYPES), "")
    return Tensor(str(entry.get("Name", "")), dtype, layout)
