"""Convolutions and linear layers whose weight is computed in each call: centred, standardised, parametrized."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from deploynorm._adopt.state import is_unchanged, state
from deploynorm.errors import ModelError
from deploynorm.layers import CenConv1d, CenConv2d, CenConv3d, CenConvTranspose2d
from deploynorm.layers.functional import center_weight
from deploynorm.quiet import quiet
from deploynorm.trace import LINEAR_OPERATORS, Sizes, alike, aten_operators, copied, trace

_CONV = "stride", "padding", "dilation", "groups"
_TRANSPOSED = "stride", "padding", "output_padding", "groups", "dilation"
_KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "conv1d": (nn.Conv1d, _CONV),
    "conv2d": (nn.Conv2d, _CONV),
    "conv3d": (nn.Conv3d, _CONV),
    "conv_transpose1d": (nn.ConvTranspose1d, _TRANSPOSED),
    "conv_transpose2d": (nn.ConvTranspose2d, _TRANSPOSED),
    "conv_transpose3d": (nn.ConvTranspose3d, _TRANSPOSED),
    "linear": (nn.Linear, ()),
}
"""Functions of torch with the layer that calls them, and the names of their arguments behind input, weight and bias."""

PLAIN = tuple(kind for kind, _ in _KINDS.values())
_CENTRED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: CenConv1d,
    nn.Conv2d: CenConv2d,
    nn.Conv3d: CenConv3d,
    nn.ConvTranspose2d: CenConvTranspose2d,
}
_RTOL = 1e-5
"""Of the largest value: a layer may compute its weight in float32."""
_WIDEST = 33
"""Of a map on which a layer is tried, before it is tried on those of the example."""


_INPUT = re.compile(r"L\['\w+'\]")
_PADS = aten_operators("pad constant_pad_nd")


class Computed(NamedTuple):
    """The plain layer that computes the same as one whose weight is computed, and weight and bias in float64."""

    plain: nn.Module
    weight: Tensor
    bias: Tensor | None


class _Call(NamedTuple):
    kind: str
    weight: Tensor
    bias: Tensor | None
    settings: dict[str, Any]


class _Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _KINDS:
            names = ("input", "weight", "bias", *_KINDS[name][1])
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            _, weight, bias = (given.pop(each, None) for each in names[:3])
            self.found.append(_Call(name, weight, bias, given))
        return result


def computed(layer: nn.Module, shape: Sequence[int]) -> Computed | None:
    """The plain layer of a layer that convolves once, with a weight that is the same for every input.

    The layer is called in float64 on random inputs of several sizes, and traced with free sizes. None where it does
    something else, or where a call changes what it holds.

    Args:
        layer: In evaluation mode.
        shape: Of an input that it takes.
    """
    small = (1, shape[1], *(min(size, _WIDEST) for size in shape[2:])) if len(shape) > 2 else shape
    try:
        twin = copied(layer).double().eval()
    except Exception:
        return None
    for tried in dict.fromkeys((tuple(small), (1, *shape[1:]))):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
                torch.manual_seed(0)
                inputs = [torch.randn(tried, dtype=torch.float64), torch.randn(tried, dtype=torch.float64) * 9 + 1]
                return _plain(layer, twin, inputs)
        except Exception:
            continue
    return None


def _plain(layer: nn.Module, twin: nn.Module, inputs: Sequence[Tensor]) -> Computed | None:
    calls, outputs = [], []
    for x in inputs:
        with _Calls() as seen:
            outputs.append(twin(x.clone()))
        if len(seen.found) != 1:
            return None
        calls += seen.found
    call, again = calls
    same_bias = (call.bias is None) == (again.bias is None)
    if not same_bias or not torch.equal(call.weight, again.weight):
        return None
    if call.bias is not None and again.bias is not None and not torch.equal(call.bias, again.bias):
        return None
    kind = _KINDS[call.kind][0]
    plain = _of_stock(layer, kind) if isinstance(layer, kind) else _of_call(call, kind)
    weight = call.weight.detach().clone()
    bias = None if call.bias is None else call.bias.detach().clone()
    exact = _with(plain, weight, bias)
    if not alike([exact(x) for x in inputs], outputs, _RTOL):
        return None
    if not _is_plain_for_all_sizes(twin, exact, inputs[0].dim()) or not _traces_to_one_call(twin, exact, inputs[0]):
        return None
    own = next((x for x in layer.parameters() if x.is_floating_point()), torch.empty(()))
    rounded = _with(plain, weight.to(own), None if bias is None else bias.to(own))
    return Computed(rounded, weight, bias)


def _is_plain_for_all_sizes(layer: nn.Module, plain: nn.Module, rank: int) -> bool:
    """Whether both give the same for small, odd and large sizes, and calls leave the layer as it was."""
    before = state(layer)
    for batch, larger in ((3, (0, 1, 2)), (1, (3, 128, 4)), (3, (131, 0, 1))):
        x = torch.randn(_shape(plain, rank, batch, larger), dtype=torch.float64)
        if not alike([layer(x.clone())], [plain(x)], _RTOL):
            return False
    return is_unchanged(before, state(layer))


def _shape(plain: Any, rank: int, batch: int, larger: Sequence[int]) -> tuple[int, ...]:
    """Of an input: as many numbers more than the layer needs on each axis."""
    if isinstance(plain, nn.Linear):
        return (batch, *(1 + larger[axis % len(larger)] for axis in range(rank - 2)), plain.in_features)
    # At least the kernel, more than the padding for one by reflection, and twice that if transposed.
    pads = plain.padding if isinstance(plain.padding, tuple) else (0,) * len(plain.kernel_size)
    needs = [
        max(dilation * (kernel - 1), 2 * pad) + 1
        for kernel, dilation, pad in zip(plain.kernel_size, plain.dilation, pads, strict=True)
    ]
    return (batch, plain.in_channels, *(need + larger[axis] for axis, need in enumerate(needs)))


def _traces_to_one_call(layer: nn.Module, plain: nn.Module, x: Tensor) -> bool:
    """Whether a trace with free sizes is the convolution of the input, or of its padding, and nothing else.

    Then it has no branch on values, nor on sizes but those of the plain layer, and weight and bias come from what it
    holds.
    """
    example = torch.randn(_shape(plain, x.dim(), 3, (7, 8, 9)), dtype=torch.float64)
    channels = x.dim() - 1 if isinstance(plain, nn.Linear) else 1
    sizes = Sizes((tuple(example.shape),), tuple({(0, axis): 1} for axis in range(x.dim()) if axis != channels))
    try:
        program, of_plain = (trace(each, example, sizes=sizes) for each in (layer, plain))
    except ModelError:
        return False
    conditions = _conditions(program)
    if conditions is None or conditions != _conditions(of_plain):
        return False
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        return False
    chain: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.name in signature.user_inputs:
            chain.append(node)
        elif not set(chain).isdisjoint(node.all_input_nodes):
            # Any node that depends on the input takes the one before it, as its data alone.
            if set(chain) & set(node.all_input_nodes) != {chain[-1]}:
                return False
            if node.op != "output" and (node.args[0] is not chain[-1] or _count(node, chain[-1]) != 1):
                return False
            chain.append(node)
    _, *pads, call, output = chain
    padded = all(node.target in _PADS for node in pads)
    return padded and call.target in LINEAR_OPERATORS and output.op == "output" and len(signature.user_outputs) == 1


def _conditions(program: ExportedProgram) -> tuple[set[str], list[object]] | None:
    """On sizes, those under which a trace holds, and the bounds of each axis; None unless all but one are free."""
    [name] = program.graph_signature.user_inputs
    [x] = (node.meta["val"] for node in program.graph.nodes if node.name == name)
    if sum(isinstance(size, torch.SymInt) for size in x.shape) != x.dim() - 1:
        return None
    bounds = [
        program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else size for size in x.shape
    ]
    return {_INPUT.sub("x", text) for text in getattr(program, "_guards_code", ())}, bounds


def _count(node: fx.Node, of: fx.Node) -> int:
    """How often a node takes another."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found.count(of)


