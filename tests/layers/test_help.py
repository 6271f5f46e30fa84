"""What help() shows of the layers that people use."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
from torch import nn

from deploynorm import layers

FULL: dict[str, Callable[[], nn.Module]] = {
    "FRN2d": lambda: layers.FRN2d(4, learned_eps="layer"),
    "TLU": lambda: layers.TLU(4),
    "MABN2d": lambda: layers.MABN2d(4),
    "CenConv2d": lambda: layers.CenConv2d(4, 4, 3),
}
SEE = {"FRN1d": "FRN2d", "FRN3d": "FRN2d", "MABN1d": "MABN2d", "MABN3d": "MABN2d"}
SEE |= {"CenConv1d": "CenConv2d", "CenConv3d": "CenConv2d", "CenConvTranspose2d": "CenConv2d"}


@pytest.mark.parametrize("name", FULL)
def test_the_full_text_names_every_argument_parameter_and_buffer_and_fits_80_columns(name: str) -> None:
    layer, text = FULL[name](), inspect.cleandoc(getattr(layers, name).__doc__)
    arguments = [*inspect.signature(type(layer)).parameters]
    stored = [*(n for n, _ in layer.named_parameters()), *(n for n, _ in layer.named_buffers())]
    assert [word for word in arguments + stored if word not in text] == []
    assert [part for part in ("Args:", "Shape:", "Parameters", "decay", "Raises:", "arXiv:") if part not in text] == []
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", SEE)
def test_the_others_point_to_it(name: str) -> None:
    assert f"see {SEE[name]}" in getattr(layers, name).__doc__.partition("\n")[0]


def test_every_layer_is_one_or_the_other() -> None:
    classes = {name for name in layers.__all__ if isinstance(getattr(layers, name), type)}
    assert classes == {*FULL, *SEE}
