"""Surgery of your own on an ONNX graph, with onnx-graphsurgeon, in which FRN is one call.

with deploynorm.gs.surgery("in.onnx", "out.onnx") as graph:  # an onnx_graphsurgeon.Graph
    ...
    graph.frn(x, gamma, beta, tau, eps, output=end)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from deploynorm.contract import ADD_OP_TYPE, DOMAIN, DTYPES, NODE_ATTRIBUTES, OP_TYPE, PARAMETERS
from deploynorm.errors import BackendError, InputError
from deploynorm.files import as_path, check_outputs, onnx_companions, staging
from deploynorm.onnx_file import OnnxFile, save
from deploynorm.rewrite.graphsurgeon import Operation, graphsurgeon, type_name
from deploynorm.rewrite.intake import check_graph

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

__all__ = ["frn", "surgery"]

_Array: TypeAlias = npt.NDArray[Any]
_WHERE = "graph.frn"
_NAMES = "_deploynorm_names"
"""An attribute of a graph: the names that are taken."""


@contextmanager
def surgery(source: str | Path, output: str | Path) -> Iterator[gs.Graph]:
    """Opens an ONNX file as a graph of onnx-graphsurgeon, and writes the graph once the block has ended.

    The graph is of opset 18 or later, and its tensors have the types and shapes that can be inferred. It need not be
    sorted or cleaned up in the end. What onnx-graphsurgeon does not read of a file (metadata, docs, overloads, default
    values of inputs, weights past 2 GB) is in the output too. After an exception in the block nothing is written.

    What the output computes is not compared with the source; `deploynorm rewrite --surgery` does that.

    Raises:
        ModelError: The file cannot be read, or the block leaves no valid graph.
        InputError: The output is the source, or cannot be written to.
        BackendError: onnx-graphsurgeon is not installed.
    """
    file, path = OnnxFile.read(source), as_path("output", output)
    check_outputs([path, *onnx_companions(path)], file.files)
    check_graph(file)
    operation = Operation(file.to_ir())
    yield operation.graph
    model, _ = operation.result()
    with staging(path, inputs=file.files, companions=onnx_companions(path)) as folder:
        save(model, folder / path.name)


def frn(
    graph: gs.Graph,
    x: gs.Tensor,
    gamma: object,
    beta: object,
    tau: object,
    eps: object,
    *,
    residual: gs.Tensor | None = None,
    output: gs.Tensor | str | None = None,
) -> gs.Tensor:
    """Adds a node: max(gamma * x * rsqrt(mean(x^2 over all axes >= 2) + eps) + beta [+ residual], tau).

    Args:
        graph: The graph or subgraph that the node goes into.
        x: A tensor (N, C, ...) of a floating-point type.
        gamma, beta, tau, eps: A number, or one for each channel with no other axis than ones beside it; as an array, or
            as a constant of the graph, which is copied. tau is -inf for no threshold, eps greater than 0.
        residual: A tensor of the type and shape of x.
        output: The tensor that the node computes, in place of the node that computes it now; or the name of a new one.

    Returns:
        The output.

    Raises:
        InputError: An argument is not as above.
    """
    gs = graphsurgeon()
    for name, tensor in (("x", x), *([] if residual is None else [("residual", residual)])):
        if not isinstance(tensor, gs.Tensor):
            raise InputError(_WHERE, f"{name} is no tensor of the graph", got=type(tensor).__name__)
        if type_name(tensor) not in DTYPES:
            expected = f"{name}.dtype to be {', '.join(DTYPES)}"
            raise InputError(_WHERE, f"the type of {tensor.name}", got=type_name(tensor), expected=expected)
        if tensor.shape is not None and len(tensor.shape) < 2:
            raise InputError(_WHERE, f"{tensor.name} has no channels", got=list(tensor.shape), expected="(N, C, ...)")
        if tensor is output:
            raise InputError(_WHERE, f"{name} would be computed from itself")
    if residual is not None and (type_name(residual) != type_name(x) or not _may_be_equal(residual.shape, x.shape)):
        got, expected = (f"{type_name(each)} {each.shape}" for each in (residual, x))
        raise InputError(_WHERE, f"{residual.name} has not the type and shape of x", got=got, expected=expected)

    given = dict(zip(PARAMETERS, (gamma, beta, tau, eps), strict=True))
    arrays = {name: _numbers(name, value) for name, value in given.items()}
    known = x.shape[1] if x.shape is not None and isinstance(x.shape[1], int) else None
    channels: int = known or max(array.size for array in arrays.values())
    if known is None and channels == 1:
        fix = "give a parameter for each channel"
        raise InputError(_WHERE, f"the number of channels of {x.name} is not known", fix=fix)
    for name, array in arrays.items():
        if array.size not in (1, channels):
            raise InputError(_WHERE, f"{name} is not one number for each channel", got=array.size, expected=channels)

    if _NAMES not in vars(graph):  # once, or long graphs would take minutes
        vars(graph)[_NAMES] = set(graph.tensors())
    taken = vars(graph)[_NAMES]
    y: Any = output if isinstance(output, gs.Tensor) else gs.Variable(_free(output or f"{x.name}_frn", taken))
    for other in list(y.inputs):
        place = next(place for place, each in enumerate(other.outputs) if each is y)
        other.outputs[place] = gs.Variable.empty()  # so that further outputs keep their places
    if y.dtype is None:
        y.dtype, y.shape = x.dtype, x.shape
    wide = np.float64 if type_name(x) == "float64" else np.float32
    inputs = [x]
    for name, array in arrays.items():
        value = np.broadcast_to(array, channels).astype(wide)
        inputs.append(gs.Constant(_free(f"{y.name}_{name}", taken), value))
    if residual is not None:
        inputs.append(residual)
    op_type = OP_TYPE if residual is None else ADD_OP_TYPE
    graph.nodes.append(gs.Node(op_type, f"{y.name}_frn", dict(NODE_ATTRIBUTES), inputs, [y], DOMAIN))
    return y


def _numbers(name: str, given: object) -> _Array:
    """A parameter as (C,) or (1,), in float64."""
    gs = graphsurgeon()
    value = given
    if isinstance(value, gs.Variable) and len(value.inputs) == 1 and value.inputs[0].op == "Constant":
        attributes = value.inputs[0].attrs.items()
        value = next((held for key, held in attributes if key in ("value", "value_float", "value_floats")), value)
    if isinstance(value, gs.Constant):  # read without loading it into the graph
        value = value._values.load() if hasattr(value._values, "load") else value.values
    elif isinstance(value, gs.Tensor):
        fix = "compute it first, as with graph.fold_constants()"
        raise InputError(_WHERE, f"{name} ({value.name}) is not constant", fix=fix)
    try:
        array = np.asarray(value).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(_WHERE, f"{name} is no number or array of numbers", got=type(given).__name__) from error
    if array.size == 0 or array.size != max(array.shape, default=1):
        raise InputError(_WHERE, f"{name} has more axes than that of the channels", got=f"shape {list(array.shape)}")
    number = np.isfinite(array) | (np.isneginf(array) if name == "tau" else False)
    if not number.all() or (name == "eps" and not (array > 0).all()):
        expected = {"eps": "greater than 0", "tau": "finite or -inf"}.get(name, "finite")
        raise InputError(_WHERE, f"{name} is out of range", expected=expected)
    return array.reshape(-1)


def _may_be_equal(a: list[Any] | None, b: list[Any] | None) -> bool:
    """Whether two shapes can be the same at some size."""
    if a is None or b is None:
        return True
    both_known = ((m, n) for m, n in zip(a, b, strict=False) if isinstance(m, int) and isinstance(n, int))
    return len(a) == len(b) and all(m == n for m, n in both_known)


def _free(name: str, taken: set[str]) -> str:
    """The name or one like it that is free, which is then taken."""
    free = next(each for each in chain([name], (f"{name}_{n}" for n in count(1))) if each not in taken)
    taken.add(free)
    return free


with suppress(BackendError):  # without the package, surgery says what to install
    graphsurgeon().Graph.register()(frn)
