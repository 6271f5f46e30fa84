"""nn.Module -> torch.export program: what fold reads and what export translates."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from deploynorm.errors import InputError, ModelError
from deploynorm.layers.adopt import adopt

__all__ = ["Dynamic", "NarrowedAxis", "first_line", "inference_copy", "narrowed_axes", "quiet", "sizes_taken", "trace"]

Dynamic = Literal["none", "batch", "spatial", "all"]
"""Which input axes may change: axis 0 is the batch, axes 2 and up are spatial."""


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy of the network on the CPU, in evaluation mode, with other projects' FRN layers taken over."""
    try:
        with quiet():
            twin = copy.deepcopy(model).cpu().requires_grad_(False)
    except Exception as error:
        raise ModelError(
            type(model).__name__,
            f"the network cannot be copied: {first_line(error)}",
            fix="remove what does not deep-copy (hooks, open files, non-leaf tensors)",
        ) from error
    if isinstance(twin, fx.GraphModule):
        _refuse_training_graph(twin)
    return adopt(twin).eval()


class NarrowedAxis(NamedTuple):
    """A free axis whose trace holds for some sizes only, because the network branches on it.

    Attributes:
        kind: "batch" or "spatial".
        told: Which axis, and the sizes.
    """

    kind: str
    told: str


def trace(
    model: nn.Module,
    example_inputs: Sequence[Tensor],
    dynamic: Dynamic | None = None,
    *,
    fixed: Collection[str] = (),
    takes: Collection[str] | None = None,
) -> ExportedProgram:
    """Traces a network with torch.export.

    Args:
        model: Network in evaluation mode.
        example_inputs: Positional inputs of forward. Sizes above 1 on the axes that are to be dynamic.
        dynamic: Axes that must stay free. None frees the axes that the network leaves free: it is run with other
            sizes first, and one that it refuses to change stays as in the example. One that it branches on is free
            in the trace, which then holds for some sizes only: `narrowed_axes` tells.
        fixed: With None, the kinds of axes ("batch", "spatial") that stay as in the example all the same.
        takes: What `sizes_taken` said of the network in a faster type; None asks the network itself.

    Returns:
        The program, with ATen and deploynorm operators.

    Raises:
        InputError: An example input is not a tensor.
        ModelError: torch.export cannot trace the network, or the network fixes an axis that must stay free.
    """
    for position, example in enumerate(example_inputs):
        if not isinstance(example, Tensor):
            raise InputError("trace", f"example input {position} is not a tensor", got=type(example).__name__)
    example_inputs = [example.detach().cpu() for example in example_inputs]  # the copy that is traced lies there
    if takes is None:
        takes = sizes_taken(model, example_inputs) if dynamic != "none" else ()
    if dynamic is None:
        return _export(model, example_inputs, set(takes) - set(fixed), Dim.AUTO)
    wanted = set[str]({"batch", "spatial"} if dynamic == "all" else {dynamic} - {"none"})
    if not any(example.dim() > 2 for example in example_inputs):
        wanted -= {"spatial"}
    if not wanted <= set(takes):
        raise _not_free(model, dynamic, f"it refuses another {' or '.join(sorted(wanted - set(takes)))} size")
    program = _export(model, example_inputs, wanted, Dim.DYNAMIC)
    narrowed = narrowed_axes(program)
    if narrowed:
        raise _not_free(model, dynamic, f"it branches on {'; '.join(axis.told for axis in narrowed)}")
    return program


def narrowed_axes(program: ExportedProgram) -> list[NarrowedAxis]:
    """The free axes of a trace that hold for some sizes only."""
    narrowed = []
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in program.graph_signature.user_inputs:
            continue
        for axis, size in enumerate(getattr(node.meta["val"], "shape", ())):
            if not isinstance(size, torch.SymInt):
                continue
            bounds = program.range_constraints.get(size.node.expr)
            if bounds is None:
                continue
            # A convolution narrows a spatial axis from below on its own; torch assumes 2 and up for any axis.
            low = int(bounds.lower) if axis == 0 and bounds.lower > 2 else None
            high = int(bounds.upper) if bounds.upper.is_finite and bounds.upper < 2**31 else None
            if low is not None or high is not None:
                span = f"{low if low is not None else 1} to {high if high is not None else 'any'}"
                narrowed.append(NarrowedAxis("spatial" if axis else "batch", f"axis {axis} of {node.name}: {span}"))
    return narrowed


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch's warnings about its own internals from the user of export."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop, to stand inside another message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _export(model: nn.Module, example_inputs: Sequence[Tensor], free: set[str], kind: Any) -> ExportedProgram:
    shapes = tuple(
        dict.fromkeys(
            [axis for axis in range(example.dim()) if axis != 1 and ("spatial" if axis else "batch") in free], kind
        )
        for example in example_inputs
    )
    code = getattr(type(model).forward, "__code__", None)
    takes_star_args = code is not None and code.co_flags & 0x04 and code.co_argcount == 1
    dynamic_shapes: Any = (shapes,) if takes_star_args else shapes
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(model, tuple(example_inputs), dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise _explain(model, example_inputs, free, error) from error


def sizes_taken(model: nn.Module, example_inputs: Sequence[Tensor]) -> set[str]:
    """Of "batch" and "spatial", those that the network runs with larger: by 1, or by 32 as U-nets need."""

    def runs(batch: int, spatial: int) -> bool:
        grown = [
            example.new_zeros([size + (batch, 0, spatial)[min(axis, 2)] for axis, size in enumerate(example.shape)])
            for example in example_inputs
        ]
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(*grown)
        except Exception:  # any refusal of a size is an answer here, whatever its type
            return False
        return True

    taken = set()
    if runs(1, 0):
        taken.add("batch")
    if any(example.dim() > 2 for example in example_inputs) and (runs(0, 1) or runs(0, 32)):
        taken.add("spatial")
    return taken


def _not_free(model: nn.Module, dynamic: str, reason: str) -> ModelError:
    return ModelError(
        f"trace of {type(model).__name__}",
        f"the network fixes a size that dynamic={dynamic!r} wants free: {reason}",
        fix="leave the choice out, or name fewer axes (none, batch, spatial, all)",
    )


def _explain(model: nn.Module, example_inputs: Sequence[Tensor], free: set[str], error: Exception) -> ModelError:
    where = f"trace of {type(model).__name__}"
    shapes = "inputs of shape " + ", ".join(str(tuple(example.shape)) for example in example_inputs)
    if isinstance(error, InputError):
        return ModelError(where, f"the network refuses the example input: {error}", got=shapes)
    if "Constraints violated" in str(error) or ("marked" in str(error) and "specialized" in str(error)):
        return _not_free(model, "all" if len(free) == 2 else "".join(free), first_line(error))
    return ModelError(
        where,
        f"torch.export cannot trace the network: {type(error).__name__}: {first_line(error)}",
        got=shapes,
        fix="check the input shape first; control flow that depends on values has to go (torch.cond, torch.where)",
    )


def _refuse_training_graph(model: fx.GraphModule) -> None:
    """The module of a torch.export archive keeps the mode that it was traced in, whatever eval() says."""
    aten = torch.ops.aten
    training_argument = {aten.batch_norm.default: 5, aten.dropout.default: 2}
    for node in model.graph.nodes:
        position = training_argument.get(node.target)
        if position is not None and node.args[position]:
            raise ModelError(
                type(model).__name__,
                f"the archive was traced in training mode (node {node.name})",
                fix="call model.eval() before torch.export.export",
            )
