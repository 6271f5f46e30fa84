"""nn.Module -> nn.Module: a network in another floating type."""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from deploynorm import contract, dtypes
from deploynorm.errors import InputError, ModelError
from deploynorm.layers._precision import FullPrecisionBuffers
from deploynorm.layers.functional import compute_dtype
from deploynorm.trace import ExampleInputs, Examples, inference_copy, is_archive

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in contract.DTYPES}
"""The types that a network can be converted to, by name."""

HALF = tuple(DTYPES[name] for name in dtypes.HALF)

_WIDE = (FullPrecisionBuffers, nn.modules.batchnorm._BatchNorm)
"""FRN and MABN, BatchNorm: layers whose parameters and statistics are float32 beside an input in half precision."""

_LOST = 0.01
"""A channel is reported when rounding moves one of its weights by more than this part of its largest. Rounding alone
is 5e-4 in float16: more means that the channel lies near the smallest number of the type, or below."""


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type of the network's parameters, as its first one has it; float32 for a network that has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cast_floats(tensors: Iterable[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors, those of a floating type in this one."""
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def to_precision(
    model: nn.Module,
    dtype: torch.dtype,
    *,
    keep_float32: Sequence[str] = (),
    keep_io_types: bool = False,
) -> nn.Module:
    """The network in another floating type, to be exported: fold first, since folding rounds to the network's type.

    Weights and activations take the type. In half precision (float16, bfloat16) these stay in float32:

    1. The parameters of FRN, and its statistics: the operator requires it (`deploynorm.contract`).
    2. The parameters and statistics of BatchNorm and MABN that did not fold. A variance may be too large or too small
       for float16, and ONNX, TensorRT and torch take float32 ones beside a half input.
    3. Layers that `keep_float32` names, with what is inside them; their inputs and outputs are cast.

    The network given is left untouched: the result is an `inference_copy`. `keep_io_types` keeps the type that inputs
    and outputs have now, with casts inside.

    Raises:
        InputError: A type of another kind, a name that no layer has, or layers to be kept where there is no half.
        ModelError: A weight does not fit into the type; the network cannot be copied or is an archive without layers.

    Warns:
        RuntimeWarning: Whole channels of a weight vanish in the type, or nearly so.
    """
    if dtype not in DTYPES.values():
        raise InputError("to_precision", "not a type for a network", got=dtype, expected=", ".join(DTYPES))
    twin = inference_copy(model)
    own, wide = dtype_of(twin), compute_dtype(dtype)
    kept = kept_layers(twin, keep_float32)
    if kept and dtype == wide:
        problem = f"nothing is in half precision where all is in {dtype_name(dtype)}"
        raise InputError("keep_float32", problem, got=", ".join(kept))
    _convert(twin, dtype, wide, _stay_wide(twin, kept))
    for module in dict.fromkeys(twin.get_submodule(name) for name in kept):  # one layer may have two names
        _cast_around(module, dtype, wide)
    if keep_io_types and own != dtype:
        if isinstance(twin, fx.GraphModule):
            _cast_ends(twin, own, dtype)
        else:
            _cast_around(twin, own, dtype)
    return twin


