"""nn.Module -> ONNX."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import nn

from deploynorm import onnx_file
from deploynorm._adopt import adopted, adopted_notes
from deploynorm._export.names import (
    as_names,
    as_patterns,
    by_argument,
    default_output_names,
    name_axes,
    name_inputs_and_outputs,
)
from deploynorm._export.older_opset import to_older_opset
from deploynorm._export.precision import DTYPES, cast_floats, dtype_name, dtype_of, kept_layers, to_precision
from deploynorm._export.translation import BFLOAT16_OPSET, to_onnx
from deploynorm.contract import LOWERINGS, MAX_OPSET, METADATA_SIZES, MIN_OPSET, PRODUCER, Lowering
from deploynorm.errors import InputError, ModelError
from deploynorm.files import as_path, onnx_companions, staging
from deploynorm.foreign import frn_note, loose_frn, loose_mabn, mabn_note
from deploynorm.inputs import TensorSpec, row_groups, sizes_to_dict
from deploynorm.lowering import lower
from deploynorm.residual import fuse_residuals, split_residuals
from deploynorm.tables import table
from deploynorm.trace import (
    Dynamic,
    ExampleInputs,
    Examples,
    Sizes,
    branches,
    dynamic_places,
    find_sizes,
    inference_copy,
    narrowed_axes,
    trace,
    unwrapped,
)

DEFAULT_OPSET = 20


@dataclass(frozen=True)
class Exported:
    """An ONNX model and what is known of it; `print` shows its nodes and notes.

    Attributes:
        model: The model as onnx_ir holds it; of any size.
        inputs: Names, shapes (a dynamic axis by its name), dtypes and known sizes of the graph's inputs.
        lowering: How FRN layers were written.
        dtype: The type of weights and activations, by name.
        kept_float32: Layers that stayed in float32 because they were named.
        keep_io_types: Whether inputs and outputs kept the network's own type.
        notes: What a user should know: which sizes the network takes, and axes that it fixes.
        changed_buffers: Buffers, and parameters, that forward changes; in the file each call starts from their values
            of now.
        narrowed: Why axes are fixed that the network itself would change: it branches on "batch" or "spatial" sizes.
    """

    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    lowering: Lowering
    dtype: str
    kept_float32: tuple[str, ...] = ()
    keep_io_types: bool = False
    notes: tuple[str, ...] = ()
    changed_buffers: tuple[str, ...] = ()
    narrowed: Mapping[str, str] = field(default_factory=dict)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(str(value.name) for value in self.model.graph.outputs)

    @property
    def row_groups(self) -> tuple[tuple[str, ...], ...]:
        """See `deploynorm.run.base.Runner`."""
        return row_groups(self.inputs, [_spec(value, 0, None) for value in self.model.graph.outputs])

    @property
    def opset(self) -> int:
        return self.model.opset_imports[""]

    def node_counts(self) -> Counter[str]:
        """How many nodes of each operator the graph has; a custom operator with its domain before it."""
        return onnx_file.node_counts(self.model.graph.all_nodes())

    def to_proto(self) -> onnx.ModelProto:
        """The model as onnx's protobuf; past 2 GB it can no longer be serialised in one piece."""
        return ir.to_proto(self.model)

    def save(self, path: Path | str, *, external_data: bool | None = None) -> None:
        """Writes the model, with its weights beside it in `<name>.data` where asked for or needed (2 GB).

        Args:
            path: The .onnx file; an existing one is replaced when the new one is whole, and its weights and manifest
                are removed.
            external_data: None decides by size.

        Raises:
            InputError: The file cannot be written there.
        """
        path = as_path("Exported.save", path)
        with staging(path, companions=onnx_companions(path)) as folder:
            onnx_file.save(self.model, folder / path.name, external_data=external_data)

    def __str__(self) -> str:
        nodes = table("Nodes", ("operator", "count"), sorted(self.node_counts().items()))
        return "\n".join([nodes, *([""] if self.notes else []), *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__  # for notebooks, where the graph would fill pages


def export(
    model: nn.Module,
    example_inputs: ExampleInputs | Examples,
    *,
    dtype: torch.dtype | str | None = None,
    keep_float32: Sequence[str] = (),
    keep_io_types: bool = False,
    dynamic: Dynamic | None = None,
    opset: int | None = None,
    lowering: Lowering = "custom",
    function: bool = True,
    residual: bool = True,
    input_names: str | Sequence[str] | None = None,
    output_names: str | Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    sizes: Sizes | None = None,
) -> Exported:
    """Exports a network to ONNX, each FRN layer as one node, with what is added behind it; nothing is written.

    The network itself is left as it is: a copy is put in evaluation mode, on the CPU, FRN and MABN layers of other
    projects in it become ours (see `deploynorm.adopt`), and FRN that no layer has for itself is fused in the graph (see
    `deploynorm.rewrite.fuse`). Fold first: `deploynorm.fold`.

    Args:
        model: Any network that torch.export can trace.
        example_inputs: The only input, inputs in the order of forward's arguments, or by the names of arguments (those
            of a call model(x, shift=y) are {"x": x, "shift": y}). Sizes above 1 on dynamic spatial axes.
        dtype: Type of weights and activations; by default the network stays in its own. In half precision the
            parameters of FRN, and of norms that did not fold, stay in float32.
        keep_float32: Names of layers that stay in float32 in a half network, with casts around them; or patterns (*).
        keep_io_types: Whether inputs and outputs keep the network's own type, with casts inside.
        dynamic: Axes that must be dynamic: "none", "batch", "spatial", "all", or by input and axis, with their names
            ({"x": {0: "N", 2: "H"}}). None makes each axis dynamic that the network takes in other sizes; `notes` has
            the others.
        opset: 18 to 23, or from 13 for "primitives"; 20 by default, 22 for bfloat16, 23 for "rmsnorm".
        lowering: "custom" (one node a layer), "primitives" or "rmsnorm" (standard operators alone).
        function: Whether the custom nodes' bodies go with the model, for runtimes without our library.
        residual: Whether an FRN without threshold, an addition and the threshold behind it become one custom node.
        input_names: Names of the graph's inputs, in the order of the examples; by default those of forward's arguments.
        output_names: By default the keys of a dict that the network returns, else "output", or "output_0", ...
        metadata: Entries for the model's metadata_props.
        sizes: What `deploynorm.trace.find_sizes` found, where it was asked already.

    Raises:
        InputError: An unsupported opset, an example input that is not a tensor, no layer of a name to be kept, or names
            that are empty, double or too many.
        ModelError: The network cannot be traced or translated, fixes an axis that must be dynamic, has a local
            function with the operator's name, or cannot take the lowering; a weight or an operator does not take dtype.

    Warns:
        RuntimeWarning: dtype loses whole channels of a weight.
    """
    model = unwrapped(model)
    given, opset = check_options(dtype, opset, lowering)
    own = dtype_of(model)
    dtype = own if given is None else given
    if dtype == torch.bfloat16 and opset is None:
        opset = BFLOAT16_OPSET
    opset = DEFAULT_OPSET if opset is None else opset
    keep_float32 = as_patterns(keep_float32)
    examples = Examples.of("export", model, example_inputs)
    model, changes = adopted(model, examples)
    arguments = examples.names
    given_names = as_names("input_names", input_names, len(examples))
    inputs = arguments if given_names is None else examples.by_argument(given_names)
    outputs = as_names("output_names", output_names)
    if both := set(inputs) & set(outputs or ()):
        raise InputError("export", "an input and an output of one name", got=", ".join(sorted(both)))
    if sizes is None and dynamic != "none":
        # Asked of the network as it is: in float16 a CPU takes twenty times as long.
        sizes = find_sizes(inference_copy(model), examples.replaced(x.cpu() for x in cast_floats(examples, own)))
    axis_names: dict[tuple[int, int], str] = {}
    dynamic = by_argument(dynamic, inputs, arguments)
    if isinstance(dynamic, Mapping):
        for name, axes in dynamic.items():
            axis_names |= {(i, axis): axes[axis] for i, axis in dynamic_places(examples, {name: axes})}
    if dtype == own and not keep_float32:
        twin = inference_copy(model)
    else:
        twin = to_precision(model, dtype, keep_float32=keep_float32, keep_io_types=keep_io_types)
        examples = examples.replaced(cast_floats(examples, own if keep_io_types else dtype))
    try:
        program = trace(twin, examples, dynamic, sizes=sizes)
        # At the other sizes the file would compute something else, and say nothing.
        # Of axes that must be dynamic `trace` has asked the same.
        narrowed: dict[str, str] = {}
        while dynamic is None:
            more = narrowed_axes(program) or branches(program, twin, examples, sizes)
            if set(more.values()) <= set(narrowed.values()):
                break
            narrowed |= more
            program = trace(twin, examples, dynamic, fixed=set(narrowed.values()), sizes=sizes)
    except ModelError as error:
        if dtype == own:
            raise
        # Most likely because the network was converted.
        problem = f"{error.problem.rstrip('.')} (the network was converted from {own} to {dtype})"
        fix = "where types do not fit, keep the layer that makes tensors of its own type in float32 (--keep-float32)"
        fix = f"{fix}; else {error.fix}"
        raise ModelError(error.where, problem, got=error.got, expected=error.expected, fix=fix) from error
    onnx_model, changed = to_onnx(program, max(opset, MIN_OPSET))
    count = len(onnx_model.graph.outputs)  # less than the network returns, where some of that is None
    outputs = as_names("output_names", outputs, count) or tuple(default_output_names(program, count))
    name_inputs_and_outputs(onnx_model, inputs, outputs)
    name_axes(onnx_model, axis_names)
    onnx_model, fused = _fused(onnx_model)
    foreign = [*adopted_notes(changes), *fused, *frn_note(loose_frn(onnx_model.graph)), *mabn_note(loose_mabn(program))]
    if residual and lowering == "custom":
        fuse_residuals(onnx_model)
    else:  # standard operators would gain nothing
        split_residuals(onnx_model)
    lower(onnx_model, lowering, function=function)
    if opset < MIN_OPSET:
        to_older_opset(onnx_model, opset)
    specs = tuple(_spec(value, i, sizes) for i, value in enumerate(onnx_model.graph.inputs))
    notes = [f"fixed, since it holds for some sizes only: {axis}" for axis in narrowed]
    notes += foreign
    if changed:
        notes.append(f"forward changes buffers, which the file keeps as they are now: {', '.join(changed)}")
    if dynamic is None:
        # Where no map may change, a note of the sizes says so.
        notes += _fixed_axes(specs, batch_only=sizes is not None and "spatial" not in sizes.kinds)
    if sizes is not None:
        places = {(i, axis) for i, x in enumerate(specs) for axis, size in enumerate(x.shape) if isinstance(size, str)}
        notes += sizes.notes(places, inputs)
    onnx_model.producer_name = PRODUCER
    onnx_model.metadata_props.update(metadata or {})
    onnx_model.metadata_props[METADATA_SIZES] = json.dumps(sizes_to_dict(specs, notes))
    kept = kept_layers(twin, keep_float32)
    return Exported(
        onnx_model, specs, lowering, dtype_name(dtype), kept, keep_io_types, tuple(notes), changed, narrowed
    )


def _fused(model: ir.Model) -> tuple[ir.Model, list[str]]:
    """The model with FRN that is in loose operators fused, and what to tell of it; itself where there is none."""
    if not loose_frn(model.graph):
        return model, []
    from deploynorm.rewrite.fuse import fuse_nodes
    from deploynorm.rewrite.intake import prepared, without_inferred_sizes

    work = prepared(model, model.opset_imports[""])
    changes = fuse_nodes(work)
    count = sum(change.outcome == "rewritten" for change in changes)
    if not count:
        return model, []
    without_inferred_sizes(work, model)
    return work, [f"fused in the graph: {count} FRN in loose operators"]


def check_options(
    dtype: torch.dtype | str | None, opset: int | None, lowering: str
) -> tuple[torch.dtype | None, int | None]:
    """The type, which may be given by its name, and the opset that the lowering needs; raises InputError for others."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError("dtype", "not a type for a network", got=repr(dtype), expected=", ".join(DTYPES))
        dtype = DTYPES[dtype]
    if lowering not in tuple(LOWERINGS):  # a list, which has no hash, is none of them
        raise InputError("lowering", "unknown", got=repr(lowering), expected=", ".join(LOWERINGS))
    if opset is None and LOWERINGS[lowering].min_opset > DEFAULT_OPSET:
        opset = LOWERINGS[lowering].min_opset
    number: object = opset
    least = min(LOWERINGS[lowering].min_opset, MIN_OPSET)
    if number is not None and not (isinstance(number, int) and least <= number <= MAX_OPSET):
        earliest, row = min(LOWERINGS.items(), key=lambda item: item[1].min_opset)
        fix = None if earliest == lowering else f"--lowering {earliest} begins at {row.min_opset}"
        expected = f"{least} to {MAX_OPSET}"
        raise InputError("export", "unsupported opset", got=opset, expected=expected, fix=fix)
    return dtype, opset


def _fixed_axes(specs: Sequence[TensorSpec], *, batch_only: bool) -> list[str]:
    notes = []
    for spec in specs:
        axes = (axis for axis in range(len(spec.shape)) if axis == 0 or (axis > 1 and not batch_only))
        if fixed := [f"{axis} ({spec.shape[axis]})" for axis in axes if isinstance(spec.shape[axis], int)]:
            notes.append(f"the network fixes axis {', '.join(fixed)} of input {spec.name}")
    return notes


def _spec(value: ir.Value, position: int, sizes: Sizes | None) -> TensorSpec:
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    known = () if sizes is None else sizes.of_input(position)
    return TensorSpec(str(value.name), shape, value.dtype.numpy().name, known)
