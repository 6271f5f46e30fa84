"""ncnn as a backend, converted by pnnx."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx.defs
import onnx_ir as ir

from deploynorm.errors import BackendError, InputError, ModelError
from deploynorm.files import scratch_folder
from deploynorm.onnx_file import OnnxFile, OnnxSource, save
from deploynorm.residual import constant
from deploynorm.run.base import Runner, check_feeds, closed_error
from deploynorm.run.converted import convert, standard_model

_Array = npt.NDArray[Any]
_Shapes = tuple[tuple[int, ...], ...]

_BATCHES: Final = (
    r'ex\.input\("in(\d+)", ncnn\.Mat\(.*batch_index=(\d+)\)',
    r"torch\.from_numpy\(out(\d+)\.numpy\(batch_index=(\d+)\)\)",
)
"""Where the program that pnnx writes for its user says on which axis it has taken the batch of an input, of an output
to be. That of a graph without convolutions has none, and blobs with one axis more."""


class _Net(NamedTuple):
    """A converted network, and on which axis each input and output has a batch for ncnn."""

    net: Any
    inputs: list[int]
    outputs: list[int]


class NcnnRunner(Runner):
    """Runs an ONNX model in ncnn on the CPU, in float32: as pnnx converts it, our nodes written in primitives first.

    The network is converted for a batch of one, and the images of a batch run one after the other; the first axis of
    each input and output is taken for it. It is converted for the sizes of an image when they are first fed, and again
    when they change.

    Args:
        model: A file, with its external data beside it, or a model in memory; see OnnxFile.read.
        threads: Threads of an inference; None leaves it to ncnn.
    """

    name = "ncnn (cpu)"

    def __init__(self, model: OnnxSource, *, threads: int | None = None) -> None:
        self._ncnn, self._pnnx = _import()
        file = OnnxFile.read(model)
        self._where, self.inputs, self.output_names = file.where, file.inputs, file.output_names
        self._model: ir.Model | None = standard_model(file, "ncnn", maps=True)
        _check_batch(self._where, self._model.graph)
        self._threads = threads
        self._shapes: _Shapes | None = None
        self._net: _Net | None = None

    @classmethod
    def check_available(cls) -> None:
        _import()

    def infer(self, feeds: Mapping[str, _Array]) -> dict[str, _Array]:
        if self._model is None:
            raise closed_error("NcnnRunner.infer")
        check_feeds("NcnnRunner.infer", self.inputs, feeds)
        arrays = [feeds[spec.name] for spec in self.inputs]
        batches = {array.shape[0] for array in arrays}
        if len(batches) != 1 or not all(array.size for array in arrays):
            problem = "ncnn takes the inputs image by image, as many of each, and none that is empty"
            raise InputError("NcnnRunner.infer", problem, got={name: array.shape for name, array in feeds.items()})
        shapes = tuple(array.shape[1:] for array in arrays)
        if shapes != self._shapes:
            self._shapes = self._net = None  # the old one goes before the new one takes memory
            self._net, self._shapes = self._converted(self._model, shapes), shapes
        images = [self._one(arrays, at) for at in range(*batches)]
        pairs = zip(self.output_names, zip(*images, strict=True), strict=True)
        return {name: np.concatenate(each) for name, each in pairs}

    def close(self) -> None:
        self._model = self._net = self._shapes = None

    def _converted(self, model: ir.Model, shapes: _Shapes) -> _Net:
        with scratch_folder() as folder:
            path = folder / "m.onnx"  # pnnx writes its files beside it, and names them after it
            save(model, path)
            param = folder / "m.ncnn.param"
            sizes = ",".join(f"[{','.join(map(str, (1, *shape)))}]f32" for shape in shapes)
            convert(self._where, "pnnx", [self._pnnx, path.name, f"inputshape={sizes}", "fp16=0"], param)
            net = self._ncnn.Net()
            net.opt.use_vulkan_compute = False
            for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
                setattr(net.opt, f"use_{name}", False)
            if self._threads is not None:
                net.opt.num_threads = self._threads
            if net.load_param(str(param)) != 0 or net.load_model(str(folder / "m.ncnn.bin")) != 0:
                raise ModelError(self._where, "ncnn does not load what pnnx makes of the model")
            program = (folder / "m_ncnn.py").read_text(encoding="utf-8")
        batches = []
        for kind, form, count in zip(("in", "out"), _BATCHES, (len(shapes), len(self.output_names)), strict=True):
            found = {int(number): int(axis) for number, axis in re.findall(form, program)}
            if sorted(found) != list(range(count)):
                problem = f"pnnx leaves other {kind}puts of the model than it has, or is of another release"
                raise ModelError(self._where, problem, got=sorted(found), expected=f"{count} {kind}puts")
            batches.append([found[number] for number in range(count)])
        return _Net(net, *batches)

    def _one(self, arrays: list[_Array], at: int) -> list[_Array]:
        """The outputs for one image of each input, each a batch of one."""
        assert self._model is not None
        assert self._net is not None
        outputs, images = [], [np.ascontiguousarray(array[at : at + 1]) for array in arrays]
        with self._net.net.create_extractor() as extractor:
            for index, (image, batch) in enumerate(zip(images, self._net.inputs, strict=True)):
                # A copy: a Mat of an array has only a pointer to it.
                extractor.input(f"in{index}", self._ncnn.Mat(image, batch_index=batch).clone())
            for index, (value, batch) in enumerate(zip(self._model.graph.outputs, self._net.outputs, strict=True)):
                code, blob = extractor.extract(f"out{index}")
                if code != 0:
                    got = [image.shape for image in images]
                    raise ModelError(self._where, f"ncnn failed at output {value.name!r} with code {code}", got=got)
                outputs.append(self._checked(value, np.array(blob.numpy(batch_index=batch))))
        return outputs

    def _checked(self, value: ir.Value, array: _Array) -> _Array:
        """ModelError where an output of one image has not the shape that the graph gives it."""
        assert value.shape is not None
        want = [1, *(size if isinstance(size, int) else None for size in value.shape[1:])]
        if len(want) != array.ndim or any(w not in (None, got) for w, got in zip(want, array.shape, strict=True)):
            problem = f"ncnn computes output {value.name!r} in another shape"
            raise ModelError(self._where, problem, got=array.shape, expected=str(value.shape))
        return array


def _import() -> tuple[Any, Path]:
    """The module ncnn, and the program pnnx; BackendError where one is not installed."""
    fix = "pip install 'deploynorm[ncnn]'"
    try:
        import ncnn
    except ImportError as error:
        raise BackendError("ncnn", f"the package cannot be imported: {error}", fix=fix) from error
    found = importlib.util.find_spec("pnnx")  # importing it would import torch
    folders = [] if found is None else list(found.submodule_search_locations or ())
    if not folders:
        raise BackendError("pnnx", "the package is not installed, which converts files for ncnn", fix=fix)
    return ncnn, Path(folders[0]) / "pnnx"


def _check_batch(where: str, graph: ir.Graph) -> None:
    """ModelError unless all inputs and outputs have images along the first axis, each computed by itself."""
    for value in graph.inputs:
        if value.shape is None or len(value.shape) != 4:
            problem = f"input {value.name!r}: ncnn is given images alone, and mistakes other ranks without a word"
            raise ModelError(where, problem, got=str(value.shape), expected="(N, C, H, W)")
    batch = next((value.shape[0] for value in graph.inputs if value.shape is not None), None)
    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            shape = value.shape
            if shape is None or len(shape) < 2 or shape[0] != batch or (isinstance(batch, int) and batch != 1):
                problem = f"{kind} {value.name!r}: ncnn has no batch, and its first axis is not a batch of one or any"
                raise ModelError(where, problem, got=str(shape), fix="export it with a batch that is dynamic, or 1")
    for node in graph.all_nodes() if batch != 1 else ():
        x = node.inputs[0] if node.inputs else None
        if x is None or not x.shape or x.shape[0] != batch:
            continue
        if 0 in _axes(node, len(x.shape)):
            problem = f"node {node.name or node.outputs[0].name}: {node.op_type} works across the images of a batch"
            raise ModelError(where, f"{problem}, which ncnn is given one by one", fix="export it with a batch of 1")


def _axes(node: ir.Node, rank: int) -> set[int]:
    """The axes along which an operator works on its first input as a whole, as far as they are known to be some."""
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm") or range(rank)[::-1]
        return {axis for axis, source in enumerate(order) if axis != source}
    if node.op_type.startswith("Reduce"):
        given = constant(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes")
        if given is None or len(given) == 0:  # all of them, or none
            return set() if node.attributes.get_int("noop_with_empty_axes", 0) else set(range(rank))
        return {int(axis) % rank for axis in given}
    attribute = node.attributes.get("axis")
    if attribute is None and onnx.defs.has(node.op_type, node.domain):
        default = onnx.defs.get_schema(node.op_type, domain=node.domain).attributes.get("axis")
        return set() if default is None else {int(default.default_value.i) % rank}
    return set() if attribute is None else {attribute.as_int() % rank}
