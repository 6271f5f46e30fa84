"""State dicts that bring an epsilon, loaded into FRN layers that were built with another form of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import EXACT, PLANE_FLOAT32
from torch import Tensor, nn

from deploynorm.errors import InputError
from deploynorm.layers import FRN2d

C = 3
ONE, EACH = torch.full((C,), 2e-4), torch.tensor([1e-4, 2e-4, 3e-4])
FORMS: dict[str, dict[str, Any]] = {
    "number": {},
    "another number": {"eps": 1e-3},
    "tensor": {"eps": torch.ones(C)},
    "learned": {"learned_eps": "layer"},
    "learned by channel": {"learned_eps": "channel"},
}


def saved(eps: Tensor) -> dict[str, Tensor]:
    return FRN2d(C, eps=eps).state_dict(prefix="0.")


@pytest.mark.parametrize("eps", [ONE, EACH], ids=["one", "each"])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_takes_the_epsilon_in_the_form_that_it_has(form: str, eps: Tensor) -> None:
    network = nn.Sequential(FRN2d(C, **FORMS[form]))
    if form == "learned" and eps is EACH:
        with pytest.raises(InputError, match=r"^0, FRN2d: .* differs between channels.* learned_eps='channel'"):
            network.load_state_dict(saved(eps))
        return
    state = saved(eps)
    names = set(state)
    network.load_state_dict(state)
    assert set(state) == names, "the caller's own dict stays as it was"
    layer = network.get_submodule("0")
    assert isinstance(layer, FRN2d)
    torch.testing.assert_close(torch.as_tensor(layer.effective_eps()).expand(C), eps, **PLANE_FLOAT32.kwargs())
    x = torch.randn(2, C, 4, 5) * 1e-2
    want = x / (x.square().mean((2, 3), keepdim=True) + eps[:, None, None]).sqrt()
    torch.testing.assert_close(network(x), want.relu(), **PLANE_FLOAT32.kwargs())
    if layer.eps_l is None:
        again = nn.Sequential(FRN2d(C))
        again.load_state_dict(network.state_dict())
        torch.testing.assert_close(again.get_buffer("0.eps"), eps, **EXACT.kwargs())


def test_a_learned_epsilon_that_the_state_dict_has_stays() -> None:
    theirs = FRN2d(C, eps=EACH, learned_eps="layer")
    ours = FRN2d(C, learned_eps="layer")
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.effective_eps(), theirs.effective_eps(), **EXACT.kwargs())


def test_an_epsilon_below_the_lower_bound_is_refused_and_one_that_was_rounded_is_not() -> None:
    layer = FRN2d(C, eps=1e-3, learned_eps="channel")
    with pytest.raises(InputError, match=r"^FRN2d, FRN2d: .* below the lower bound.*Got 0.0001; expected at least 0.0"):
        layer.load_state_dict(FRN2d(C, eps=EACH).state_dict())
    layer = FRN2d(C, learned_eps="channel")
    layer.load_state_dict(FRN2d(C, eps=torch.full((C,), 1e-6)).state_dict())  # in float32 it is less
    assert layer.eps_l is not None
    assert not layer.eps_l.any()


@pytest.mark.parametrize("eps", [torch.zeros(C), torch.full((C,), torch.nan)], ids=["zero", "nan"])
def test_an_epsilon_that_is_none_is_refused_and_the_layer_keeps_its_own(eps: Tensor) -> None:
    layer = FRN2d(C)
    with pytest.raises(InputError, match="wrong eps"):
        layer.load_state_dict({**layer.state_dict(), "eps": eps})
    assert layer.eps == 1e-6
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**layer.state_dict(), "eps": torch.ones(C + 1)})


def test_a_layer_on_meta_takes_an_epsilon() -> None:
    with torch.device("meta"):
        layer = FRN2d(C)
    layer.load_state_dict(FRN2d(C, eps=EACH).state_dict(), assign=True)
    torch.testing.assert_close(layer.effective_eps(), EACH, **EXACT.kwargs())
