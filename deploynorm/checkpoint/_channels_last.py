"""Tensors of TensorFlow beside the norm layers: names with slashes, kernels and norms as PyTorch has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

_RENAMED: Final = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
"""Keras' names of the parameters of convolutions, dense layers and norms."""


def plain_name(name: str) -> str:
    """A name of TensorFlow as one of PyTorch: "conv/kernel:0" is conv.kernel."""
    return re.sub(r":\d+$", "", name).replace("/", ".")


def channels_first(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """The tensors of one layer by their old keys, with the key and the layout that PyTorch has.

    A convolution's kernel (H, W, in, out) becomes (out, in, H, W), and that of a transposed one, (H, W, out, in),
    (in, out, H, W); of one axis and of three alike. A depthwise one, (H, W, in, n), becomes (in * n, 1, H, W), and
    a dense layer's (in, out) becomes (out, in).
    """
    taken = set(tensors)
    result = {}
    for name, tensor in tensors.items():
        new = _RENAMED.get(name, name)
        if new != name and new in taken:
            new = name
        taken.add(new)
        result[name] = new, _laid_out(name, tensor)
    return result


def _laid_out(name: str, tensor: Tensor) -> Tensor:
    if name == "depthwise_kernel" and tensor.dim() == 4:
        *sizes, inputs, multiple = tensor.shape
        return tensor.permute(2, 3, 0, 1).reshape(inputs * multiple, 1, *sizes).contiguous()
    if (name == "weight" or name.endswith("kernel")) and tensor.dim() >= 2:
        space = range(tensor.dim() - 2)
        return torch.permute(tensor, (tensor.dim() - 1, tensor.dim() - 2, *space)).contiguous()
    return tensor