def _with(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with another weight and bias."""
    twin = type(layer).__new__(type(layer))
    twin.__dict__.update(layer.__dict__)
    twin._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": None if bias is None else nn.Parameter(bias, requires_grad=False),
    }
    return twin


def _of_stock(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A layer of torch with the arguments of one that is derived from it, all of which are attributes."""
    plain = kind.__new__(kind)
    nn.Module.__init__(plain)
    for name, value in vars(layer).items():
        if name not in vars(plain) and name not in ("weight", "bias"):
            plain.__dict__[name] = value
    return plain.train(layer.training)


def _of_call(call: _Call, kind: type[nn.Module]) -> nn.Module:
    sizes = call.weight.shape
    if call.kind == "linear":
        return nn.Linear(sizes[1], sizes[0], device="meta")
    groups = call.settings.get("groups", 1)
    channels = (sizes[0], sizes[1] * groups) if "transpose" in call.kind else (sizes[1] * groups, sizes[0])
    return kind(*channels, tuple(sizes[2:]), **call.settings, device="meta")


def centred(layer: nn.Module, found: Computed) -> nn.Module | None:
    """The CenConv layer of a layer whose weight is one of its parameters, centred; None where it is another."""
    kind = _CENTRED.get(type(found.plain))
    for parameter in layer.parameters():
        if kind is None or parameter.shape != found.weight.shape:
            continue
        plain: Any = found.plain
        want = center_weight(parameter.detach().cpu().double(), groups=plain.groups, transposed=plain.transposed)
        if not alike([found.weight], [want], _RTOL):
            continue
        new = kind.__new__(kind)
        new.__dict__.update(plain.__dict__)
        bias = None if found.bias is None else _parameter_like(layer, found.bias)
        if found.bias is not None and bias is None:
            return None
        new._parameters = {"weight": parameter, "bias": bias}
        with suppress(Exception):  # of any type
            return new.train(layer.training) if _train_alike(layer, new) else None
        return None
    return None


def _train_alike(layer: nn.Module, new: nn.Module) -> bool:
    """Whether both give the same in training mode, and the same gradients to what they share."""
    names = {parameter: name for name, parameter in layer.named_parameters()}
    results = []
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), quiet():
        for each in (layer, new):
            twin = copied(each).cpu().double().train()
            torch.manual_seed(0)
            shape = _shape(new, 2 + len(cast(Any, new).kernel_size), 2, (2, 3, 4))
            held = dict(twin.named_parameters())
            own = {names[parameter]: held[name].requires_grad_() for name, parameter in each.named_parameters()}
            y = twin(torch.randn(shape, dtype=torch.float64))
            results.append((y, own))
        (want, _), (got, shared) = results
        if not alike([got.detach()], [want.detach()], _RTOL):
            return False
        gradients = []
        for y, own in results:
            torch.manual_seed(1)
            parameters = [own[name] for name in shared]
            gradients.append(torch.autograd.grad(y, parameters, torch.randn_like(y), allow_unused=True))
        return all(
            one is not None and other is not None and alike([one], [other], _RTOL)
            for one, other in zip(*gradients, strict=True)
        )


def _parameter_like(layer: nn.Module, value: Tensor) -> nn.Parameter | None:
    of_shape = (x for x in layer.parameters() if x.shape == value.shape)
    return next((x for x in of_shape if alike([x.detach().cpu().double()], [value], 1e-6)), None)
