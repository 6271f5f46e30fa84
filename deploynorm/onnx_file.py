"""Reading and writing ONNX files, and what every stage asks about a graph."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import google.protobuf.message
import onnx
import onnx.external_data_helper
import onnx_ir as ir

from deploynorm.contract import DOMAIN, METADATA_IMAGE, METADATA_LABELS, METADATA_SIZES, PRODUCER
from deploynorm.dtypes import ONNX_HALF
from deploynorm.errors import InputError, ModelError
from deploynorm.files import as_path, onnx_companions
from deploynorm.foreign import frn_note, loose_frn
from deploynorm.image import ImageSpec, as_labels
from deploynorm.inputs import Shape, TensorSpec, read_sizes, row_groups, with_sizes
from deploynorm.manifest import check_unchanged
from deploynorm.onnx_faults import external_files, find_fault
from deploynorm.run.backends import ENGINE_SUFFIXES

_PROTOBUF_LIMIT = 2**31 - 2**20  # bytes of one file, less room for the graph itself
_SUBGRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model that was read once, for all who ask about it or run it; ModelError where it cannot answer.

    Attributes:
        where: Its path, or "model (in memory)", for messages.
        path: The file, beside which its external data lies; None for a model in memory.
        proto: As read, the external part of its weights left on the disk. Not to be changed.
    """

    where: str
    path: Path | None
    proto: onnx.ModelProto = field(repr=False)

    @classmethod
    def read(cls, model: OnnxSource) -> OnnxFile:
        """Reads a file, or the bytes of one; what is read already is taken as it is."""
        if isinstance(model, OnnxFile):
            return model
        if isinstance(model, onnx.ModelProto):
            return cls("model (in memory)", None, model)
        path = None if isinstance(model, bytes) else as_path("ONNX file", model)
        where = "model (in memory)" if path is None else str(path)
        if path is not None and path.exists() and not path.is_file():  # a fifo would be waited for
            raise ModelError(where, "not a regular file", fix="check the path")
        if path is not None and path.suffix in ENGINE_SUFFIXES:
            problem, fix = "a TensorRT engine, where an ONNX file is needed", "name the file that it was built from"
            raise ModelError(where, problem, fix=fix)
        try:
            proto = onnx.load_model_from_string(model if isinstance(model, bytes) else Path(model).read_bytes())
            if not proto.HasField("graph"):
                raise google.protobuf.message.DecodeError
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            problem = "no such file" if missing else f"cannot be read: {error.strerror}"
            raise ModelError(where, problem, fix="check the path") from error
        except google.protobuf.message.DecodeError as error:
            raise ModelError(where, "not an ONNX file, or cut short", fix="export it again") from error
        if (fault := find_fault(proto)) is not None:
            raise ModelError(where, fault, fix="export it again")
        return cls(where, path, proto)

    def to_ir(self) -> ir.Model:
        """A model of onnx_ir, to be changed at will. External data stays on the disk until it is needed."""
        try:
            model = ir.from_proto(self.proto)
        except Exception as error:  # onnx_ir has no error of its own for what a file may hold
            raise ModelError(self.where, f"not a valid ONNX graph: {error}", fix="export it again") from error
        if self.path is not None:
            ir.external_data.set_base_dir(model.graph, self.path.parent)
        return model

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of a graph that another tool wrote: which of its layers could be ours."""
        if self.proto.producer_name == PRODUCER:  # the export has said so
            return ()
        try:
            return tuple(f"{note}; or rewrite the file with --fuse" for note in frn_note(loose_frn(self.to_ir().graph)))
        except ModelError:  # who runs the file learns of it
            return ()

    def begin(self, *, accept_changed: bool = False, loose: bool = True) -> None:
        """What every stage that makes another file of this one does first: ModelError where it is not the file that the
        manifest beside it was written for, or a warning with `accept_changed`; and, where layers that are loose are
        not what it is about, a warning for each of its notes."""
        if self.path is not None:
            check_unchanged(self.path, accept=accept_changed)
        for note in self.notes if loose else ():
            warnings.warn(f"{self.where}: {note}", RuntimeWarning, stacklevel=3)

    def check_external_data(self) -> None:
        """ModelError where a file that weights lie in is not there, or no regular file, such as a fifo."""
        if self.path is None:
            return
        for name in external_files(self.proto):
            if not (self.path.parent / name).is_file():
                problem = f"its external data cannot be read: {name} is not a file beside it"
                raise ModelError(self.where, problem, fix="keep the data file beside the model")

    def whole_proto(self) -> onnx.ModelProto:
        """A copy of the model with its external data in it; `proto` itself of a model in memory."""
        if self.path is None:
            return self.proto
        self.check_external_data()
        whole = onnx.ModelProto()
        whole.CopyFrom(self.proto)
        try:
            onnx.external_data_helper.load_external_data_for_model(whole, str(self.path.parent))
        except (onnx.checker.ValidationError, OSError, ValueError) as error:
            problem = f"its external data cannot be read: {error}"
            raise ModelError(self.where, problem, fix="keep the data file beside the model") from error
        return whole

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a caller feeds: the graph's inputs less those with a value of their own; with the sizes that the network
        was found to take, where the metadata has them. ModelError where one is not a numeric tensor of known rank.
        """
        constants = {tensor.name for tensor in self.proto.graph.initializer}
        fed = [_spec(self.where, value) for value in self.proto.graph.input if value.name not in constants]
        return with_sizes(fed, self.sizes)

    @property
    def row_groups(self) -> tuple[tuple[str, ...], ...]:
        """See `deploynorm.run.base.Runner`."""
        shapes = ((x.name, x.type.tensor_type.shape.dim) for x in self.proto.graph.output)
        return row_groups(self.inputs, [TensorSpec(name, (dims[0].dim_param,), "") for name, dims in shapes if dims])

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The file, and those beside it that its weights are in; none of a model in memory."""
        if self.path is None:
            return ()
        constants = (part.t for node in all_nodes(self.proto.graph.node) for part in node.attribute)
        tensors = (*self.proto.graph.initializer, *constants)
        names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
        return (self.path, *(self.path.parent / name for name in sorted(names)))

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(value.name for value in self.proto.graph.output)

    @property
    def metadata(self) -> dict[str, str]:
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    @property
    def sizes(self) -> dict[str, Any]:
        """What the metadata says of the sizes that the network takes, for `deploynorm.inputs.with_sizes`."""
        return read_sizes(self.metadata.get(METADATA_SIZES))

    def image_shape(self, batch: int) -> dict[str, Shape]:
        """By input, for `base_shapes`: images of the size that the metadata has, as many as `batch` where the batch is
        dynamic; empty where the metadata does not say, or there are several inputs."""
        image, _ = self.image_and_labels
        if image is None or len(self.inputs) != 1:
            return {}
        fixed = self.inputs[0].shape[0]
        return {"": (fixed if isinstance(fixed, int) else batch, *image.shape)}

    @property
    def image_and_labels(self) -> tuple[ImageSpec | None, tuple[str, ...] | None]:
        """How an image becomes the input, and the class names; None for what the metadata does not say."""
        image, labels = self.metadata.get(METADATA_IMAGE), self.metadata.get(METADATA_LABELS)
        try:
            names = None if labels is None else as_labels(json.loads(labels))
            return None if image is None else ImageSpec.from_dict(json.loads(image)), names
        except (InputError, ValueError, RecursionError) as error:
            problem = f"its deploynorm metadata is damaged: {error}"
            raise ModelError(self.where, problem, fix="export it again") from error

    @cached_property
    def half_types(self) -> tuple[str, ...]:
        """The half types of the graph's values, the coarser last."""
        graph = self.to_ir().graph
        inner = (value for node in graph.all_nodes() for value in node.outputs)
        found = {value.dtype for value in (*graph.inputs, *graph.outputs, *graph.initializers.values(), *inner)}
        return tuple(name for dtype, name in ONNX_HALF.items() if dtype in found)

    @property
    def half_type(self) -> str | None:
        """The coarsest half type of the graph's values; None for a graph in full precision."""
        return self.half_types[-1] if self.half_types else None

    @cached_property
    def has_operator(self) -> bool:
        return any(node.domain == DOMAIN for node in all_nodes(self.proto.graph.node))

    @property
    def has_body(self) -> bool:
        """Whether the file brings the function bodies of our operators: of each that its graph holds."""
        bodies = {function.name for function in self.proto.functions if function.domain == DOMAIN}
        used = {node.op_type for node in all_nodes(self.proto.graph.node) if node.domain == DOMAIN}
        return bool(bodies) and used <= bodies

    @property
    def node_counts(self) -> Counter[str]:
        return node_counts(all_nodes(self.proto.graph.node))


