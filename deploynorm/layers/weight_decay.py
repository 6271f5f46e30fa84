"""Which parameters an optimiser should let decay."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from deploynorm.layers._checks import check_range


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of a network in two groups for an optimiser, with weight decay and without.

        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.05), lr=1e-3)

    The weights of convolutions and linear layers decay. Those of norms (gamma, beta, tau and eps_l of FRN, TLU and
    MABN, and of torch's norms) and biases do not: shrinking them changes what the network can express and regularises
    nothing. As in timm, these are all parameters of one axis or none; those of a LayerNorm over several axes besides.

    Args:
        model: Parameters that require no gradient, such as those fixed by `freeze_mabn`, are in neither group.
        weight_decay: Of the first group; InputError unless it is a finite number from 0.

    Returns:
        Those that decay and the others, each {"params": in the order of model.parameters(), "weight_decay": ...}.

    Source: timm.optim.param_groups_weight_decay, which gives the two in the other order.
    """
    check_range("parameter_groups", "weight_decay", weight_decay, 0, sys.float_info.max, "a finite number from 0")
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
    of_norms = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.dim() <= 1 or name.rpartition(".")[2] == "bias" or id(parameter) in of_norms
            groups[exempt].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]
