"""A model as a graph of onnx-graphsurgeon, and back, with all that onnx-graphsurgeon leaves out.

It reads what it knows of each message, and writes a new one. Here what it does not know is put back, by the Python
objects of its graph: a node or tensor that is still there gets again what its message had besides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
from google.protobuf.message import Message
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploynorm.contract import DOMAIN, MIN_OPSET, OPERATORS
from deploynorm.dtypes import HALF
from deploynorm.errors import BackendError, ModelError
from deploynorm.lowering import frn_nodes, lower
from deploynorm.onnx_file import OnnxFile
from deploynorm.quiet import first_line, quiet
from deploynorm.rewrite.intake import check_graph, drop_bodies, infer_shapes, without_inferred_sizes
from deploynorm.rewrite.opset import raise_opset

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

_SMALL: Final = 1024
"""Bytes of a weight that stays in its message; larger ones are kept aside, so that 2 GB are no limit."""
_ASIDE: Final = "deploynorm-weight-"
_READ: Final = {
    "ModelProto": {"graph", "functions", "opset_import", "producer_name", "producer_version", "ir_version"},
    "GraphProto": {"node", "name", "initializer", "doc_string", "input", "output", "value_info"},
    "FunctionProto": {"name", "domain", "input", "output", "node", "attribute", "attribute_proto", "opset_import"}
    | {"doc_string"},
    "NodeProto": {"input", "output", "name", "op_type", "domain", "attribute", "overload"},
    "ValueInfoProto": {"name", "type"},
}
"""The fields that onnx-graphsurgeon reads and writes, or that are put back apart from the others."""
_KINDS: Final = ("tensor_type", "sequence_type", "sparse_tensor_type")
"""Types of values that it writes."""


def graphsurgeon() -> Any:
    """The module onnx_graphsurgeon; BackendError where it is not installed."""
    try:
        import onnx_graphsurgeon
    except (ImportError, AttributeError) as error:  # of 0.5 with an onnx that has dropped what it uses
        fix = "pip install 'deploynorm[surgery]'"
        raise BackendError("onnx-graphsurgeon", f"the package cannot be imported: {error}", fix=fix) from error
    return onnx_graphsurgeon


def type_name(tensor: gs.Tensor) -> str:
    """The tensor's element type by NumPy's name; "unknown" where it is not known."""
    if tensor.dtype is None:
        return "unknown"
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype) if isinstance(tensor.dtype, int) else tensor.dtype
    return np.dtype(dtype).name


class Operation:
    """One model on the table.

    Attributes:
        graph: The onnx_graphsurgeon.Graph, to be changed at will.
    """

    graph: gs.Graph

    def __init__(self, model: ir.Model) -> None:
        surgeon = graphsurgeon()
        model = model.clone()  # its weights are those of the model
        with quiet("onnx_ir", "onnxscript"):
            raise_opset(model, MIN_OPSET)
            RemoveUnusedNodesPass()(model)  # or what nothing reads, and is not read here, would seem to be changed
            self._weights = _set_aside(model)
            inferred = model.clone()
            with suppress(ModelError):  # then less is known of its values
                infer_shapes(inferred)
        without_inferred_sizes(inferred, model)
        self._source, read = ir.to_proto(model), ir.to_proto(inferred)
        for node in (node for body in _bodies(read) for node in body.node):
            kept = [attribute for attribute in node.attribute if not _is_unreadable(attribute)]
            if len(kept) < len(node.attribute):
                del node.attribute[:]
                node.attribute.extend(kept)
        with _hushed():
            self.graph = surgeon.import_onnx(read)
        # What each object of the graph was read from, by its id; with the object, or another could get its id.
        self._nodes: dict[int, tuple[gs.Node, onnx.NodeProto]] = {}
        self._values: dict[int, tuple[gs.Tensor, object, onnx.ValueInfoProto | None]] = {}
        self._bodies: dict[int, tuple[gs.Graph, Message]] = {}
        self._remember(self.graph, self._source.graph)
        for function, proto in zip(self.graph.functions, self._source.functions, strict=True):
            self._remember(function, proto)
        constants = {name: each for name, each in self.graph.tensors().items() if isinstance(each, surgeon.Constant)}
        inputs = enumerate(self._source.graph.input)
        self._fed = [(place, constants[info.name], info) for place, info in inputs if info.name in constants]

    def _remember(self, body: gs.Graph, proto: Any) -> None:
        gs = graphsurgeon()
        self._bodies[id(body)] = body, proto
        infos = {info.name: info for info in proto.value_info}
        ends = {} if isinstance(proto, onnx.FunctionProto) else {x.name: x for x in (*proto.input, *proto.output)}
        for tensor in body.tensors().values():
            info = infos.get(tensor.name)
            if isinstance(tensor, gs.Variable):
                info = ends.get(tensor.name, info)
                if tensor.type not in _KINDS:
                    tensor.dtype = tensor.shape = None
            elif isinstance(stub := getattr(tensor._values, "tensor", None), onnx.TensorProto):
                tensor._values.load = partial(_array, self._weight(stub) or stub)
            self._values.setdefault(id(tensor), (tensor, _kind(tensor), info))
        for node, source in zip(body.nodes, proto.node, strict=True):
            self._nodes[id(node)] = node, source
            for attribute in source.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    self._remember(node.attrs[attribute.name], attribute.g)

    def _weight(self, stub: object) -> ir.TensorProtocol | None:
        """What was set aside, by what stands for it; None for anything else."""
        location = ""
        if isinstance(stub, ir.ExternalTensor):
            location = str(stub.location)
        elif isinstance(stub, onnx.TensorProto):
            location = next((entry.value for entry in stub.external_data if entry.key == "location"), "")
        return self._weights[int(location.removeprefix(_ASIDE))] if location.startswith(_ASIDE) else None

    def result(self) -> tuple[ir.Model, bool]:
        """The graph as a model, sorted, without what no output needs; and whether it is another than at first.

        Raises:
            ModelError: It is no valid graph.
        """
        gs = graphsurgeon()
        held: list[tuple[Any, Any]] = []
        try:
            with _hushed():
                held = self._set_new_weights_aside()
                proto = gs.export_onnx(self.graph, do_type_check=False)
        except Exception as error:
            raise ModelError("surgery", f"onnx-graphsurgeon cannot write the graph: {first_line(error)}") from error
        finally:
            for tensor, values in held:
                tensor._values = values
        self._put_back(self.graph, proto.graph)
        for function, written in zip(self.graph.functions, proto.functions, strict=True):
            self._put_back(function, written)
        _put_rest(self._source, proto)
        self._put_back_inputs(proto.graph)
        return self._finished(proto)

    def _set_new_weights_aside(self) -> list[tuple[gs.Constant, Any]]:
        """Constants of the graph that were made or read, with their arrays; in the graph now stands where these are."""
        gs, held = graphsurgeon(), []
        for body in (self.graph, *self.graph.subgraphs(recursive=True)):
            for tensor in body.tensors().values():
                values = tensor._values if isinstance(tensor, gs.Constant) else None
                if isinstance(values, np.ndarray) and values.dtype.kind != "O" and tensor.export_dtype == tensor.dtype:
                    held.append((tensor, values))
                    self._weights.append(ir.tensor(values, name=tensor.name))
                    stub = ir.to_proto(_stub(self._weights[-1], len(self._weights) - 1))
                    tensor._values = gs.ir.tensor.LazyValues(stub)
        return held

    def _put_back(self, body: gs.Graph, proto: Any, outer: Collection[int] = ()) -> None:
        """Gives the message of a graph or function, and all in it, what its object was read with besides."""
        tensors = body.tensors()
        added = len(proto.node) - len(body.nodes)  # in front of a function's nodes, for its constants
        for node, written in zip(body.nodes, proto.node[added:], strict=True):
            _, source = self._nodes.get(id(node), (node, None))
            if source is not None:
                _put_rest(source, written)
                if (source.op_type, source.domain) == (written.op_type, written.domain):
                    written.overload = source.overload
                    _put_back_attributes(source, written)
            for attribute in written.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    self._put_back(node.attrs[attribute.name], attribute.g, {*outer, *map(id, tensors.values())})
        if id(body) in self._bodies:
            _put_rest(self._bodies[id(body)][1], proto)
        if isinstance(proto, onnx.GraphProto):
            # A subgraph that reads a weight of a graph around it was given a copy.
            _set(proto.initializer, [x for x in proto.initializer if id(tensors[x.name]) not in outer])
            _set(proto.quantization_annotation, [x for x in proto.quantization_annotation if x.tensor_name in tensors])
            self._put_back_infos(tensors, proto)

    def _put_back_infos(self, tensors: Mapping[str, gs.Tensor], proto: onnx.GraphProto) -> None:
        """Types and shapes that nobody changed stand as they were read; those that were inferred go again."""
        gs, infos = graphsurgeon(), []
        for field in (proto.input, proto.output, proto.value_info):
            for info in field:
                tensor, kind, source = self._values.get(id(tensors[info.name]), (None, None, None))
                same = tensor is not None and kind == _kind(tensor)
                if source is not None:
                    if same:
                        info.ClearField("type")
                        info.type.MergeFrom(source.type)
                    _put_rest(source, info)
                if field is proto.value_info and not (same and source is None):
                    infos.append(info)
        for tensor in tensors.values():
            _, kind, source = self._values.get(id(tensor), (None, None, None))
            if source is not None and isinstance(tensor, gs.Constant) and kind == _kind(tensor):
                infos.append(source)
        _set(proto.value_info, infos)

    def _put_back_inputs(self, proto: onnx.GraphProto) -> None:
        """Inputs with a value of their own, which are constants to onnx-graphsurgeon."""
        names, inputs = {tensor.name for tensor in proto.initializer}, list(proto.input)
        for place, tensor, source in self._fed:
            if tensor.name in names:
                info = onnx.ValueInfoProto()
                info.CopyFrom(source)
                info.name = tensor.name
                inputs.insert(place, info)
        _set(proto.input, inputs)

    def _finished(self, proto: onnx.ModelProto) -> tuple[ir.Model, bool]:
        bodies = (self.graph, *self.graph.subgraphs(recursive=True), *self.graph.functions)
        ours = [node for body in bodies for node in body.nodes if node.domain == DOMAIN and node.op in OPERATORS]
        halves = {node.inputs[0].name: type_name(node.inputs[0]) for node in ours}
        try:
            model = ir.from_proto(proto)
            RemoveUnusedNodesPass()(model)
            changed = _canonical(ir.to_proto(model)) != _canonical(self._source)
            model.graph.sort()
            for function in model.functions.values():
                function.sort()
        except Exception as error:  # onnx_ir has no error of its own for a cycle, or a name that is there twice
            raise ModelError("surgery", f"the graph is not valid any more: {first_line(error)}") from error
        for node in frn_nodes(model.graph):
            x = node.inputs[0]
            if x is not None and x.dtype is None and halves.get(str(x.name)) in HALF:
                x.dtype = ir.DataType[halves[str(x.name)].upper()]  # which the body depends on
        drop_bodies(model)
        lower(model, "custom")
        try:
            check_graph(OnnxFile("surgery", None, ir.to_proto(model)))
        except ModelError as error:
            raise ModelError("surgery", f"the graph is not valid any more: {error.problem}") from error
        for graph in (model.graph, *model.graph.subgraphs()):
            for value in graph.initializers.values():
                if (weight := self._weight(value.const_value)) is not None:
                    value.const_value = weight
        return model, changed


def _set_aside(model: ir.Model) -> list[ir.TensorProtocol]:
    """Puts stubs in the place of the large weights, in place; returns these."""
    weights: list[ir.TensorProtocol] = []
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING:
                continue
            if tensor.nbytes > _SMALL:
                weights.append(tensor)
                value.const_value = _stub(tensor, len(weights) - 1)
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
    return weights


def _stub(tensor: ir.TensorProtocol, place: int) -> ir.ExternalTensor:
    """What stands for a weight that was set aside."""
    location = f"{_ASIDE}{place}"
    return ir.ExternalTensor(location, None, None, tensor.dtype, shape=tensor.shape, name=str(tensor.name))  # type: ignore[arg-type]


def _array(tensor: ir.TensorProtocol | onnx.TensorProto) -> np.ndarray[Any, Any]:
    return np.array(onnx.numpy_helper.to_array(tensor) if isinstance(tensor, onnx.TensorProto) else tensor.numpy())


def _bodies(proto: onnx.ModelProto) -> Iterator[Any]:
    """The graph, the functions, and their subgraphs."""
    waiting: list[Any] = [proto.graph, *proto.functions]
    while waiting:
        body = waiting.pop()
        yield body
        waiting += [x.g for node in body.node for x in node.attribute if x.type == onnx.AttributeProto.GRAPH]


def _is_unreadable(attribute: onnx.AttributeProto) -> bool:
    """Whether onnx-graphsurgeon fails on an attribute, or drops it."""
    kind, kinds = attribute.type, onnx.AttributeProto
    if attribute.ref_attr_name:
        return False
    if kind in (kinds.STRING, kinds.STRINGS):
        try:
            texts = [text.decode() for text in ([attribute.s] if kind == kinds.STRING else attribute.strings)]
        except UnicodeDecodeError:
            return True
        return not texts
    if kind in (kinds.INTS, kinds.FLOATS):
        return not (attribute.ints or attribute.floats)
    return kind not in (kinds.FLOAT, kinds.INT, kinds.TENSOR, kinds.GRAPH)


def _kind(tensor: gs.Tensor) -> object:
    """A tensor's type and shape, to compare."""
    return tensor.dtype, None if tensor.shape is None else tuple(tensor.shape)


