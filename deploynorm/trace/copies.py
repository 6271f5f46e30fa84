"""Copies of a network, to be folded and traced, or to be run and thrown away."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel

from deploynorm.errors import ModelError
from deploynorm.quiet import first_line, quiet
from deploynorm.trace.examples import Examples, check_network
from deploynorm.trace.outputs import alike, tensors_of
from deploynorm.trace.reader import operator_name


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile.

    A wrapper with hooks, or of a class that was derived from these, computes something of its own, and stays.

    Raises:
        InputError: It is no network.
    """
    check_network(model)
    while not (model._forward_hooks or model._forward_pre_hooks):
        if type(model) in (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel):
            model = model.module  # type: ignore[assignment]
        elif type(model).__name__ == "OptimizedModule":  # its class lies in torch._dynamo, which is slow to import
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    return model


def copied(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A copy, without the graphs of tensors that torch's older weight_norm and spectral_norm keep.

    Raises:
        ModelError: The network cannot be copied.
    """
    model = unwrapped(model)
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, object] = {id(value): value.detach().clone() for value in kept if not value.is_leaf}
    if share_parameters:
        memo |= {id(parameter): parameter for parameter in model.parameters()}
    try:
        with quiet():
            twin = copy.deepcopy(model, memo)
    except Exception as error:
        problem = f"the network cannot be copied: {first_line(error)}"
        fix = "remove what does not deep-copy (hooks, open files, non-leaf tensors)"
        raise ModelError(type(model).__name__, problem, fix=fix) from error
    if twin is model:
        problem = "the network cannot be copied: its __deepcopy__ returns the network itself"
        raise ModelError(type(model).__name__, problem, fix="let it return a copy")
    # torchvision's feature extractors copy themselves in training mode, and have another graph in that.
    if twin.training != model.training:
        twin.train(model.training)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in twin.named_modules():
        module.training = modes.get(name, twin.training)
    for module in twin.modules():
        if isinstance(module, nn.DataParallel):
            module.device_ids = []  # it then calls its module, wherever that is; its parent may name `.module`
        for name, child in module.named_children():
            if not isinstance(child, nn.DataParallel) and (inner := unwrapped(child)) is not child:
                setattr(module, name, inner)
    return twin


def disposable_copy(model: nn.Module) -> nn.Module:
    """A copy to be run once: it shares the parameters, and has buffers, which forward may change, of its own."""
    return copied(model, share_parameters=True)


def repeats(model: nn.Module, examples: Examples) -> bool:
    """Whether a network computes the same a second time, its buffers being as they were; True where it fails."""
    twin = disposable_copy(model)
    buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    with torch.no_grad(), quiet():
        try:
            first = [x.clone() if isinstance(x, Tensor) else x for x in tensors_of(examples.run(twin))]
            for name, buffer in twin.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
            return alike(tensors_of(examples.run(twin)), first, rtol=1e-3)
        except Exception:  # whoever runs it next says what is wrong
            return True


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy of the network on the CPU, in evaluation mode.

    Raises:
        ModelError: The network cannot be copied, has parts of TorchScript, or is an archive that was traced in training
            mode.
    """
    _refuse_scripted(model)
    twin = copied(model).cpu().requires_grad_(False)
    if is_archive(twin):
        refuse_training(twin.graph.nodes, type(model).__name__, archive=True)
    return twin.eval()


def _refuse_scripted(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"part {path}" if path else "the network"
            problem = f"{what} is TorchScript (torch.jit.script or torch.jit.trace), which cannot be traced again"
            fix = "build it in Python and load its state_dict()"
            raise ModelError(type(model).__name__, problem, got=type(module).__name__, fix=fix)


def is_archive(model: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Whether it is the module of a torch.export program: one graph of ATen operators, in the mode of its trace."""
    if not isinstance(model, fx.GraphModule):
        return False
    # What symbolic_trace makes is a GraphModule too, with layers and functions of torch.
    return any(isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes)


def refuse_training(nodes: Iterable[fx.Node], where: str, *, archive: bool = False) -> None:
    """Refuses a trace of what evaluation must not do: draw random numbers, or normalize by the batch's statistics.

    A batch normalization that has no running statistics, as weight standardization calls it, may use the batch's.

    Raises:
        ModelError: An operator does; it names the node and its layer.
    """
    for node in nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        arguments = node.target._schema.arguments
        given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        given |= dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
        mode = [given[name] for name in ("train", "training", "use_input_stats") if name in given]
        off = False in mode or 0 in [given.get(name) for name in ("p", "dropout", "dropout_p")]
        what = ""
        if torch.Tag.nondeterministic_seeded in node.target.tags and not off:
            what = "draws random numbers"
        elif given.get("running_mean") is not None and (True in mode or "with_update" in str(node.target)):
            what = "normalizes by the statistics of the batch, although it has running ones"
        if not what:
            continue
        layer = [path for path, _ in node.meta.get("nn_module_stack", {}).values()][-1:]
        place = f"node {node.name}" + (f" of layer {layer[0]}" if layer and layer[0] else "")
        if archive:
            kind, fix = "traced in training mode", "call model.eval() before torch.export.export"
        else:
            kind = "random in evaluation" if "random" in what else "in training mode in evaluation"
            fix = "pass it training=self.training, or leave it out"
        raise ModelError(where, f"{kind}: {operator_name(node)} ({place}) {what}", fix=fix)
