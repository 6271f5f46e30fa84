"""CenConv1d, 2d, 3d and transposed against the plain convolution with a weight centred by the reference."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import EXACT, FLOAT64, OP_BFLOAT16, OP_FLOAT16, Tolerance
from torch import nn

from deploynorm import reference
from deploynorm.layers import CenConv1d, CenConv2d, CenConv3d, CenConvTranspose2d

PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    CenConv1d: nn.Conv1d,
    CenConv2d: nn.Conv2d,
    CenConv3d: nn.Conv3d,
    CenConvTranspose2d: nn.ConvTranspose2d,
}
SIZES = {CenConv1d: (9,), CenConv2d: (9, 7), CenConv3d: (5, 6, 7), CenConvTranspose2d: (5, 4)}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_bias": {"bias": False},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 4},
    "depthwise_multiplier": {"groups": 4, "out_channels": 8},
    "stride_padding": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2},
    "kernel_1": {"kernel_size": 1},
    "sizes_by_axis": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "same": {"padding": "same"},
    "output_padding": {"stride": 3, "padding": 1, "output_padding": 2},
    "transposed_groups_dilation": {"groups": 2, "dilation": 2, "output_padding": 1, "stride": 2},
}


def takes(kind: type[nn.Module], options: dict[str, Any]) -> bool:
    if isinstance(options.get("kernel_size"), tuple) and len(SIZES[kind]) != 2:
        return False
    only_plain = {"padding_mode", "same"} & {*options, *(v for v in options.values() if isinstance(v, str))}
    return not only_plain if kind is CenConvTranspose2d else "output_padding" not in options


COMBINATIONS = [(kind, name) for kind in PLAIN for name, options in OPTIONS.items() if takes(kind, options)]


def pair(kind: type[nn.Module], options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """A CenConv layer in float64 and the plain layer that must equal it; the weights are far from centred."""
    torch.manual_seed(0)
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
    layer = kind(**arguments, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.add_(1)
    plain = PLAIN[kind](**arguments, dtype=torch.float64)
    state = layer.state_dict()
    centred = reference.center_weight(
        state["weight"].numpy(), groups=layer.groups, transposed=kind is CenConvTranspose2d
    )
    plain.load_state_dict({**state, "weight": torch.from_numpy(centred)})
    return layer, plain


@pytest.mark.parametrize(("kind", "name"), COMBINATIONS, ids=lambda value: getattr(value, "__name__", value))
def test_layer_is_the_plain_convolution_with_a_centred_weight(kind: type[nn.Module], name: str) -> None:
    layer, plain = pair(kind, OPTIONS[name])
    x = torch.randn(2, 4, *SIZES[kind], dtype=torch.float64)
    for images in (x, x[0]):
        torch.testing.assert_close(layer(images), plain(images), **FLOAT64.kwargs())


@pytest.mark.parametrize("kind", PLAIN)
def test_gradient_of_the_weight_is_centred_too(kind: type[nn.Module]) -> None:
    layer, plain = pair(kind, {"groups": 2})
    x = torch.randn(2, 4, *SIZES[kind], dtype=torch.float64)
    for module in (layer, plain):
        module(x).square().sum().backward()
    expected = reference.center_weight(plain.weight.grad.numpy(), groups=2, transposed=kind is CenConvTranspose2d)
    np.testing.assert_allclose(layer.weight.grad.numpy(), expected, **FLOAT64.kwargs())
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, **FLOAT64.kwargs())


@pytest.mark.parametrize("kind", PLAIN)
def test_layer_is_a_torch_convolution_with_its_state_and_an_uncentred_weight(kind: type[nn.Module]) -> None:
    layer, plain = pair(kind, {})
    assert isinstance(layer, PLAIN[kind])
    assert list(layer.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    before = layer.weight.detach().clone()
    layer(torch.randn(2, 4, *SIZES[kind], dtype=torch.float64)).sum().backward()
    assert torch.equal(layer.weight, before)
    assert before.mean() > 0.9
    assert repr(layer) == repr(plain).replace(PLAIN[kind].__name__, kind.__name__)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_centred_weight_does_the_same_in_both_layers(kind: type[nn.Module]) -> None:
    layer, plain = pair(kind, {"groups": 2})
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, *SIZES[kind], dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), **FLOAT64.kwargs())


@pytest.mark.parametrize("output_size", [[9, 8], [10, 7], [2, 4, 10, 8]], ids=str)
def test_transposed_layer_takes_an_output_size(output_size: list[int]) -> None:
    layer, plain = pair(CenConvTranspose2d, {"stride": 2, "padding": 1})
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    y = layer(x, output_size=output_size)
    assert list(y.shape[2:]) == output_size[-2:]
    torch.testing.assert_close(y, plain(x, output_size=output_size), **FLOAT64.kwargs())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, OP_FLOAT16), (torch.bfloat16, OP_BFLOAT16)], ids=["float16", "bfloat16"]
)
@pytest.mark.parametrize("kind", PLAIN)
def test_autocast_casts_the_centred_weight_and_not_the_stored_one(
    kind: type[nn.Module], dtype: torch.dtype, tolerance: Tolerance
) -> None:
    layer, plain = pair(kind, {})
    x = torch.randn(2, 4, *SIZES[kind], dtype=torch.float64)
    expected = plain(x)
    with torch.no_grad():
        layer.weight.add_(64)  # of which half precision leaves one digit of what is centred
    with torch.autocast("cpu", dtype=dtype):
        y = layer.float()(x.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, **tolerance.kwargs())


@pytest.mark.parametrize("kind", PLAIN)
def test_layer_survives_copying_and_pickling(kind: type[nn.Module]) -> None:
    layer, _ = pair(kind, {})
    x = torch.randn(2, 4, *SIZES[kind], dtype=torch.float64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), layer(x), **EXACT.kwargs())


@pytest.mark.parametrize("kind", PLAIN)
def test_layer_is_built_on_the_meta_device(kind: type[nn.Module]) -> None:
    layer = kind(4, 6, 3, device="meta")
    assert layer.weight.is_meta
    assert layer(torch.empty(2, 4, *SIZES[kind], device="meta")).shape[:2] == (2, 6)
