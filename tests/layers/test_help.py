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


@pytest.mark.parametrize("name", FULL)
def test_the_full_text_names_every_argument_parameter_and_buffer_and_fits_80_columns(name: str) -> None:
    layer, text = FULL[name](), inspect.cleandoc(getattr(layers, name).__doc__)
    wanted = [*inspect.signature(type(layer)).parameters, "Args:", "Shape:", "Parameters", "decay", "Raises:", "arXiv:"]
    wanted += [stored for stored, _ in (*layer.named_parameters(), *layer.named_buffers())]
    assert [word for word in wanted if word not in text] == []
    assert max(map(len, text.splitlines())) <= 80


def test_the_first_line_of_each_other_class_points_to_the_full_text() -> None:
    others = {name for name in layers.__all__ if isinstance(getattr(layers, name), type)} - FULL.keys()
    for name in others:
        family = next(full for full in FULL if name.startswith(full.removesuffix("2d")))
        assert f"see {family}" in getattr(layers, name).__doc__.partition("\n")[0]