def kept_layers(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Names of the layers that the patterns name, in the network's order; of one within another, the outer alone.

    Raises:
        InputError: A pattern that names no layer, or an archive of torch.export, which has no layers.
    """
    if patterns and is_archive(model):
        problem = "an archive of torch.export has no layers that could be kept, for it is one graph"
        fix = "export from the network or checkpoint that the archive was made from"
        raise InputError("keep_float32", problem, got=", ".join(patterns), fix=fix)
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    found: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) or names[:5]
            problem, expected = "the network has no layer of that name", f"a name or pattern such as {', '.join(near)}"
            raise InputError("keep_float32", problem, got=repr(pattern), expected=expected)
        found.update(matched)
    return tuple(name for name in names if name in found and not any(name.startswith(f"{x}.") for x in found))


def first_overflow(model: nn.Module, examples: ExampleInputs | Examples) -> str | None:
    """The innermost layer that first gives infinity or NaN for finite inputs, by name; None if none does."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []

    def is_finite(values: object) -> bool:
        tensors = (x for x in _pytree.tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point())
        return all(bool(x.isfinite().all()) for x in tensors)

    def look(module: nn.Module, args: object, output: object) -> None:
        if not found and module in names and is_finite(args) and not is_finite(output):
            found.append(names[module])

    with torch.inference_mode(), nn.modules.module.register_module_forward_hook(look):
        Examples.of("first_overflow", model, examples).run(model)
    return found[0] if found else None


def _stay_wide(model: nn.Module, kept: Sequence[str]) -> set[str]:
    """Names of the parameters and buffers that stay wide: all of a kept layer, and those that a norm holds."""
    if is_archive(model):  # those that its operators take
        frn = [getattr(getattr(torch.ops, contract.DOMAIN), name).default for name in contract.TORCH_OPS]
        norms = [node for node in model.graph.nodes if node.target in (*frn, torch.ops.aten.batch_norm.default)]
        return {name for node in norms for name in _sources(node.args[1:5])}
    inside = {module for name in kept for module in model.get_submodule(name).modules()}
    return {
        f"{path}.{key}".lstrip(".")
        for path, module in model.named_modules()
        if module in inside or isinstance(module, _WIDE)
        for key in (*module._parameters, *module._buffers)
    }


def _sources(arguments: Sequence[Any]) -> set[str]:
    """The parameters and buffers that arguments are computed from."""
    nodes = [argument for argument in arguments if isinstance(argument, fx.Node)]
    for node in nodes:  # the list grows
        nodes += [source for source in node.all_input_nodes if source not in nodes]
    return {str(node.target) for node in nodes if node.op == "get_attr"}


def _convert(model: nn.Module, dtype: torch.dtype, wide: torch.dtype, stay_wide: Collection[str]) -> None:
    """Converts every parameter and buffer in place; a tensor that two layers share stays one."""
    converted: dict[tuple[Tensor, torch.dtype], Tensor] = {}
    weak: list[str] = []
    for path, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_floating_point():
                continue
            name = f"{path}.{key}".lstrip(".")
            target = wide if name in stay_wide else dtype
            if (tensor, target) not in converted:
                new = tensor.detach().to(target)
                _refuse_overflow(name, tensor, new)
                if key != "bias" and (lost := _lost_channels(module, tensor, new)):
                    weak.append(f"{name} ({lost})")
                converted[tensor, target] = nn.Parameter(new, False) if key in module._parameters else new
            setattr(module, key, converted[tensor, target])  # and not in the table: an LSTM keeps a list of its own
    if weak:
        warnings.warn(
            f"deploynorm: weights so small that {dtype_name(dtype)} loses them or most of their digits: "
            f"{'; '.join(weak)}. Fix: keep those layers in float32 (keep_float32, --keep-float32), or take bfloat16",
            RuntimeWarning,
            stacklevel=3,
        )


def _refuse_overflow(name: str, tensor: Tensor, new: Tensor) -> None:
    lost = tensor.isfinite() & ~new.isfinite()
    if not bool(lost.any()):
        return
    layer, _, key = name.rpartition(".")
    raise ModelError(
        f"layer {layer or '(the network)'}",
        f"{key} does not fit into {dtype_name(new.dtype)}",
        got=f"{tensor.abs().where(lost, tensor.new_zeros(())).max():.3g}",
        expected=f"at most {torch.finfo(new.dtype).max:.5g}",
        fix=f"keep_float32 (--keep-float32) {layer}, or bfloat16" if layer else "use bfloat16",
    )


def _lost_channels(module: nn.Module, tensor: Tensor, new: Tensor) -> str:
    """How many channels rounding moves by more than `_LOST` of their largest weight; empty for none."""
    if tensor.dim() == 0 or not tensor.numel() or new.dtype in (tensor.dtype, torch.float32, torch.float64):
        return ""
    axis = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) and tensor.dim() > 1 else 0
    rows, rounded = (t.double().movedim(axis, 0).reshape(t.shape[axis], -1) for t in (tensor, new))
    error = (rounded - rows).abs().nan_to_num(0).amax(1)  # -inf is -inf in any type
    lost = int((error > _LOST * rows.abs().amax(1)).sum())
    return f"{lost} of {len(rows)} channels" if lost else ""


def _cast(values: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """The same with each tensor of the source type in the target type."""
    return _pytree.tree_map_only(Tensor, lambda x: x.to(target) if x.dtype == source else x, values)


def _cast_around(module: nn.Module, outer: torch.dtype, inner: torch.dtype) -> None:
    """Casts the tensors of the outer type that go into a layer to the inner one, and those that come out back."""

    def before(_: nn.Module, args: object, kwargs: object) -> object:
        return _cast((args, kwargs), outer, inner)

    def after(_: nn.Module, args: object, output: object) -> object:
        return _cast(output, inner, outer)

    module.register_forward_pre_hook(before, with_kwargs=True)  # type: ignore[arg-type]
    module.register_forward_hook(after)


def _cast_ends(module: fx.GraphModule, own: torch.dtype, dtype: torch.dtype) -> None:
    """Casts inputs and outputs in the graph: torch.export interprets a GraphModule's graph and calls no hooks of it."""
    graph = module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        output.args = (graph.call_function(_cast, (output.args[0], dtype, own)),)
    with graph.inserting_after(inputs[-1]):
        for node in inputs:
            inside = graph.call_function(_cast, (node, own, dtype))
            node.replace_all_uses_with(inside, delete_user_cb=lambda user, inside=inside: user is not inside)
    module.recompile()
