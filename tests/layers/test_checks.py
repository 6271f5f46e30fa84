"""What the layers refuse, and with which messages; ranks and channels are in test_listing_faults.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from deploynorm.errors import InputError
from deploynorm.layers import (
    TLU,
    CenConv1d,
    CenConv2d,
    CenConv3d,
    CenConvTranspose2d,
    FRN1d,
    FRN2d,
    MABN1d,
    MABN2d,
    parameter_groups,
)


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _operator(*tensors: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.deploynorm.filter_response_norm(*tensors)
    return y


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "frn1d_of_4d": (lambda: FRN1d(3)(_x(2, 3, 4, 4)), "FRN1d: wrong rank.*2-D or 3-D"),
    "frn2d_of_2d": (lambda: FRN2d(3)(_x(2, 3)), r"FRN2d: wrong rank.*\(2, 3\).*4-D"),
    "frn_channels": (lambda: FRN2d(3)(_x(2, 4, 5, 5)), "FRN2d: wrong number of channels.*3 on"),
    "frn_integers": (lambda: FRN2d(3)(_x(2, 3, 4, 4, dtype=torch.int64)), "FRN2d: .*not floating point"),
    "frn_no_features": (lambda: FRN2d(0), r"FRN2d: num_features must be positive\. Got 0"),
    "frn_eps_0": (lambda: FRN2d(3, eps=0.0), "FRN2d: eps must be positive"),
    "frn_eps_negative": (lambda: FRN2d(3, eps=-1e-6), "FRN2d: eps must be positive"),
    "frn_eps_nan": (lambda: FRN2d(3, eps=float("nan")), "FRN2d: eps must be positive"),
    "frn_eps_shape": (lambda: FRN2d(3, eps=torch.ones(4)), r"FRN2d: wrong eps.*\(4,\).*\(3,\)"),
    "frn_eps_with_infinity": (lambda: FRN2d(2, eps=torch.tensor([1.0, math.inf])), "FRN2d: wrong eps"),
    "frn_eps_with_a_0": (lambda: FRN2d(2, eps=torch.tensor([1.0, 0.0])), "FRN2d: wrong eps"),
    "frn_learned_eps_word": (
        lambda: FRN2d(3, learned_eps="chanel"),  # type: ignore[arg-type]
        r"FRN2d: unknown learned_eps\. Got 'chanel'; expected 'layer', 'channel' or None",
    ),
    "operator_gamma_of_one_for_many": (
        lambda: _operator(_x(2, 3, 4, 4), _x(1), _x(3), _x(3), _x(3)),
        r"deploynorm::filter_response_norm: the operands do not fit.*gamma \(1,\)",
    ),
    "operator_x_of_one_axis": (lambda: _operator(*(_x(3),) * 5), "deploynorm::filter_response_norm: the operands do"),
    "tlu_channels": (lambda: TLU(3)(_x(2, 4, 5, 5)), "TLU: wrong number of channels"),
    "tlu_rank": (lambda: TLU(3)(_x(3)), "TLU: wrong rank"),
    "tlu_integers": (lambda: TLU(3)(_x(2, 3, dtype=torch.int32)), "TLU: .*not floating point"),
    "tlu_no_features": (lambda: TLU(-1), "TLU: num_features must be positive"),
    "mabn_channels_in_evaluation": (lambda: MABN2d(3).eval()(_x(2, 4, 4, 4)), "MABN2d: wrong number of channels"),
    "mabn_integers": (lambda: MABN1d(3)(_x(2, 3, dtype=torch.int64)), "MABN1d: .*not floating point"),
    "mabn_no_features": (lambda: MABN2d(0), "MABN2d: num_features must be positive"),
    "mabn_eps_0": (lambda: MABN2d(3, eps=0.0), "MABN2d: eps must be positive"),
    "mabn_window": (lambda: MABN2d(3, moving_batch_size=0), "MABN2d: moving_batch_size must be"),
    "mabn_renorm": (lambda: MABN2d(3, max_renorm=0.5), "MABN2d: max_renorm is out of range"),
    "mabn_momentum": (lambda: MABN2d(3, momentum=1.5), "MABN2d: momentum is out of range"),
    "cenconv1d_fan_in_1": (lambda: CenConv1d(1, 4, 1), "CenConv1d: a fan-in of 1"),
    "cenconv2d_depthwise_1x1": (lambda: CenConv2d(8, 8, 1, groups=8), "CenConv2d: a fan-in of 1.*1, 1"),
    "cenconv3d_fan_in_1": (lambda: CenConv3d(1, 2, 1), "CenConv3d: a fan-in of 1"),
    "cenconvtranspose2d_fan_in_1": (lambda: CenConvTranspose2d(4, 8, 1, groups=4), "CenConvTranspose2d: a fan-in of 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_with_where_and_what(name: str) -> None:
    call, message = MISTAKES[name]
    with pytest.raises(InputError, match=f"^{message}"):
        call()


NO_NUMBERS = ("a", None, True, [3], math.nan, -1, torch.ones(()))
NO_COUNTS = (*NO_NUMBERS, 2.5, math.inf)
ARGUMENTS: dict[str, tuple[Callable[[Any], object], Sequence[object]]] = {
    "num_features of FRN2d": (FRN2d, (*NO_COUNTS, 0)),
    "eps of FRN2d": (lambda value: FRN2d(3, eps=value), (*NO_NUMBERS[:-1], 0, math.inf)),
    "num_features of TLU": (TLU, (*NO_COUNTS, 0)),
    "num_features of MABN2d": (MABN2d, (*NO_COUNTS, 0)),
    "eps of MABN2d": (lambda value: MABN2d(3, eps=value), (*NO_NUMBERS, 0, math.inf)),
    "momentum of MABN2d": (lambda value: MABN2d(3, momentum=value), (*NO_NUMBERS, 1.5)),
    "moving_batch_size of MABN2d": (lambda value: MABN2d(3, moving_batch_size=value), (*NO_COUNTS, 0)),
    "warmup of MABN2d": (lambda value: MABN2d(3, warmup=value), NO_COUNTS),
    "renorm_start of MABN2d": (lambda value: MABN2d(3, renorm_start=value), NO_COUNTS),
    "max_renorm of MABN2d": (lambda value: MABN2d(3, max_renorm=value), NO_NUMBERS),
    "weight_decay of parameter_groups": (lambda value: parameter_groups(TLU(3), value), (*NO_NUMBERS, math.inf)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_another_type_or_range_is_refused_with_what_was_expected(name: str) -> None:
    argument, _, of = name.split()
    call, values = ARGUMENTS[name]
    for value in values:
        with pytest.raises(
            InputError, match=rf"^{of}: {argument} (must be|is out of range).*Got .*; expected "
        ) as caught:
            call(value)
        assert repr(value) in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    layer = MABN2d(np.int64(3), eps=np.float32(0.5), moving_batch_size=np.int32(4))  # type: ignore[arg-type]
    assert layer(torch.ones(2, 3, 1, 1)).isfinite().all()


@pytest.mark.parametrize("kind", [FRN2d, TLU, MABN2d])
def test_parameters_are_floating_point_and_inputs_tensors(kind: Callable[..., torch.nn.Module]) -> None:
    with pytest.raises(InputError, match=r"dtype is not floating point. Got torch.int64"):
        kind(3, dtype=torch.int64)
    for x in (None, [1.0], np.zeros((2, 3, 1, 1))):
        with pytest.raises(InputError, match=f"the input is not a tensor. Got {type(x).__name__}"):
            kind(3)(x)