def _put_back_attributes(source: onnx.NodeProto, written: onnx.NodeProto) -> None:
    """Attributes that were not read, and the docs of the others; in the order of the source."""
    found = {attribute.name: attribute for attribute in written.attribute}
    for attribute in source.attribute:
        if attribute.name in found:
            found[attribute.name].doc_string = attribute.doc_string
    left = {attribute.name: attribute for attribute in source.attribute if _is_unreadable(attribute)} | found
    names = [attribute.name for attribute in source.attribute if attribute.name in left]
    _set(written.attribute, [left[name] for name in dict.fromkeys([*names, *left])])


def _put_rest(source: Any, written: Any) -> None:
    """Sets the fields of a message that onnx-graphsurgeon leaves out, as they were in the message that it read."""
    for field, value in source.ListFields():
        if field.name not in _READ[source.DESCRIPTOR.name]:
            if field.is_repeated:
                _set(getattr(written, field.name), value)
            elif isinstance(value, Message):
                getattr(written, field.name).CopyFrom(value)
            else:
                setattr(written, field.name, value)


def _set(container: Any, items: Sequence[Any]) -> None:
    kept = list(items)
    del container[:]
    container.extend(kept)


def _canonical(model: onnx.ModelProto) -> bytes:
    """The bytes of a model in one order of its weights and infos, to compare."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for container in (copy.graph.initializer, copy.graph.value_info):
        _set(container, sorted(container, key=lambda each: each.name))
    return bytes(copy.SerializeToString(deterministic=True))


@contextmanager
def _hushed() -> Iterator[None]:
    """Keeps what onnx-graphsurgeon prints from the user: what matters is raised."""
    logger = graphsurgeon().logger.G_LOGGER
    level = logger.severity
    logger.severity = logger.CRITICAL
    try:
        yield
    finally:
        logger.severity = level