OnnxSource: TypeAlias = str | Path | bytes | onnx.ModelProto | OnnxFile
"""What `OnnxFile.read` takes: a path, the bytes of a file, a model in memory, or what was read before."""


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, each followed by those of its subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type in _SUBGRAPHS:
                for graph in (attribute.g, *attribute.graphs):
                    yield from all_nodes(graph.node)


def node_counts(nodes: Iterable[onnx.NodeProto] | Iterable[ir.Node]) -> Counter[str]:
    """How many nodes there are of each operator; a custom operator with its domain before it."""
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes)


def size_bytes(model: ir.Model) -> int:
    """Bytes of all weights."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)


def save(model: ir.Model, path: Path | str, *, external_data: bool | None = None) -> None:
    """Writes the model, with its weights beside it in `<name>.data` where asked for, by default past 2 GB.

    An error leaves half a file: call it on a folder of `deploynorm.files`.
    """
    path = Path(path)
    if external_data is None:
        external_data = size_bytes(model) > _PROTOBUF_LIMIT
    if not external_data:
        ir.external_data.load_to_model(model)  # otherwise weights that are still on the disk would stay there
    data, _ = onnx_companions(path)
    if external_data and not data.name.isprintable():
        problem = "its file of weights would have a name that an ONNX file cannot hold"
        raise InputError(f"output {path.name}", problem, expected="text in UTF-8", fix="choose another output file")
    ir.save(model, path, external_data=data.name if external_data else None)


def _spec(where: str, value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or tensor.elem_type in (0, onnx.TensorProto.STRING):
        problem = f"input {value.name!r} is not a numeric tensor of known rank"
        raise ModelError(where, problem, fix="give it a type and shape in the graph")
    sizes = (dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)
    return TensorSpec(value.name, tuple(sizes), onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name)
