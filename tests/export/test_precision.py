"""A network in another type: what is converted, what stays in float32, and what does not fit."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from tolerances import EXACT, OP_BFLOAT16, OP_FLOAT16
from torch import Tensor, nn

from deploynorm._export.precision import dtype_of, first_overflow, kept_layers, to_precision
from deploynorm._fold import fold
from deploynorm.errors import InputError, ModelError
from deploynorm.layers import TLU, FRN2d, MABN2d
from deploynorm.trace import trace

HALF = {torch.float16: OP_FLOAT16, torch.bfloat16: OP_BFLOAT16}


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), FRN2d(8, learned_eps="channel"), nn.BatchNorm2d(8), body, MABN2d(6), TLU(6))
    return net.eval()


def _types(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in model.state_dict().items() if value.is_floating_point()}


def _x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_weights_take_the_type_norms_keep_float32_and_it_computes_the_network(dtype: torch.dtype) -> None:
    half, x = to_precision(_network(), dtype), _x(dtype)
    norms = tuple(f"{index}." for index in (1, 2, 4))
    for name, found in _types(half).items():
        assert found == (torch.float32 if name.startswith(norms) else dtype), name
    with torch.no_grad():
        got, want = half(x), _network().double()(x.double())
    assert got.dtype == dtype
    scale = float(want.abs().max())
    torch.testing.assert_close(got.double() / scale, want / scale, **HALF[dtype].kwargs())


def test_the_network_given_is_unchanged() -> None:
    net = _network().train()
    before = copy.deepcopy(net.state_dict())
    to_precision(net, torch.float16, keep_float32=["3"], keep_io_types=True)
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize(("own", "dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float64)])
def test_a_wider_type_changes_no_number(own: torch.dtype, dtype: torch.dtype) -> None:
    net = _network().to(own)
    wide = to_precision(net, dtype)
    assert set(_types(wide).values()) == {dtype}
    for name, value in net.state_dict().items():
        torch.testing.assert_close(wide.state_dict()[name].double(), value.double(), **EXACT.kwargs())


KEPT = {
    "one layer": (["3.0"], ("3.0",)),
    "a container means all layers in it": (["3"], ("3",)),
    "its own parts named too": (["3", "3.2"], ("3",)),
    "a pattern": (["3.*"], ("3.0", "3.1", "3.2")),
    "several": (["0", "3.2"], ("0", "3.2")),
    "a pattern across dots": (["*2"], ("2", "3.2")),
}


@pytest.mark.parametrize(("patterns", "names"), KEPT.values(), ids=KEPT)
def test_named_layers_stay_in_float32_with_casts_around_them(patterns: list[str], names: tuple[str, ...]) -> None:
    net = _network()
    assert kept_layers(net, patterns) == names
    half = to_precision(net, torch.float16, keep_float32=patterns)
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name, module in half.named_modules():
        if name in names:
            assert set(_types(module).values()) <= {torch.float32}
            inner = module.forward

            def forward(x: Tensor, inner: object = inner, name: str = name) -> Tensor:
                y = inner(x)
                seen[name] = (x.dtype, y.dtype)
                return y

            module.forward = forward
    with torch.no_grad():
        assert half(_x(torch.float16)).dtype == torch.float16
    assert seen == dict.fromkeys(names, (torch.float32, torch.float32))


def test_inputs_and_outputs_keep_the_networks_own_type() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
            y = self.conv(x)
            return {"map": y, "picked": y.flatten(1)[:, index], "index": index + 1}

    half = to_precision(Two(), torch.float16, keep_io_types=True)
    with torch.no_grad():
        got = half(_x(), torch.tensor([1, 2]))
    assert {name: value.dtype for name, value in got.items()} == {
        "map": torch.float32, "picked": torch.float32, "index": torch.int64}  # fmt: skip
    assert half.conv.weight.dtype == torch.float16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep_io_types", [False, True])
def test_an_archive_keeps_what_its_operators_require_in_float32(keep_io_types: bool) -> None:
    """An archive as `deploynorm fold` writes it and `deploynorm export` reads it."""
    folded = fold(nn.Sequential(nn.ReLU(), _network()), (_x(),)).model
    buffer = io.BytesIO()
    torch.export.save(trace(folded, (_x(),)), buffer)
    archive = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    half = to_precision(archive, torch.float16, keep_io_types=keep_io_types)
    types = _types(half)
    assert types["1.0.weight"] == types["1.3.2.weight"] == types["1.5.tau"] == torch.float16
    assert types["1.1.weight"] == types["1.1.tau"] == types["1.2.running_var"] == torch.float32
    x = _x(torch.float16)
    with torch.no_grad():
        got, want = half(x.float() if keep_io_types else x), folded(x.float())
    assert got.dtype == (torch.float32 if keep_io_types else torch.float16)
    scale = float(want.abs().max())
    torch.testing.assert_close(got.float() / scale, want / scale, **OP_FLOAT16.kwargs())


def test_tensors_that_layers_share_stay_shared() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    half = to_precision(net, torch.float16)
    assert half[0].weight is half[2].weight
    kept = to_precision(net, torch.float16, keep_float32=["2"])
    assert (kept[0].weight.dtype, kept[2].weight.dtype) == (torch.float16, torch.float32)


def test_a_recurrent_layer_is_converted_with_its_own_list_of_weights() -> None:
    half = to_precision(nn.LSTM(3, 4), torch.bfloat16)
    with torch.no_grad():
        assert half(torch.zeros(2, 1, 3, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


REFUSED = {
    "a name of nothing": (["3.9"], torch.float16, r"no layer of that name\. Got '3\.9'; expected .*\b3\.[012]\b"),
    "a pattern of nothing": (["stage*"], torch.float16, "no layer of that name. Got 'stage"),
    "layers to keep where all is float32": (["3"], torch.float32, "nothing is in half precision"),
    "integers": ([], torch.int8, "not a type for a network"),
}


@pytest.mark.parametrize(("patterns", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_it_refuses(patterns: list[str], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_precision(_network(), dtype, keep_float32=patterns)


@pytest.mark.filterwarnings("ignore")
def test_an_archive_has_no_layers_to_keep() -> None:
    archive = torch.export.export(_network(), (_x(),)).module()
    with pytest.raises(InputError, match=r"an archive of torch\.export has no layers"):
        to_precision(archive, torch.float16, keep_float32=["0"])


def test_a_weight_past_the_largest_number_names_its_layer() -> None:
    net = _network()
    with torch.no_grad():
        net[3][2].weight[1, 2] = -7e4
    expected = (
        "layer 3.2: weight does not fit into float16. Got 7e+04; expected at most 65504. Fix: keep_float32 (--keep"
    )
    with pytest.raises(ModelError, match=re.escape(expected)):
        to_precision(net, torch.float16)
    to_precision(net, torch.bfloat16)
    to_precision(net, torch.float16, keep_float32=["3.2"])


def test_infinities_of_a_threshold_and_wide_statistics_of_a_norm_are_kept() -> None:
    tlu, norm = TLU(3), nn.BatchNorm2d(3).eval()
    tlu.tau.data.fill_(-torch.inf)  # no threshold
    norm.running_var.copy_(torch.tensor([1e7, 1e-9, 1.0]))
    assert torch.isneginf(to_precision(tlu, torch.float16).tau).all()
    assert torch.equal(to_precision(norm, torch.float16).running_var, norm.running_var)


VANISHING = {
    "to nothing": (1e-9, True),
    "to two digits": (3e-6, True),
    "not yet": (1e-3, False),
    "zeros, which lose nothing": (0.0, False),
}


@pytest.mark.parametrize(("factor", "warned"), VANISHING.values(), ids=VANISHING)
@pytest.mark.parametrize("layer", ["0", "3.2"])
def test_a_channel_that_vanishes_is_reported_by_name(layer: str, factor: float, warned: bool) -> None:
    net = _network()
    weight = net.get_submodule(layer).weight.data
    (weight if layer == "0" else weight.movedim(1, 0))[2] *= factor
    if not warned:
        to_precision(net, torch.float16)  # warnings are errors
        return
    channels = weight.shape[0 if layer == "0" else 1]
    with pytest.warns(RuntimeWarning, match=re.escape(f"{layer}.weight (1 of {channels} channels)")):
        to_precision(net, torch.float16)
    to_precision(net, torch.bfloat16)
    to_precision(net, torch.float16, keep_float32=[layer])


def test_the_layer_whose_output_overflows_is_found() -> None:
    net = _network()
    with torch.no_grad():
        net[3][0].weight.fill_(6e4)
    half, x = to_precision(net, torch.float16), _x(torch.float16)
    assert first_overflow(half, [x]) == "3.0"
    assert first_overflow(to_precision(_network(), torch.float16), [x]) is None
    assert not any(module._forward_hooks for module in half.modules())


def test_the_type_of_a_network_is_that_of_its_parameters() -> None:
    assert dtype_of(_network().bfloat16()) == torch.bfloat16
    assert dtype_of(nn.ReLU()) == torch.float32
