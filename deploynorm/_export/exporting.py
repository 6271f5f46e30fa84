"""nn.Module -> ONNX."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from deploynorm import onnx_file as graph
from deploynorm._export.half_graph import BFLOAT16_OPSET, refuse_types, round_fused_weights
from deploynorm._export.precision import dtype_of, kept_layers, to_precision
from deploynorm.contract import DOMAIN, MAX_OPSET, MIN_OPSET, TORCH_OP
from deploynorm.errors import InputError, ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.lowering import RMSNORM_OPSET, Lowering, lower, register_schema, translate
from deploynorm.trace import Dynamic, first_line, inference_copy, narrowed_axes, quiet, sizes_taken, trace

__all__ = ["DEFAULT_OPSET", "Exported", "export"]

DEFAULT_OPSET = 20


@dataclass(frozen=True)
class Exported:
    """An ONNX model and what is known of it.

    Attributes:
        model: The model as onnx_ir holds it; of any size.
        lowering: How FRN layers were written.
        dtype: The type of weights and activations, by name.
        kept_float32: Layers that stayed in float32 because they were named.
        keep_io_types: Whether inputs and outputs kept the network's own type.
        notes: What a user should know: axes that the network itself fixes.
    """

    model: ir.Model
    lowering: Lowering
    dtype: str
    kept_float32: tuple[str, ...] = ()
    keep_io_types: bool = False
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, shapes (a free axis by its name) and dtypes of the graph's inputs."""
        return tuple(_spec(value) for value in self.model.graph.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(str(value.name) for value in self.model.graph.outputs)

    @property
    def opset(self) -> int:
        return self.model.opset_imports[""]

    def node_counts(self) -> Counter[str]:
        """How many nodes of each operator the graph has; a custom operator with its domain before it."""
        return graph.node_counts(self.model.graph.all_nodes())

    def size_bytes(self) -> int:
        """Bytes of all weights."""
        return graph.size_bytes(self.model)

    def to_proto(self) -> onnx.ModelProto:
        """The model as onnx's protobuf; past 2 GB it can no longer be serialised in one piece."""
        return ir.to_proto(self.model)

    def save(self, path: Path | str, *, external_data: bool | None = None) -> None:
        """Writes the model, with its weights beside it in `<name>.data` where asked for or needed (2 GB).

        Args:
            path: The .onnx file; an existing one is overwritten.
            external_data: None decides by size.
        """
        graph.save(self.model, path, external_data=external_data)


def export(
    model: nn.Module,
    example_inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    keep_float32: Sequence[str] = (),
    keep_io_types: bool = False,
    dynamic: Dynamic | None = None,
    opset: int | None = None,
    lowering: Lowering = "custom",
    function: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Exports a network to ONNX, each FRN layer as one node.

    The network itself is left as it is: a copy is put in evaluation mode, on the CPU, and FRN layers of other
    projects in it are taken over (see `deploynorm.layers.adopt`). Fold first: `deploynorm.fold`.

    Args:
        model: Any network that torch.export can trace.
        example_inputs: Positional inputs of forward; sizes above 1 on the axes that are to be dynamic.
        dtype: Type of weights and activations; by default the network stays in its own. In half precision the
            parameters of FRN, and of norms that did not fold, stay in float32 (see `deploynorm._export.precision`).
        keep_float32: Names of layers that stay in float32 in a half network, with casts around them; `*` stands for
            anything.
        keep_io_types: Whether inputs and outputs keep the network's own type, with casts inside.
        dynamic: Axes that must stay free ("none", "batch", "spatial", "all"). None frees each axis that the
            network leaves free, and tells the others in `notes`.
        opset: 18 to 23; 20 by default, 22 for bfloat16, 23 for the lowering "rmsnorm".
        lowering: "custom" (one node a layer), "primitives" or "rmsnorm" (standard operators alone).
        function: Whether the custom node's body goes with the model, so that any runtime can run it.
        input_names: Names of the graph's inputs; by default those of forward's arguments.
        output_names: By default the keys of a dict that the network returns, else "output", or "output_0", ...
        metadata: Entries for the model's metadata_props.

    Returns:
        The model; nothing is written.

    Raises:
        InputError: An unsupported opset, an example input that is not a tensor, or no layer of a name to be kept.
        ModelError: The network cannot be traced or translated, fixes an axis that must stay free, has a local
            function with the operator's name, or cannot take the lowering; a weight or an operator does not take dtype.

    Warns:
        RuntimeWarning: dtype loses whole channels of a weight.
    """
    own = dtype_of(model)
    dtype = own if dtype is None else dtype
    if opset is None:
        opset = BFLOAT16_OPSET if dtype == torch.bfloat16 else DEFAULT_OPSET
        opset = RMSNORM_OPSET if lowering == "rmsnorm" else opset
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise InputError("export", "unsupported opset", got=opset, expected=f"{MIN_OPSET} to {MAX_OPSET}")
    examples, takes = tuple(example_inputs), None
    if dtype == own and not keep_float32:
        twin = inference_copy(model)
    else:
        if dynamic != "none" and all(isinstance(example, Tensor) for example in examples):
            # Asked of the network as it is: in float16 a CPU takes twenty times as long.
            takes = sizes_taken(inference_copy(model), [_cast(example, own).cpu() for example in examples])
        twin = to_precision(model, dtype, keep_float32=keep_float32, keep_io_types=keep_io_types)
        examples = tuple(_cast(example, own if keep_io_types else dtype) for example in examples)
    with _told_of(dtype, own):
        program = trace(twin, examples, dynamic, takes=takes)
        narrowed = narrowed_axes(program)
        if narrowed:  # the file would compute something else at the other sizes, and say nothing
            kinds = {axis.kind for axis in narrowed}
            program = trace(twin, examples, dynamic, fixed=kinds, takes=takes)
    onnx_model = _translate(program, opset, input_names, output_names)
    _name_axes(onnx_model)
    round_fused_weights(onnx_model)
    refuse_types(onnx_model)
    lower(onnx_model, lowering, function=function)
    onnx_model.producer_name = "deploynorm"
    onnx_model.metadata_props.update(metadata or {})
    notes = [f"fixed, since it holds for some sizes only: {axis.told}" for axis in narrowed]
    if dynamic is None:
        notes += _fixed_axes(onnx_model)
    return Exported(
        onnx_model,
        lowering,
        str(dtype).removeprefix("torch."),
        kept_layers(twin, keep_float32),
        keep_io_types,
        tuple(notes),
    )


def _cast(example: object, dtype: torch.dtype) -> Any:
    return example.to(dtype) if isinstance(example, Tensor) and example.is_floating_point() else example


@contextmanager
def _told_of(dtype: torch.dtype, own: torch.dtype) -> Iterator[None]:
    """Adds to an error of the trace that the network was converted, which is most likely its cause."""
    try:
        yield
    except ModelError as error:
        if dtype == own:
            raise
        raise ModelError(
            error.where,
            f"{error.problem.rstrip('.')} (the network was converted from {own} to {dtype})",
            got=error.got,
            expected=error.expected,
            fix="where types do not fit, keep the layer that makes tensors of its own type in float32 "
            f"(--keep-float32); else {error.fix}",
        ) from error


def _translate(
    program: torch.export.ExportedProgram,
    opset: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    register_schema()
    if output_names is None:
        output_names = _output_names(program)
    table = {getattr(getattr(torch.ops, DOMAIN), TORCH_OP).default: translate}
    with quiet(), _silenced("torch.onnx", "onnxscript"):
        try:
            onnx_program = torch.onnx.export(
                program,
                (),
                input_names=input_names,
                output_names=output_names,
                opset_version=opset,
                custom_translation_table=table,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            raise ModelError(
                "export",
                f"torch.onnx.export cannot translate the network: {_cause(error)}",
                fix="replace the operator it names, or export that part separately",
            ) from error
    assert onnx_program is not None
    written = onnx_program.model.opset_imports[""]
    if written != opset:
        # torch logs a failed conversion and goes on with another opset; a user who asked for one wants that one.
        raise ModelError(
            "export",
            "torch.onnx.export could not convert the graph",
            got=f"opset {written}",
            expected=f"opset {opset}",
            fix="choose another --opset",
        )
    return onnx_program.model


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    """The keys, of a network that returns a flat dict; else numbers."""
    count = len(program.graph_signature.user_outputs)
    returned = program.call_spec.out_spec
    if returned is not None and returned.type is dict and all(child.is_leaf() for child in returned.children()):
        names = [str(key) for key in returned.context]
        if not set(names) & set(program.graph_signature.user_inputs):
            return names
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _name_axes(model: ir.Model) -> None:
    """Renames torch's symbols (s77) on every value: N, then L, H and W, or D, H and W."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        spatial = {3: "L", 4: "HW", 5: "DHW"}.get(len(value.shape), "")
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) or size.value is None or size.value in names:
                continue
            letter = "N" if axis == 0 else spatial[axis - 2] if 2 <= axis < 2 + len(spatial) else f"axis_{axis}"
            names[size.value] = letter if letter not in names.values() else f"{letter}_{value.name}"
    if not names:
        return
    symbols = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in _all_values(model.graph):
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            size
            if isinstance(size, int) or size.value is None
            else ir.SymbolicDim(symbols.sub(lambda found: names[found.group()], size.value))
            for size in value.shape
        )


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)]


def _fixed_axes(model: ir.Model) -> list[str]:
    told = []
    for value in model.graph.inputs:
        assert value.shape is not None
        fixed = [f"{axis} ({size})" for axis, size in enumerate(value.shape) if axis != 1 and isinstance(size, int)]
        if fixed:
            told.append(f"the network fixes axis {', '.join(fixed)} of input {value.name}")
    return told


def _spec(value: ir.Value) -> TensorSpec:
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(str(value.name), shape, value.dtype.numpy().name)


@contextmanager
def _silenced(*names: str) -> Iterator[None]:
    """Keeps the named loggers quiet: what matters of their output comes back as an exception."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The innermost cause, which names the operator; the outer ones tell of torch's own steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"
